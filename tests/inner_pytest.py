"""Tests that need an environment of their own: Triton's interpreter is chosen by a variable before triton is first
imported, which torch may already have done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600


def inner_run(file: str, prefix: str, **environment: str) -> None:
    """Runs the functions of this file of tests whose names start with `prefix` in a pytest of their own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-o", f"python_functions={prefix}_*", str(Path(file).resolve())],
        cwd=ROOT, env=clean | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    wanted = {line[4:].partition("(")[0] for line in lines if line.startswith(f"def {prefix}_")}
    passed = {line.split("::")[1].partition("[")[0] for line in done.stdout.splitlines() if line.startswith("PASSED")}
    assert passed == wanted, "some did not run"

"""Conversion time and memory against depth: ``python benchmarks/conversion.py [--out FILE]``.

Converts GPT-2 (width 768, on the meta device) at 12, 48 and 192 layers, and a Llama with the sizes of Llama 3 70B, each
in a process of its own, and prints seconds, seconds per layer and peak resident memory. Writes JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path

LAYERS = (12, 48, 192)
LLAMA = """
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model(
    "llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, vocab_size=128256,
)
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config)
"""
GPT = """
from modnorm_fx.models_zoo import build
model = build("hf:gpt2", layers=int(sys.argv[1]), device="meta")
"""
ONE = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import torch
import modnorm_fx as mn
{build}
start = time.perf_counter()
norm = mn.convert(model)
print(json.dumps(dict(
    layers=int(sys.argv[1]), parameters=sum(p.numel() for p in model.parameters()),
    seconds=time.perf_counter() - start, leaves=len(norm.leaves),
    peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, torch=torch.__version__,
)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/conversion.json"))
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    args = parser.parse_args()
    rows = []
    for layers, code in [*((layers, GPT) for layers in args.layers), (80, LLAMA)]:
        command = [sys.executable, "-c", ONE.replace("{build}", code), str(layers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        row = rows[-1]
        each = row["seconds"] / layers
        print(
            f"{row['parameters'] / 1e9:6.1f}B weights, {layers:4} layers {row['seconds']:7.1f} s "
            f"{each:6.3f} s/layer {row['peak_mb']:7.0f} MB",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

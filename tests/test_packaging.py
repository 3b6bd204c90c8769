"""The built package, outside the source tree: what the three folders of the top level become in sdist and wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"modnorm_fx": "modnorm_fx", "passes": "modnorm_fx/passes", "models_zoo": "modnorm_fx/models_zoo"}


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel made from that sdist; built from a copy, the tree stays clean."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree, cwd=out)
    return out


def expected_files() -> set[str]:
    files = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    kernels = {f"modnorm_fx/kernels/{name}" for name in ("cpu.cpp", "power.hpp", "products.hpp")}
    return files | kernels | {"modnorm_fx/py.typed", "modnorm_fx/models_zoo/timm_families.txt"}


def test_the_wheel_holds_every_file_in_its_mapped_place(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected_files() <= names
    assert all(name.startswith(("modnorm_fx/", "modnorm_fx-")) for name in names), "something else is at the top level"


def test_the_sdist_can_be_built_from(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "LICENSE",
        "passes/__init__.py",
        "models_zoo/__init__.py",
        "modnorm_fx/kernels/cpu.cpp",
        "modnorm_fx/kernels/power.hpp",
        "modnorm_fx/kernels/products.hpp",
    } <= names


def test_an_installed_wheel_imports_away_from_the_source_tree(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import modnorm_fx, modnorm_fx.passes, modnorm_fx.models_zoo as zoo\n"
        "print(modnorm_fx.__file__, modnorm_fx.passes.__file__, zoo.__file__, sep='\\n')\n"
        "print(type(zoo.build('zoo:resmlp', device='meta')).__name__)\n"
    )
    *files, net = run(sys.executable, "-c", code, cwd=tmp_path).split()
    assert [Path(file).parent for file in files] == [site / target for target in FOLDERS.values()]
    assert net == "ResMLP"


def test_an_editable_install_maps_to_the_source_tree() -> None:
    """Run with the package installed as `make setup` does it; from a folder where the tree is not on the path."""
    code = "import modnorm_fx.passes, modnorm_fx.models_zoo as zoo; print(modnorm_fx.passes.__file__, zoo.__file__)"
    passes, zoo = run(sys.executable, "-c", code, cwd=Path("/")).split()
    if "site-packages" not in passes:
        assert (Path(passes).parent, Path(zoo).parent) == (ROOT / "passes", ROOT / "models_zoo")


def test_setup_pins_what_it_installs() -> None:
    """Every direct dependency, of the package and of its extras, has an exact version in constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    names = {"".join(c if c.isalnum() or c in "-_" else " " for c in item).split()[0] for item in wanted}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in lines)
    assert names - {"modnorm-fx"} <= {line.partition("==")[0] for line in lines}

"""The direction of the arrows: a file imports only from files above it in the flow. Read from the source, not run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"modnorm_fx": "modnorm_fx", "passes": "modnorm_fx.passes", "models_zoo": "modnorm_fx.models_zoo"}

# The flow, first to last. A file imports from rows above its own; files of one row may import each other (Python itself
# refuses circles at import time). A new file needs a place here.
FLOW: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ground", ("errors", "_torchvision", "_copies", "_failures", "_outputs", "_updates")),
    ("kernels", ("kernels",)),
    ("tensor arithmetic", ("spectral_norm", "runtime", "orthogonal")),
    ("atoms", ("slices", "atom_base", "matrix_atoms", "weight_atoms", "atoms")),
    ("capture", ("inputs_hf_values", "inputs_hf", "inputs", "_composites", "_flex_attention", "_trace", "capture")),
    (
        "rules",
        (
            "conventions",
            "quadrature",
            "regions",
            "rules",
            "layer_rules",
            "attention_rules",
            "arithmetic_rules",
            "product_rules",
            "reduction_rules",
            "shape_rules",
            "pointwise_rules",
            "recurrent_rules",
            "aten_rules",
        ),
    ),  # fmt: skip
    ("tree", ("tree",)),
    ("passes", ("passes",)),
    ("norm", ("explain", "initialization", "binding", "norm", "norm_json")),
    ("pipeline", ("pipeline",)),
    ("report", ("report_rows", "report")),
    ("codegen", ("buckets", "atom_code", "normalizer", "codegen")),
    ("optimizer", ("fused_adamw", "fused_triton", "base_step", "graph", "step_op", "optim_state", "optim")),
    ("torch.compile backend", ("compile",)),
    ("package", ("__init__",)),
    ("models and data", ("models_zoo",)),
    ("commands", ("commands",)),
    ("command line", ("cli", "__main__")),
)
ROW = {file: row for row, (_, files) in enumerate(FLOW) for file in files}

# A method may hand its value on to a later stage, by an import inside the function: importer -> what it may so import.
LATER: dict[str, set[str]] = {
    "norm": {"codegen", "report", "pipeline"},
}
ONLY_PIPELINE_IMPORTS = "passes"
NOT_FROM_PASSES = {"cli", "optim", "report", "compile"}
MAX_LINES = 500


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *(part for part in rest if part != "__init__")])


def stage(module: str) -> str:
    """The name in `FLOW` under which a module of the package goes: the part after `modnorm_fx`."""
    return (module.split(".") + ["__init__"])[1]


def is_file(module: str) -> bool:
    name = stage(module)
    return name in ROW or (ROOT / "modnorm_fx" / f"{name}.py").exists()


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(module, inside a function, line) for each module of this package that the file imports."""
    tree = ast.parse(path.read_text())
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*parents, node.module]))
            found = [f"{base}.{alias.name}" if base == "modnorm_fx" else base for alias in node.names]
            if base == "modnorm_fx":  # one of its files, or a name of the package itself
                found = [module if is_file(module) else base for module in found]
        for module in found:
            if module.split(".")[0] in ("modnorm_fx", "passes", "models_zoo"):
                yield module, id(node) in inside, node.lineno


def own_imports(path: Path) -> Iterator[tuple[str, str, bool, str]]:
    """(importer's stage, imported stage, inside a function, place), leaving out imports within one stage."""
    importer = stage(module_name(path))
    for module, inside, line in imports(path):
        if stage(module) != importer:
            yield importer, stage(module), inside, f"{path.relative_to(ROOT)}:{line}"


def test_every_file_has_a_place_in_the_flow() -> None:
    homeless = sorted({str(path.relative_to(ROOT)) for path in sources() if stage(module_name(path)) not in ROW})
    assert not homeless, f"{homeless} have no row in FLOW (tests/test_layers.py): say where they stand"


def test_a_file_imports_only_from_files_above_it() -> None:
    wrong = [
        f"{place}: {importer} imports {imported}"
        for path in sources()
        for importer, imported, inside, place in own_imports(path)
        if ROW.get(imported, -1) > ROW.get(importer, len(FLOW)) and not (inside and imported in LATER.get(importer, ()))
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_pipeline_imports_the_passes() -> None:
    wrong = [
        place
        for path in sources()
        for importer, imported, _, place in own_imports(path)
        if imported == ONLY_PIPELINE_IMPORTS and importer != "pipeline"
    ]
    assert not wrong, wrong


def test_passes_never_import_the_faces() -> None:
    wrong = [
        place
        for path in sources()
        for importer, imported, _, place in own_imports(path)
        if importer == "passes" and imported in NOT_FROM_PASSES
    ]
    assert not wrong, wrong


def test_no_second_copies_through_top_level_names() -> None:
    everything = [*sources(), *sorted((ROOT / "tests").glob("*.py"))]
    pattern = ("passes", "models_zoo")
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in everything
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] in pattern for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in pattern)
    ]
    assert not wrong, f"{wrong}: import modnorm_fx.passes and modnorm_fx.models_zoo, never passes or models_zoo"


@pytest.mark.parametrize("shadow", ["passes", "models_zoo"])
def test_nothing_shadows_the_package_mapping(shadow: str) -> None:
    assert not (ROOT / "modnorm_fx" / shadow).exists(), f"modnorm_fx/{shadow} would win over the folder {shadow}"


def test_no_long_files() -> None:
    folders = [*FOLDERS, "tests", "benchmarks"]
    lengths = {path: len(path.read_text().splitlines()) for folder in folders for path in (ROOT / folder).rglob("*.py")}
    long = {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > MAX_LINES}
    assert not long, long


def test_the_package_needs_neither_transformers_nor_timm() -> None:
    optional = ("transformers", "timm", "torchvision", "sklearn", "matplotlib")
    code = f"import sys, modnorm_fx; print([name for name in {optional} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_checker_sees_relative_and_lazy_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "passes").mkdir()
    file = tmp_path / "passes" / "example.py"
    file.write_text(
        "import torch\nfrom . import facts\nfrom ..cli import main\nfrom modnorm_fx import atoms, convert\n"
        "def f():\n    from modnorm_fx.optim import ModularOptimizer\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert [(imported, inside) for _, imported, inside, _ in own_imports(file)] == [
        ("cli", False),
        ("atoms", False),
        ("__init__", False),
        ("optim", True),
    ]

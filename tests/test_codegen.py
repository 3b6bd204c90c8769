"""Generated normalisers against the norms written out with numpy, leaf by leaf; and the text itself."""

from __future__ import annotations

import ast
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from every_atom import CASES, converted, pieces, updates
from torch import Tensor, nn

import modnorm_fx as mn
from modnorm_fx import atoms as A
from modnorm_fx import codegen
from modnorm_fx.buckets import buckets
from modnorm_fx.errors import FormatError, OptimizerError
from modnorm_fx.normalizer import COLD_STEPS
from modnorm_fx.runtime import PIECE_CAP

MODEL, NORM = CASES["tracked"]
CPU = torch.device("cpu")


def parts(norm: mn.ModularNorm, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {leaf.key: leaf.read(tensors[leaf.weight]).clone() for leaf in norm.leaves}


def scaled_pieces(atom: A.Atom, w: Tensor, target: float) -> list[float]:
    """What the norms of the pieces should be: the target, or less for those far below the largest."""
    sizes = pieces(atom, w)
    return [target * size / max(size, max(sizes) / PIECE_CAP) for size in sizes]


# What it does ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", CASES)
def test_every_piece_of_every_leaf_gets_its_target(convention: str) -> None:
    _, norm = CASES[convention]
    normalizer = norm.normalizer()
    given = updates(norm)
    before = parts(norm, given)
    normalizer.normalize_(given)
    for leaf in norm.leaves:
        found = pieces(leaf.atom, leaf.read(given[leaf.weight]))
        wanted = scaled_pieces(leaf.atom, before[leaf.key], leaf.target)
        assert found == pytest.approx(wanted, rel=2e-3), leaf.key  # from the cold start


def test_directions_are_kept() -> None:
    given = updates(NORM)
    before = parts(NORM, given)
    NORM.normalizer().normalize_(given)
    for leaf in NORM.leaves:
        one_piece = len(pieces(leaf.atom, before[leaf.key])) == 1
        if one_piece:
            old, new = before[leaf.key].flatten(), leaf.read(given[leaf.weight]).flatten()
            assert torch.dot(old, new).item() == pytest.approx((old.norm() * new.norm()).item(), rel=1e-5), leaf.key


def test_duals_are_those_of_the_singular_value_decomposition() -> None:
    given, exact = updates(NORM), updates(NORM)
    NORM.normalizer(mode="dualize").normalize_(given)
    NORM.dualize_(exact)
    for leaf in NORM.leaves:
        if isinstance(leaf.atom, A.Tied):
            continue  # defined by a sum of duals: see below
        new, old = leaf.read(given[leaf.weight]), leaf.read(exact[leaf.weight])
        assert (new - old).norm() < 0.02 * old.norm(), leaf.key


def test_the_dual_of_a_tied_weight_has_its_norm_and_descends() -> None:
    norm = CASES["paper"][1]
    (leaf,) = (leaf for leaf in norm.leaves if isinstance(leaf.atom, A.Tied))
    given = updates(norm)
    before = given[leaf.weight].clone()
    norm.normalizer(mode="dualize").normalize_(given)
    assert max(pieces(leaf.atom, given[leaf.weight])) == pytest.approx(leaf.target, rel=2e-3)
    assert torch.dot(before.flatten(), given[leaf.weight].flatten()) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    given = updates(NORM, dtype=dtype)
    NORM.normalizer(dtype=dtype).normalize_(given)
    for leaf in NORM.leaves:
        found = max(pieces(leaf.atom, leaf.read(given[leaf.weight]).float()))
        assert found == pytest.approx(leaf.target, rel=2e-3 if dtype == torch.float64 else 0.02), leaf.key


def test_zero_stays_zero() -> None:
    given = {name: torch.zeros_like(update) for name, update in updates(NORM).items()}
    for mode in codegen.MODES:
        NORM.normalizer(mode=mode).normalize_(given)
        assert all(not update.any() for update in given.values())


def test_power_iteration_follows_updates_that_turn() -> None:
    normalizer = NORM.normalizer()
    momentum = updates(NORM)
    for step in range(COLD_STEPS + 20):
        noise = updates(NORM, seed=step + 2)
        momentum = {name: 0.95 * m + 0.3 * noise[name] for name, m in momentum.items()}
        given = {name: m.clone() for name, m in momentum.items()}
        normalizer.normalize_(given)
        if step >= COLD_STEPS:
            for leaf in NORM.leaves:
                norm = max(pieces(leaf.atom, leaf.read(given[leaf.weight])))
                assert leaf.target * 0.999 < norm < leaf.target * 1.1, (step, leaf.key)


def test_a_missing_update_is_named() -> None:
    given = updates(NORM)
    del given["qkv.weight"]
    with pytest.raises(OptimizerError, match="no update of qkv.weight"):
        NORM.normalizer().normalize_(given)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 12, dtype=torch.cfloat, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(x.to(torch.cfloat) @ self.w)


def test_complex_weights() -> None:
    norm = mn.convert(Complex(), (torch.randn(3, 12),))
    (leaf,) = norm.leaves
    given = {"w": torch.randn(12, 12, dtype=torch.cfloat)}
    norm.normalizer(dtype=torch.cfloat).normalize_(given)
    assert torch.linalg.matrix_norm(given["w"], 2).item() == pytest.approx(leaf.target, rel=2e-3)


class Stack(nn.Module):
    """As many equal layers as one likes, and one that is used in part."""

    def __init__(self, width: int = 12, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.part = nn.Parameter(torch.randn(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        return x @ self.part[: x.shape[-1]].T


def stack(width: int = 12, depth: int = 3) -> tuple[Stack, mn.ModularNorm]:
    torch.manual_seed(0)
    model = Stack(width, depth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, mn.convert(model, (torch.randn(4, width),))


def test_entries_of_no_leaf_become_zero() -> None:
    _, norm = stack()
    given = updates(norm)
    norm.normalizer().normalize_(given)
    assert given["part"][:12].any() and not given["part"][12:].any()


def test_equal_layers_share_a_bucket() -> None:
    _, norm = stack(depth=5)
    found = buckets(norm, dict.fromkeys(norm.shapes, (torch.float32, CPU)))
    assert [len(bucket.names) for bucket in found] == [5, 5, 1]
    mixed = dict.fromkeys(norm.shapes, (torch.float32, CPU)) | {"layers.2.weight": (torch.bfloat16, CPU)}
    assert sorted(len(bucket.names) for bucket in buckets(norm, mixed)) == [1, 1, 4, 5]


# The text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", codegen.MODES)
def test_the_same_model_gives_the_same_bytes(mode: str) -> None:
    assert codegen.source(converted("tracked")[1], mode=mode) == codegen.source(NORM, mode=mode)


def test_the_text_is_plain_python_that_imports_torch_and_the_runtime_only() -> None:
    tree = ast.parse(codegen.source(NORM))
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports == ["from math import sqrt", "import torch", "from modnorm_fx import runtime as rt"]
    (body,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "factors")
    assert not any(isinstance(node, ast.For | ast.While | ast.If) for node in ast.walk(body))  # straight-line


def test_every_target_stands_beside_its_factors() -> None:
    text = codegen.source(NORM)
    for leaf in NORM.leaves:
        (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{leaf.key!r}: "))
        assert f"{leaf.target!r}, " in line and "√" in line and "#" in line


def test_tracebacks_show_the_generated_line() -> None:
    module = codegen.load(codegen.source(NORM))
    try:
        module.factors([None] * 99, [None] * 99, [None] * 99)
    except Exception as error:
        shown = "".join(traceback.format_exception(error))
    assert "rt." in shown and "modnorm_fx normalizer" in shown


@pytest.mark.parametrize("text", ["x = 1\n", "def f(:\n", "import nowhere_at_all\n"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="not the text of a normaliser"):
        codegen.load(text)


def test_an_unknown_mode_or_backend_is_refused() -> None:
    with pytest.raises(OptimizerError, match="mode='sideways'"):
        NORM.normalizer(mode="sideways")
    with pytest.raises(OptimizerError, match="backend='sideways'"):
        NORM.normalizer(backend="sideways")


def test_the_file_runs_on_its_own(tmp_path: Path) -> None:
    (tmp_path / "generated.py").write_text(codegen.source(NORM), encoding="utf-8")
    given = updates(NORM)
    torch.save(given, tmp_path / "updates.pt")
    code = (
        "import torch, generated\n"
        "updates = torch.load('updates.pt')\n"
        "u = generated.normalize_(updates, target=0.5)\n"
        "again = torch.load('updates.pt')\n"
        "generated.normalize_(again, u, target=0.5)\n"
        "torch.save([updates, again], 'out.pt')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for found in torch.load(tmp_path / "out.pt"):
        for leaf in NORM.leaves:
            norm = max(pieces(leaf.atom, leaf.read(found[leaf.weight])))
            assert norm == pytest.approx(0.5 * leaf.target, rel=2e-3), leaf.key


# Compiled -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", codegen.MODES)
def test_the_generated_function_has_no_graph_break(mode: str) -> None:
    torch._dynamo.reset()
    module = codegen.load(codegen.source(NORM, mode=mode))
    normalizer = NORM.normalizer(mode=mode)
    normalizer.normalize_(updates(NORM))
    stacks = [buffer.clone() for buffer in normalizer.buffers]
    compiled = torch.compile(module.factors, fullgraph=True, backend="aot_eager")
    found, _ = compiled([x.clone() for x in stacks], normalizer.vectors, normalizer._targets)
    wanted, _ = module.factors([x.clone() for x in stacks], normalizer.vectors, normalizer._targets)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0.0)


def train(backend: str, steps: int, mode: str = "normalize") -> tuple[list[float], dict[str, Tensor]]:
    model, norm = stack(width=12, depth=2)
    opt = mn.ModularOptimizer(
        torch.optim.AdamW(model.parameters()), norm, lr=0.1, weight_decay=0.1, backend=backend, mode=mode
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    g = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 12, generator=g)
        loss = (model(x)[:, :12] - x.roll(1, 1)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def test_compiled_and_eager_agree_over_a_schedule_without_recompiling() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    losses, weights = train("compile", 50)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    plain, wanted = train("eager", 50)
    assert losses == pytest.approx(plain, rel=1e-3)
    for name, w in weights.items():
        torch.testing.assert_close(w, wanted[name], rtol=1e-2, atol=1e-3)


def test_training_does_not_depend_on_the_cpp_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from modnorm_fx.kernels import cpu

    losses, weights = train("eager", 50)
    monkeypatch.setattr(cpu, "takes", lambda *tensors: False)
    plain, wanted = train("eager", 50)
    assert losses == pytest.approx(plain, rel=1e-3)
    for name, w in weights.items():
        torch.testing.assert_close(w, wanted[name], rtol=1e-2, atol=1e-3)

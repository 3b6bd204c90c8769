"""Generated normalisers against the norms written out with numpy, leaf by leaf; and the text itself."""

from __future__ import annotations

import ast
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from every_atom import CASES, converted, pieces, updates
from fake_norm import Leaf, Norm
from torch import Tensor, nn

import modnorm_fx as mn
from modnorm_fx import atoms as A
from modnorm_fx import codegen
from modnorm_fx.buckets import buckets
from modnorm_fx.errors import FormatError, ModnormError, OptimizerError
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


@pytest.mark.parametrize("emitted", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.pop("qkv.weight"), "no update of qkv.weight"),
        (lambda given: given.update(other=torch.ones(3)), "does not know, other"),
        (lambda given: given.update({"qkv.weight": torch.ones(1, 16)}), r"qkv.weight has shape \[1, 16\]"),
        (lambda given: given["qkv.weight"].fill_(torch.nan), "update of qkv.weight holds NaN"),
    ],
)
def test_what_is_wrong_with_updates_is_named_and_nothing_changes(
    emitted: bool, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    given = updates(NORM)
    change(given)
    before = {name: update.clone() for name, update in given.items()}
    normalizer = NORM.normalizer()
    with pytest.raises(ModnormError, match=message):
        (codegen.load(normalizer.source) if emitted else normalizer).normalize_(given)
    assert all(torch.equal(update.nan_to_num(), before[name].nan_to_num()) for name, update in given.items())
    assert not normalizer.state()


# Every kind of atom, in every kind of place ---------------------------------------------------------------------------

ATOMS = [
    A.Linear((10, 12)), A.Linear((12, 10), transposed=True), A.Linear((5, 12)),
    A.Conv((12, 10, 3, 2)), A.Conv((12, 10, 3), groups=2), A.Conv((12, 1, 3), groups=12), A.Conv((10, 12, 2), groups=1,
    transposed=True), A.Conv((20, 12, 3), groups=2, transposed=True, stride=(2,)), A.PatchConv((12, 3, 2, 2)),
    A.Experts((3, 10, 12)), A.Experts((3, 12, 10), transposed=True), A.Gates((40, 12), gates=4),
    A.Embedding((7, 12)), A.Table((1, 5, 12)), A.Table((4, 6, 5), feature_axes=(0, 2)), A.Bias((12,)), A.Bias(()),
    A.GateBias((12,), gates=4), A.Gain((12,)), A.LogitBias((3, 4)), A.Scalar(()), A.Scalar((3, 4)),
    A.Reshaped(A.Linear((12, 10)), (2, 6, 10)),
    A.Reshaped(A.Experts((2, 9, 12)), (9, 24), permute=(1, 0, 2), stored=(9, 2, 12)),
    A.Reshaped(A.Embedding((6, 10)), (10, 6), permute=(1, 0)),
    A.Tied((12, 10), (A.Embedding((12, 10)), A.Linear((12, 10)), A.Linear((12, 10), transposed=True)), (0.3, 1.0, 2.0)),
]  # fmt: skip


def alone(atom: A.Atom, slices: tuple[A.Slice, ...] = (), shape: tuple[int, ...] | None = None) -> Norm:
    """The norm of two equal parameters, each with one leaf."""
    model = nn.Module()
    for name in ("a", "b"):
        setattr(model, name, nn.Parameter(torch.zeros(shape or atom.shape)))
    return Norm(
        model, [Leaf(f"{name}{slices or ''}", name, atom, target, slices) for name, target in (("a", 0.5), ("b", 2.0))]
    )


def normalised(norm: Norm, mode: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    given = {name: torch.randn(shape, generator=g) for name, shape in norm.shapes.items()}
    before = {name: update.clone() for name, update in given.items()}
    codegen.make(norm, dict.fromkeys(given, (torch.float32, CPU)), mode).normalize_(given)
    return given, before


@pytest.mark.parametrize("mode", codegen.MODES)
@pytest.mark.parametrize("atom", ATOMS, ids=lambda atom: f"{atom.kind}-{'x'.join(map(str, atom.shape))}")
def test_every_kind_of_atom(atom: A.Atom, mode: str) -> None:
    norm = alone(atom)
    given, before = normalised(norm, mode)
    for leaf in norm.leaves:
        found, sizes = pieces(atom, given[leaf.weight]), pieces(atom, before[leaf.weight])
        assert max(found) == pytest.approx(leaf.target, rel=2e-3)
        if mode == "normalize":
            assert found == pytest.approx([leaf.target * s / max(s, max(sizes) / PIECE_CAP) for s in sizes], rel=2e-3)
        assert (given[leaf.weight] * before[leaf.weight]).sum() > 0


def test_no_kind_of_atom_is_left_out() -> None:
    from modnorm_fx.atom_base import _concrete

    assert {cls.kind for cls in _concrete()} == {atom.kind for atom in ATOMS}


@pytest.mark.parametrize("mode", codegen.MODES)
@pytest.mark.parametrize(
    ("slices", "shape", "atom"),
    [
        ((A.Slice(0, 10, 20, 30),), (30, 12), A.Linear((10, 12))),
        ((A.Slice(1, 0, 12, 36),), (10, 36), A.Linear((10, 12))),
        ((A.Slice(0, 2, 4, 6),), (30, 12), A.Linear((10, 12))),  # interleaved per head
        ((A.Slice(1, 4, 6, 6),), (10, 36), A.Linear((10, 12))),
        ((A.Slice(0, 2, 4, 6), A.Slice(0, 3, 9, 10)), (30, 12), A.Linear((6, 12))),  # a part of a part
        ((A.Slice(0, 2, 4, 6), A.Slice(1, 0, 9, 12)), (30, 12), A.Linear((10, 9))),
        ((A.Slice(0, 1, 3, 3),), (9,), A.Bias((6,))),
        ((A.Slice(0, 2, 5, 8),), (8, 12), A.Embedding((3, 12))),  # a factor for each row of a slice
        ((A.Slice(0, 1, 2, 2),), (10, 12), A.Embedding((5, 12))),
        ((A.Slice(2, 0, 12, 24),), (3, 10, 24), A.Experts((3, 10, 12))),
    ],
)
def test_slices_in_every_kind_of_place(
    slices: tuple[A.Slice, ...], shape: tuple[int, ...], atom: A.Atom, mode: str
) -> None:
    norm = alone(atom, slices, shape)
    given, before = normalised(norm, mode)
    for leaf in norm.leaves:
        sizes = pieces(atom, leaf.read(before[leaf.weight]))
        wanted = [leaf.target * s / max(s, max(sizes) / PIECE_CAP) for s in sizes]
        assert pieces(atom, leaf.read(given[leaf.weight])) == pytest.approx(wanted, rel=2e-3)
        kept = leaf.read(given[leaf.weight]).abs().sum()
        assert given[leaf.weight].abs().sum() == pytest.approx(kept.item(), rel=1e-5)  # and nothing beside it


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


def test_every_target_stands_beside_its_factors_and_declared_norms_have_lines_of_their_own() -> None:
    text = codegen.source(NORM)
    assert any(leaf.atom.decays and leaf.initial not in (0.0, 1.0) for leaf in NORM.leaves)
    for leaf in NORM.leaves:
        line, *declared = (line.strip() for line in text.splitlines() if line.strip().startswith(f"{leaf.key!r}: "))
        assert f"{leaf.target!r}, " in line and "√" in line and "#" in line
        other = leaf.atom.decays and leaf.initial not in (0.0, 1.0)
        assert declared == ([f"{leaf.key!r}: {leaf.initial!r},"] if other else [])


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


def test_a_device_or_type_that_cannot_hold_updates_is_refused() -> None:
    missing = [d for d in ("cuda", "xpu") if not getattr(torch, d).is_available()]
    for device in (*missing, "sideways", None, 3.5):
        with pytest.raises(OptimizerError, match=f"device={device!r} cannot be used here"):
            NORM.normalizer(device)
    for dtype in (torch.int64, torch.bool, None, "float32"):
        with pytest.raises(OptimizerError, match=f"cannot be of dtype={dtype!r}"):
            NORM.normalizer(dtype=dtype)


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
    found, _ = compiled([x.clone() for x in stacks], normalizer.vectors, normalizer.targets)
    wanted, _ = module.factors([x.clone() for x in stacks], normalizer.vectors, normalizer.targets)
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

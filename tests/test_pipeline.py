"""``convert`` end to end: against modula on random nets, against derivatives, and what it promises about the model."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass

import modula.abstract
import modula.atom
import modula.bond
import oracle
import pytest
import torch
from existing_nets import TOKENS, PreNorm
from hypothesis import given, settings
from hypothesis import strategies as st
from modnorm_fx.models_zoo import paper
from torch import Tensor, nn
from torch.nn import functional as F

import modnorm_fx as mn
from modnorm_fx.errors import CaptureError, MassError, ModnormError, UnknownOpError, WeightError

WIDTH = 6


# --- the paper's package ----------------------------------------------------------------------------------------------


class Step(nn.Module):
    """A piece of a random net in plain torch; children are called a, b, ... so that no numbering looks like a stack."""

    def __init__(self, kind: str, *parts: nn.Module, factor: float = 1.0):
        super().__init__()
        self.kind, self.factor = kind, factor
        for name, part in zip("abc", parts, strict=False):
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        parts = [getattr(self, name) for name in "abc" if hasattr(self, name)]
        match self.kind:
            case "after":
                for part in parts:
                    x = part(x)
                return x
            case "sum":
                return sum(part(x) for part in parts)
            case "residual":
                return (1 - self.factor) * x + self.factor * parts[0](x)
            case "scale":
                return self.factor * x
            case "relu":
                return F.relu(x)
            case "gelu":
                return F.gelu(x)
            case "abs":
                return x.abs()
            case "rms":
                return paper.rms_divide(x)
        raise AssertionError(self.kind)


@dataclass(frozen=True)
class Pair:
    """A net in modula, in plain torch, and the masses that were set by hand (path inside the net -> mass)."""

    net: modula.abstract.Module
    plain: nn.Module
    masses: dict[str, float]

    def below(self, name: str) -> dict[str, float]:
        return {f"{name}.{path}" if path else name: mass for path, mass in self.masses.items()}


BONDS = {"relu": modula.bond.ReLU, "gelu": modula.bond.GELU, "abs": modula.bond.Abs, "rms": modula.bond.RMSDivide}


@st.composite
def pairs(draw, depth: int = 2) -> Pair:
    if depth == 0:
        return Pair(modula.atom.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), {})
    below = pairs(depth - 1)
    kind = draw(st.sampled_from(["after", "sum", "residual", "scale", "bond", "tare"]))
    if kind in ("after", "sum"):
        a, b = draw(below), draw(below)
        net = b.net @ a.net if kind == "after" else a.net + b.net
        return Pair(net, Step(kind, a.plain, b.plain), a.below("a") | b.below("b"))
    a = draw(below)
    if kind == "tare":
        mass = draw(st.sampled_from([0.5, 3.0]))
        a.net.tare(absolute=mass)
        return Pair(a.net, a.plain, a.masses | {"": mass})
    if kind == "residual":
        share = draw(st.sampled_from([0.25, 0.5]))
        net = (1 - share) * modula.bond.Identity() + share * a.net
        return Pair(net, Step("residual", a.plain, factor=share), a.below("a"))
    if kind == "scale":
        factor = draw(st.sampled_from([-2.0, 0.3]))
        return Pair(factor * a.net, Step("after", a.plain, Step("scale", factor=factor)), a.below("a"))
    name = draw(st.sampled_from(sorted(BONDS)))
    return Pair(BONDS[name]() @ a.net, Step("after", a.plain, Step(name)), a.below("a"))


@settings(max_examples=12, deadline=None)
@given(pairs(2))
def test_random_nets_get_modulas_targets(pair: Pair):
    model = Step("after", pair.plain, nn.Linear(WIDTH, WIDTH, bias=False))
    net = modula.atom.Linear(WIDTH, WIDTH) @ pair.net
    norm = mn.convert(model, (torch.randn(3, WIDTH),), convention="paper")
    for path, mass in pair.below("a").items():  # innermost first, as modula tares while it composes
        norm = norm.tare(path, mass)
    names = [name for name, _ in model.named_parameters()]
    assert norm.targets == pytest.approx(dict(zip(names, oracle.targets(net), strict=True)), rel=1e-5)


def test_bonds_in_a_row_and_side_by_side_compose_as_the_paper_says():
    """One scalar function each for quadrature; declared sensitivities multiplied and added for the paper."""
    first, last = (modula.atom.Linear(WIDTH, WIDTH) for _ in range(2))
    beside = 0.5 * modula.bond.Identity() + 0.5 * modula.bond.ReLU()
    net = last @ beside @ modula.bond.Abs() @ modula.bond.GELU() @ first
    a, b = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
    plain = Step("after", a, Step("after", Step("gelu"), Step("abs"), Step("residual", Step("relu"), factor=0.5)), b)
    norm = mn.convert(plain, (torch.randn(3, WIDTH),), convention="paper")
    assert list(norm.targets.values()) == pytest.approx(oracle.targets(net), rel=1e-5)


@pytest.mark.parametrize("mass", [1.0, 7.0])
def test_one_block_of_the_papers_residual_nets(mass: float):
    """modula cannot write (1 - 1/1)·x; the skip has sensitivity 0, so the block is its residue."""
    mlp = modula.bond.MeanSubtract() @ modula.bond.Abs() @ modula.atom.Linear(12, 12) @ modula.bond.RMSDivide()
    blocks = mlp**2
    blocks.tare(absolute=mass)
    net = modula.atom.Linear(10, 12) @ blocks @ modula.atom.Linear(12, 20)
    model = paper.ResMLP(width=12, blocks=1, block_depth=2, inputs=20, classes=10)
    norm = mn.convert(model, (torch.randn(3, 20),), convention="paper", masses={"stacks": mass})
    assert list(norm.targets.values()) == pytest.approx(oracle.targets(net), rel=1e-5)


# --- what a norm means ------------------------------------------------------------------------------------------------


def moved(model: nn.Module, update: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    """The first-order change of the output."""
    names = [name for name, _ in model.named_parameters()]

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), inputs, tie_weights=True)

    values = tuple(p.detach() for _, p in model.named_parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.func.jvp(run, values, tuple(update[name] for name in names))[1]


def random_step(norm, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    update = {leaf.weight: torch.randn(norm.shapes[leaf.weight], generator=g) for leaf in norm.leaves}
    norm.normalize_(update)
    return update


@pytest.mark.parametrize("net", [
    lambda: (paper.ResMLP(width=16, blocks=3, inputs=12, classes=4), torch.randn(5, 12)),
    lambda: (paper.GPT(vocab=11, context=6, heads=2, width=16, blocks=2), torch.randint(11, (3, 6))),
])  # fmt: skip
def test_a_unit_update_of_a_well_normed_net_moves_its_output_by_at_most_one(net):
    """The paper's guarantee (proposition on well-normed modules), on inputs and weights of norm 1."""
    torch.manual_seed(0)
    model, x = net()
    x = paper.rms_divide(x) if x.is_floating_point() else x
    norm = mn.convert(model, (x,), convention="paper")
    for seed in range(3):
        change = moved(model, random_step(norm, seed), x)
        assert float(change.square().mean(-1).sqrt().max()) <= 1.0


@pytest.mark.parametrize("depth", [2, 12])
def test_a_unit_update_of_an_existing_net_typically_moves_its_output_by_about_one(depth: int):
    """``tracked`` speaks of typical sizes at declared norms; random steps are not aligned and move somewhat less."""
    model = PreNorm(depth)
    norm = mn.convert(model, (TOKENS,))
    norm.initialize_(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        size = float(model(TOKENS).square().mean().sqrt())
    changes = [float(moved(model, random_step(norm, seed), TOKENS).square().mean().sqrt()) / size for seed in range(4)]
    assert 0.1 < max(changes) < 2.0


# --- masses -----------------------------------------------------------------------------------------------------------


def masses_of(norm) -> dict[str, float]:
    regions = {"token": "stem", "norm": "head", "head": "head", "blocks": "stacks"}
    out = dict.fromkeys(("stem", "stacks", "head"), 0.0)
    for leaf in norm.leaves:
        out[regions[leaf.weight.split(".")[0]]] += leaf.mass
    return out


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_masses_do_not_depend_on_depth(depth: int):
    model = PreNorm(depth)
    assert masses_of(mn.convert(model, (TOKENS,))) == pytest.approx({"stem": 1.0, "stacks": 1.0, "head": 1.0})
    given = {"stem": 0.5, "stacks": 4.0, "head": 2.0}
    assert masses_of(mn.convert(model, (TOKENS,), masses=given)) == pytest.approx(given)


def test_masses_of_paths_are_tares():
    model = PreNorm(2)
    plain = mn.convert(model, (TOKENS,), masses={"stacks": 4.0})
    norm = mn.convert(model, (TOKENS,), masses={"stacks": 4.0, "blocks.1": 3.0, "head.bias": 0.0})
    assert norm.targets == pytest.approx(plain.tare("blocks.1", 3.0).tare("head.bias", 0.0).targets)
    vectors = mn.convert(model, (TOKENS,), masses={"vectors": 1.0, "biases": 1.0})
    block = {leaf.weight: leaf.mass for leaf in vectors.leaves if leaf.weight.startswith("blocks.0.")}
    whole = pytest.approx(max(block.values()))
    assert all(mass == whole for name, mass in block.items() if not name.endswith("bias"))
    assert all(2 * mass == whole for name, mass in block.items() if name.endswith("bias"))  # two blocks' are alike


# --- what is promised about the model ---------------------------------------------------------------------------------


def saved(norm, tmp_path) -> bytes:
    norm.save(tmp_path / "norm.json")
    return (tmp_path / "norm.json").read_bytes()


def test_weights_are_not_read(tmp_path):
    """Real, meta, half precision, other values, training or not: the same bytes."""
    real = PreNorm(2)
    with torch.device("meta"):
        empty = PreNorm(2)
    other = PreNorm(2, layer_scale=1e-5).requires_grad_(False)
    with torch.no_grad():
        for p in other.parameters():
            p.fill_(math.nan)
    first = saved(mn.convert(real, (TOKENS,)), tmp_path)
    for model, tokens in (
        (real, TOKENS),
        (empty, TOKENS),
        (empty, TOKENS.to("meta")),
        (other, TOKENS),
        (other.bfloat16(), TOKENS),
    ):
        assert saved(mn.convert(model, (tokens,)), tmp_path) == first
    assert saved(mn.convert(real, kwargs={"tokens": TOKENS}), tmp_path) == first


def test_the_model_is_not_touched():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    model.train()
    model[0].eval()
    calls: list[int] = []
    model.register_forward_hook(lambda *a: calls.append(1))
    model[0].weight.grad = torch.ones(8, 8)
    model[3].weight.requires_grad_(False)
    before, identities = copy.deepcopy(model.state_dict()), {n: id(p) for n, p in model.named_parameters()}
    x = torch.randn(4, 8)
    kept, state = x.clone(), torch.random.get_rng_state()
    mn.convert(model, (x,))
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(x, kept)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {n: id(p) for n, p in model.named_parameters()} == identities
    assert [m.training for m in model] == [False, True, True, True]
    assert torch.equal(model[0].weight.grad, torch.ones(8, 8)) and not model[3].weight.requires_grad
    assert model(x).requires_grad and torch.is_grad_enabled()
    assert type(model) is nn.Sequential and len(model._forward_hooks) == 1


def test_unused_parameters_are_named_in_a_warning():
    model = PreNorm(1)
    model.spare, model.also = nn.Linear(3, 3), nn.Parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match="3 parameters reach no output") as caught:
        norm = mn.convert(model, (TOKENS,))
    assert set(norm.unused) == {"also", "spare.weight", "spare.bias"}
    assert all(name in str(caught[0].message) for name in norm.unused)
    assert not any(leaf.weight in norm.unused for leaf in norm.leaves)
    assert caught[0].filename == __file__


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_what_a_custom_backward_passes_on_is_named_with_what_to_write_instead():
    class Binary(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.b(self.function(self.a(x)))

    with pytest.warns(UserWarning, match=r"1 parameter moves no output and gets no norm: a\.weight") as caught:
        mn.convert(Binary(Sign.apply), (torch.randn(2, 4),))
    text = str(caught[0].message)
    assert "derivative of aten.sign.default at" in text and "write it as x + (f(x) - x).detach()" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm = mn.convert(Binary(lambda x: x + (x.sign() - x).detach()), (torch.randn(2, 4),))
    assert norm.targets["a.weight"] == pytest.approx(norm.targets["b.weight"])


def test_a_parameter_behind_a_comparison_is_unused():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.gate = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x) * (self.gate(x) > 0)

    with pytest.warns(UserWarning, match="gate.weight"):
        assert mn.convert(Gate(), (torch.randn(2, 8),)).unused == ("gate.weight", "gate.bias")


def test_partly_used_parameters_are_named_in_a_warning():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 4))

        def forward(self, x):
            return F.linear(x, self.weight[2:5])

    with pytest.warns(UserWarning, match=r"Only parts of weight reach an output.*weight\[2:5\]"):
        mn.convert(Part(), (torch.randn(2, 4),))


def test_nothing_is_said_about_a_net_without_surprises():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mn.convert(PreNorm(1), (TOKENS,))


# --- ops without a rule -----------------------------------------------------------------------------------------------


@torch.library.custom_op("modnorm_tests::wave", mutates_args=())
def wave(x: Tensor) -> Tensor:
    return 3 * torch.sin(x)


wave.register_fake(torch.empty_like)
wave.register_autograd(
    lambda ctx, grad: 3 * grad * torch.cos(ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Wave(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return wave(self.body(x))


X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


def test_an_unknown_op_is_refused_by_name_module_and_line():
    with pytest.raises(UnknownOpError) as caught:
        mn.convert(nn.Sequential(Wave()), (X,), unknown="error")
    text = str(caught.value)
    assert "modnorm_tests.wave.default" in text and "test_pipeline.py" in text and "return wave(self.body(x))" in text
    assert "wave.default at 0 (" in text  # the module's path
    assert any("propagate_scales" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_makes_no_difference(made_inside: bool):
    """Slopes of functions, of sampled operations and of computed matrices are derivatives."""

    class Net(nn.Sequential):
        def forward(self, x):
            return torch.hypot(super().forward(x), wave(super().forward(x)))

    def made():
        return Net(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.GELU(), nn.Linear(8, 4))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x = made(), torch.zeros(2, 6)
        with torch.inference_mode():
            inside = mn.convert(*((made(), (torch.zeros(2, 6),)) if made_inside else (model, (x,))))
        assert inside.targets == mn.convert(model, (x,)).targets and not inside.unused


def test_an_unknown_op_is_sampled_and_marked():
    norm = mn.convert(Wave(), (X,), unknown="sample")
    value, slope = math.sqrt(4.5 * (1 - math.exp(-2))), math.sqrt(4.5 * (1 + math.exp(-2)))
    (weight, bias) = norm.leaves
    assert weight.sensitivity * weight.scale == pytest.approx(slope / value, rel=0.05)
    assert "sampled" in norm.explain("scales") and "sampled" in str(norm)
    again = mn.convert(Wave(), (X,), unknown="sample")
    assert again.targets == norm.targets  # the draws are the same every time


def test_a_rule_of_ones_own_makes_it_known():
    rules = mn.ATEN.extended()
    rules.rule(torch.ops.modnorm_tests.wave.default, status="declared", source="3·sin has slope at most 3")(
        lambda call: mn.rules.Local(3.0, {"x": 3.0})
    )
    norm = mn.convert(Wave(), (X,), unknown="error", rules=rules)
    assert norm.leaves[0].sensitivity == pytest.approx(1.0)


# --- bad inputs -------------------------------------------------------------------------------------------------------

LINEAR = nn.Linear(4, 4)
BATCH = (torch.randn(2, 4),)


class Argmax(nn.Linear):
    def forward(self, x):
        return super().forward(x).argmax(-1)


class Double(nn.Linear):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("call, error, text", [
    (lambda: mn.convert(nn.ReLU(), BATCH), WeightError, "ReLU has no parameters"),
    (lambda: mn.convert(LINEAR), CaptureError, "No example inputs are known for Linear"),
    (lambda: mn.convert(LINEAR, (torch.randn(2, 7),)), CaptureError, "Linear does not run on these inputs"),
    (lambda: mn.convert(LINEAR, (*BATCH, 3)), CaptureError, "Linear does not run on these inputs"),
    (lambda: mn.convert(LINEAR, kwargs={"inptu": BATCH[0]}), CaptureError, "unexpected keyword argument 'inptu'"),
    (lambda: mn.convert(nn.LazyLinear(4), BATCH), CaptureError, "parameters without a shape"),
    (lambda: mn.convert(Argmax(4, 4), BATCH), CaptureError, "returns no floating-point tensor"),
    (lambda: mn.convert(Double(4, 4), BATCH), WeightError, "No parameter of Double reaches its outputs"),
    (lambda: mn.convert(LINEAR, BATCH, convention="papr"), ModnormError, "no convention 'papr'"),
    (lambda: mn.convert(LINEAR, BATCH, unknown="guess"), ModnormError, "unknown='guess' is not a choice"),
    (lambda: mn.convert(LINEAR, BATCH, convention=["paper"]), ModnormError, "no convention ['paper']"),
    (lambda: mn.convert(LINEAR, BATCH, outputs=0), ModnormError, "outputs=0 names no outputs"),
    (lambda: mn.convert(LINEAR, BATCH, outputs=[0]), ModnormError, "outputs=[0] names no outputs"),
    (lambda: mn.convert(LINEAR, BATCH, rules=None), ModnormError, "rules=None is no table of rules"),
    (lambda: mn.convert(LINEAR, BATCH, kwargs=3), ModnormError, "kwargs=3 is not a mapping"),
    (lambda: mn.convert(LINEAR, BATCH, masses={0: 1.0}), MassError, "Nothing in the norm lies at 0"),
    (lambda: mn.convert(LINEAR, BATCH, masses={"weigth": 1.0}), MassError, "Nothing in the norm lies at 'weigth'"),
    (lambda: mn.convert(LINEAR, BATCH, masses={"weight": -1.0}), MassError, "The mass of 'weight' is -1.0"),
    (lambda: mn.convert(LINEAR, BATCH, masses={"stacks": math.nan}), MassError, "The mass of 'stacks' is nan"),
    (lambda: mn.convert(LINEAR, BATCH, masses=[1.0]), MassError, "is not a mapping"),
    (lambda: mn.convert(nn.Linear, BATCH), ModnormError, "A norm is that of an nn.Module"),
    (lambda: mn.convert(lambda x: x, BATCH), ModnormError, "A norm is that of an nn.Module"),
])  # fmt: skip
def test_bad_inputs(call, error, text):
    with pytest.raises(ModnormError) as caught:
        call()
    assert type(caught.value) is error and text in str(caught.value)


class Standardised(nn.Module):
    """A layer whose matrix is computed in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight - self.weight.mean(1, True)
        return torch.tanh(nn.functional.linear(x, w / 16))


def test_a_computed_matrix_is_measured_never_taken_for_a_parameter_of_norm_one():
    model, x = Standardised(), torch.randn(4, 256)
    norm = mn.convert(model, (x,), unknown="error")
    (leaf,) = norm.leaves
    assert leaf.scale == pytest.approx(1 / 16, rel=0.02) and leaf.initial == pytest.approx(16, rel=0.02)
    norm.initialize_(model)
    matrix = (model.weight - model.weight.mean(1, True)) / 16
    assert (256 / 32) ** 0.5 * torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(1.0, rel=0.02)

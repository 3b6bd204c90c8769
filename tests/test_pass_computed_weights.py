"""Matrices computed from parameters: the claims about them, held against the matrices of real layers by SVD."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as P
from staged import REWRITES, With, stage
from torch import Tensor, nn

import modnorm_fx
from modnorm_fx.errors import UnknownOpError, WeightError

IMAGE = torch.randn(2, 16, 6, 6)
ROWS = torch.randn(4, 32)


class StandardConv(nn.Conv2d):
    """Weight standardisation, with gains and the factor γ/√n of an NFNet, or without (BiT)."""

    def __init__(self, *args, gamma: float | None = None, **options):
        super().__init__(*args, bias=False, **options)
        self.gamma = gamma
        if gamma is not None:
            self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    @property
    def matrix(self) -> Tensor:
        gain = None if self.gamma is None else (self.gain * self.gamma * self.weight[0].numel() ** -0.5).view(-1)
        flat = self.weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(flat, None, None, weight=gain, training=True, eps=1e-12).reshape_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.matrix, None, self.stride, self.padding, self.dilation, self.groups)


class Own(nn.Module):
    """A linear layer whose matrix is a function of its parameter ``w`` (and of itself)."""

    def __init__(self, make: Callable[..., Tensor], shape: tuple[int, ...] = (24, 32), **own):
        super().__init__()
        self.make, self.w = make, nn.Parameter(torch.randn(shape))
        for name, value in own.items():
            if isinstance(value, nn.Parameter):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)

    @property
    def matrix(self) -> Tensor:
        return self.make(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)


def low_rank(s: Own) -> Tensor:
    return s.w + 0.5 * s.b @ s.a


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


#: layers whose matrix has the norm of its layer: the map follows the size of a parameter
UNIT = {
    "weight norm": lambda: P.weight_norm(nn.Linear(32, 24)),
    "weight norm, wide": lambda: P.weight_norm(nn.Linear(32, 64)),
    "weight norm, hooks": lambda: nn.utils.weight_norm(nn.Linear(32, 24)),
    "weight norm, conv": lambda: P.weight_norm(nn.Conv2d(16, 24, 3)),
    "weight norm, taps": lambda: P.weight_norm(nn.Conv2d(16, 24, 3), dim=3),
    "weight norm, transposed conv": lambda: P.weight_norm(nn.ConvTranspose2d(16, 24, 3)),
    "equalised": lambda: Own(lambda s: s.w * 0.25),
    "equalised by fan": lambda: Own(lambda s: s.w / math.sqrt(32)),
    "masked": lambda: Own(lambda s: s.w * s.mask, mask=torch.ones(24, 32)),
    "causal": lambda: Own(lambda s: s.w.tril(8)),
    "transposed": lambda: Own(lambda s: (0.1 * s.w).t(), (32, 24)),
    "rearranged": lambda: Own(lambda s: s.w.permute(1, 0, 2).reshape(24, 32), (4, 6, 32)),
    "of a stack": lambda: Own(lambda s: 3 * s.w[1], (3, 24, 32)),
    "joined": lambda: Own(lambda s: torch.cat([s.w, s.w2]), (8, 32), w2=parameter(16, 32)),
}
#: layers whose matrix has a size of its own
FIXED = {
    "spectral norm": lambda: P.spectral_norm(nn.Linear(32, 24), n_power_iterations=20),
    "spectral norm, wide": lambda: P.spectral_norm(nn.Linear(32, 64), n_power_iterations=20),
    "spectral norm, hooks": lambda: nn.utils.spectral_norm(nn.Linear(32, 24), n_power_iterations=20),
    "spectral norm, conv": lambda: P.spectral_norm(nn.Conv2d(16, 24, 3), n_power_iterations=20),
    "orthogonal": lambda: P.orthogonal(nn.Linear(32, 32)),
    "orthogonal, Cayley": lambda: P.orthogonal(nn.Linear(32, 24), orthogonal_map="cayley"),
    "orthogonal, Householder": lambda: P.orthogonal(nn.Linear(32, 24), orthogonal_map="householder"),
    "standardised": lambda: StandardConv(16, 24, 3),
    "standardised, grouped": lambda: StandardConv(16, 32, 3, groups=2, gamma=1.7),
    "standardised, gains": lambda: StandardConv(16, 24, 3, gamma=1.7),
    "one plus": lambda: Own(lambda s: torch.eye(24, 32) + s.w),
    "rows of unit length": lambda: Own(lambda s: 4 * F.normalize(s.w, dim=1)),
    "merged low rank": lambda: Own(low_rank, a=parameter(4, 32), b=parameter(24, 4)),
}
LAYERS = UNIT | FIXED


def matrix(layer: nn.Module, steps: int = 0) -> Tensor:
    """The matrix that the layer applies, after some steps of its own power iteration."""
    inputs = ROWS if not hasattr(layer, "kernel_size") else IMAGE
    for training in [True] * steps + [False]:
        layer.train(training)(inputs)
    found = layer.matrix if hasattr(layer, "matrix") else layer.weight
    return found.detach().double()


def norm(layer: nn.Module, w: Tensor) -> float:
    """Operator norm between RMS norms: the largest tap times the number of taps, from singular values."""
    groups, transposed = getattr(layer, "groups", 1), isinstance(layer, nn.ConvTranspose2d)
    if w.dim() == 2:
        return math.sqrt(w.shape[1] / w.shape[0]) * float(torch.linalg.matrix_norm(w, 2))
    taps = [t.mT if transposed else t for part in w.chunk(groups) for t in part.flatten(2).unbind(-1)]
    out, into = taps[0].shape
    return w[0, 0].numel() * math.sqrt(into / out) * max(float(torch.linalg.matrix_norm(t, 2)) for t in taps)


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old hooks are deprecated
        layer = LAYERS[name]()
    return layer, IMAGE if hasattr(layer, "kernel_size") else ROWS


def facts(layer: nn.Module, x: Tensor) -> tuple[dict, list[str]]:
    """What the pass measured, and the parameters it speaks of."""
    staged = stage(layer, x)
    assert staged.rewrite("computed") == {"computed": 1}
    assert staged.error() < 1e-5
    (region,) = staged.regions()
    (call,) = (n for n in staged.module.graph.nodes if n.op == "call_module")
    names = {entry.node: entry.name for entry in staged.captured.inputs}

    def source(node):
        return names[node] if node in names else source(node.args[0])

    return region.facts, [source(n) for n in call.args[: len(region.facts["weights"])]]


@pytest.mark.parametrize("name", LAYERS)
def test_initialised_layers_have_the_matrix_that_was_declared(name: str):
    layer, x = made(name)
    found, _ = facts(layer, x)
    modnorm_fx.convert(layer, (x,), unknown="error").initialize_(layer, generator=torch.Generator().manual_seed(1))
    w = matrix(layer, 5)
    if name in UNIT:
        assert found["scale"] == 1.0
        taps = w[0, 0].numel()  # independent ones add up in quadrature
        assert norm(layer, w) == pytest.approx(math.sqrt(taps), rel=0.1)
    else:
        white = torch.randn(256, *x.shape[1:])
        with torch.no_grad():
            moved = layer(white) - layer(torch.zeros_like(white))
        assert float(moved.square().mean().sqrt()) == pytest.approx(found["scale"], rel=0.05)


@pytest.mark.parametrize("name", LAYERS)
def test_a_unit_step_moves_the_matrix_as_claimed(name: str):
    layer, x = made(name)
    found, names = facts(layer, x)
    result = modnorm_fx.convert(layer, (x,), unknown="error")
    result.initialize_(layer, generator=torch.Generator().manual_seed(1))
    matrix(layer, 5)  # power vectors of the model, if it has some, settle
    atoms = {leaf.weight: leaf for leaf in result.leaves}
    parameters = dict(layer.named_parameters())
    for i, weight in enumerate(names):
        leaf, claim, moved = atoms[weight], found["sensitivity"][f"w{i}"], []
        assert leaf.scale == pytest.approx(claim) and leaf.initial == pytest.approx(found["initial"][f"w{i}"])
        for seed in range(3):
            step = torch.randn(leaf.atom.shape, generator=torch.Generator().manual_seed(seed))
            leaf.atom.dualize_(step, 1.0)
            whole = torch.zeros_like(parameters[weight])
            part = leaf.read(whole)
            part.copy_(step)
            leaf.write_(whole, part)
            ends = []
            for h in (1e-2, -1e-2):
                with torch.no_grad():
                    parameters[weight] += h * whole
                    ends.append(matrix(layer))
                    parameters[weight] -= h * whole
            moved.append(norm(layer, (ends[0] - ends[1]) / 2e-2))
        if name != "orthogonal, Householder":  # whose parameter keeps the author's values
            assert sum(moved) / 3 == pytest.approx(claim, rel=0.25), (weight, leaf.atom)


ATOMS = {
    "weight norm": {"original0": "Gain 24×1", "original1": "Linear 32→24"},
    "weight norm, taps": {"original0": "Gain 1×1×1×3", "original1": "Conv 3×3 16→24"},
    "weight norm, transposed conv": {"original0": "Gain 16×1×1×1", "original1": "Conv 3×3 16→24 transposed"},
    "spectral norm, conv": {"original": "Conv 3×3 16→24"},
    "orthogonal, Householder": {"original": "Scalar 24×32"},
    "standardised, gains": {"weight": "Conv 3×3 16→24", "gain": "Gain 24×1×1×1"},
    "merged low rank": {"w": "Linear 32→24", "a": "Linear 32→4", "b": "Linear 4→24"},
    "transposed": {"w": "Linear 32→24"},
    "rearranged": {"w": "Linear 32→24"},
    "of a stack": {"w[1:2]": "Linear 32→24"},
    "joined": {"w": "Linear 32→8", "w2": "Linear 32→16"},
}


@pytest.mark.parametrize("name", ATOMS)
def test_atoms(name: str):
    layer, x = made(name)
    found = {leaf.key.split(".")[-1]: leaf.atom.describe() for leaf in modnorm_fx.convert(layer, (x,)).leaves}
    found.pop("bias", None)
    assert found == ATOMS[name]


def test_a_product_used_as_it_is_stored_and_transposed():
    """Two layers in a row whichever way their product is stored; the first one reads the inputs."""
    for make in (lambda s: s.b @ s.w, lambda s: (s.w.t() @ s.b.t()).t()):
        layer = Own(make, (4, 32), b=parameter(24, 4))
        leaves = {leaf.key: leaf.atom.describe() for leaf in modnorm_fx.convert(layer, (ROWS,)).leaves}
        assert leaves == {"w": "Linear 32→4", "b": "Linear 4→24"}


def test_each_layer_measures_in_its_own_norm():
    """A table that is looked up and, scaled, is the head."""
    model = With(lambda s, i: F.linear(F.embedding(i, s.w), s.w * 0.5), w=(40, 16))
    (leaf,) = modnorm_fx.convert(model, (torch.zeros(2, 3, dtype=torch.long),)).leaves
    assert {type(a).__name__ for a in leaf.atom.atoms} == {"Embedding", "Linear"} if leaf.atom.kind == "Tied" else True
    staged = stage(model, torch.zeros(2, 3, dtype=torch.long))
    assert staged.rewrite("computed") == {"computed": 1}


LEFT_ALONE = {
    "plain": lambda s, x: F.linear(x, s.w),
    "view": lambda s, x: F.linear(x, s.w.t().contiguous().t()),
    "buffer": lambda s, x: F.linear(x, torch.eye(32)) * s.g,
    "from data": lambda s, x: F.linear(x, s.w * x.mean()),
    "learned queries": lambda s, x: ((0.1 * s.w) @ x.t()).softmax(-1) @ x,
    "signals only": lambda s, x: F.linear(x, s.w) @ F.linear(x, s.w).t(),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_leaves_alone(name: str):
    assert stage(With(LEFT_ALONE[name], w=(24, 32), g=(32,)), ROWS).rewrite("computed") == {"computed": 0}


def test_several_layers_of_one_matrix():
    """One matrix computed once and used twice is two uses, each with its own piece of graph."""

    def twice(s, x):
        w = F.normalize(s.w, dim=1)
        return F.linear(torch.relu(F.linear(x, w)), w)

    staged = stage(With(twice, w=(32, 32)), ROWS)
    assert staged.rewrite("computed") == {"computed": 2} and staged.error() < 1e-6
    assert len(staged.typed()["w"].uses) == 2


def test_a_bias_made_of_parts_is_one_bias_per_layer():
    def attention(s, x):
        bias = torch.cat([s.q, torch.zeros(32), s.v])
        q, k, v = F.linear(x, s.w, bias).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v

    model = With(attention, w=(96, 32), q=(32,), v=(32,))
    result = modnorm_fx.convert(model, (ROWS,), unknown="error")
    assert {leaf.key: leaf.atom.describe() for leaf in result.leaves} == {
        "w[0:32]": "Linear 32→32",
        "w[32:64]": "Linear 32→32",
        "w[64:96]": "Linear 32→32",
        "q": "Bias 32",
        "v": "Bias 32",
    }
    staged = stage(model, ROWS)
    assert staged.rewrite(*REWRITES)["joined"] == 3 and staged.error() < 1e-5


def test_a_bias_made_of_parts_for_a_layer_that_stays_whole():
    model = With(lambda s, x: F.linear(x, s.w, torch.cat([s.q, s.v])), w=(24, 32), q=(8,), v=(16,))
    found = {leaf.key: leaf.atom.kind for leaf in modnorm_fx.convert(model, (ROWS,), unknown="error").leaves}
    assert found == {"w": "Linear", "q": "Bias", "v": "Bias"}


class ConditionalConv(nn.Module):
    """Experts' kernels mixed by what the input is (CondConv)."""

    def __init__(self):
        super().__init__()
        self.weight, self.route = nn.Parameter(torch.randn(4, 8 * 16 * 9)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        kernels = torch.sigmoid(self.route(x.mean((2, 3)))) @ self.weight
        return F.conv2d(x.reshape(1, b * 16, 6, 6), kernels.view(b * 8, 16, 3, 3), groups=b).view(b, 8, 4, 4)


def test_a_matrix_that_depends_on_data_is_sampled_and_named():
    with pytest.warns(UserWarning, match=r"random inputs.*: weight\."):
        result = modnorm_fx.convert(ConditionalConv(), (IMAGE,))
    assert [leaf.key for leaf in result.leaves if leaf.status == "sampled"] == ["weight"]
    with pytest.raises(UnknownOpError, match="its matrix is computed from data"):
        modnorm_fx.convert(ConditionalConv(), (IMAGE,), unknown="error")


def test_a_parameter_mixed_into_a_matrix_is_named():
    """A convolution of the matrix: its entries arrive nowhere as they are, and it is no factor."""
    model = Own(lambda s: s.w + torch.fft.irfft(torch.fft.rfft(s.b, n=62) * 0.5, n=62)[:, :32], b=parameter(24, 40))
    with pytest.warns(UserWarning, match="random inputs"):
        result = modnorm_fx.convert(model, (ROWS,))
    assert {leaf.key: leaf.atom.kind for leaf in result.leaves} == {"w": "Linear", "b": "Scalar"}


def test_a_matrix_that_cannot_be_evaluated_is_sampled_or_refused():
    model = Own(lambda s: torch.log(s.w))  # NaN for negative entries
    with pytest.raises(WeightError, match="cannot be evaluated at random values"):
        modnorm_fx.convert(model, (ROWS,), unknown="error")
    with pytest.raises(UnknownOpError, match="sampling failed"):
        modnorm_fx.convert(model, (ROWS,))


def test_meta_and_real_models_agree():
    layer, x = made("weight norm, conv")
    real = modnorm_fx.convert(layer, (x,)).targets
    assert modnorm_fx.convert(layer.to("meta"), (x,)).targets == real


def test_constant_factors_enter_gains():
    factor = With(lambda s, x: x * (s.g * 100) + s.b * torch.tensor(0.1), g=(32,), b=(32,))
    plain = With(lambda s, x: x * s.g + s.b, g=(32,), b=(32,))
    by, of = ({leaf.key: leaf for leaf in modnorm_fx.convert(m, (ROWS,)).leaves} for m in (factor, plain))
    assert [by[k].atom for k in "gb"] == [of[k].atom for k in "gb"]
    assert by["g"].target == pytest.approx(of["g"].target / 100) and by["g"].initial == pytest.approx(0.01)
    assert by["b"].target == pytest.approx(of["b"].target * 10)


def test_a_shifted_gain_starts_where_the_factor_is_one():
    (leaf,) = modnorm_fx.convert(With(lambda s, x: x * (1 + s.g), g=(32,)), (ROWS,)).leaves
    assert leaf.atom.kind == "Gain" and leaf.initial == 0.0 and leaf.scale == 1.0

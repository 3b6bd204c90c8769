"""Scalar functions spelled in several ops become one call; single functions, gates and residuals stay."""

import math

import pytest
import torch
import torch.nn.functional as F
from modnorm_fx.passes.fuse_pointwise import fuse_pointwise
from op_calls import grid_moments
from staged import Staged, stage
from torch import nn

from modnorm_fx import ATEN, convert
from modnorm_fx.quadrature import gaussian_moments

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
MASK = torch.linspace(0, 1, 16)


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


SPELLINGS = {
    "GELU with tanh": (gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    "GELU with erf": (lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), F.gelu),
    "quick GELU": (lambda x: x * torch.sigmoid(1.702 * x), lambda x: x * torch.sigmoid(1.702 * x)),
    "SiLU": (lambda x: x * torch.sigmoid(x), F.silu),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), F.mish),
    "softplus": (lambda x: torch.log(1 + torch.exp(x)), F.softplus),
    "squared ReLU": (lambda x: torch.relu(x).square(), lambda x: torch.relu(x) ** 2),
    "hard swish": (lambda x: x * F.relu6(x + 3) / 6, F.hardswish),
    "x + relu(x)": (lambda x: x + torch.relu(x), lambda x: x + torch.relu(x)),
    "root": (lambda x: x.abs() ** 0.5, lambda x: x.abs().sqrt()),
}
OTHERS = {
    "one function": torch.relu,
    "a multiple": lambda x: 2 * torch.relu(x),
    "a multiple before": lambda x: torch.relu(3 * x),
    "masked": lambda x: torch.tanh(torch.relu(x) * MASK),
    "another signal's gate": lambda x: torch.sigmoid(x.roll(1, 0)) * x,
    "another shape": lambda x: torch.relu(x) * torch.sigmoid(x).mean(-1, keepdim=True),
}


def found(function, *inputs) -> Staged:
    staged = stage(function, *(inputs or (X,)))
    staged.rewrite("pointwise")
    assert staged.error() == 0.0
    return staged


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str):
    function, meant = SPELLINGS[name]
    (region,) = found(function).regions()
    assert region.kind == "pointwise"
    factor = {"hard swish": 6.0}.get(name, 1.0)  # a multiple at the end stays outside: it has a rule
    if name != "root":
        value, slope = grid_moments(meant, 0.8)
        assert gaussian_moments(region, 0.8) == pytest.approx((factor * value, factor * slope), rel=2e-3)


#: what regions are called
NAMES = {
    "GELU with tanh": "gelu", "GELU with erf": "gelu", "quick GELU": "quick_gelu", "SiLU": "silu", "mish": "mish",
    "softplus": "softplus", "squared ReLU": "squared_relu", "x + relu(x)": "pointwise(relu)",
    "root": "pointwise(abs, pow)", "hard swish": "pointwise(relu6)",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_regions_bear_the_names_of_known_functions(name: str):
    (region,) = found(SPELLINGS[name][0]).regions()
    assert region.facts["name"] == NAMES[name]


def test_gelu_counts_the_same_in_every_spelling():
    """The paper declares 1/√2; tracked scales integrate the function, and the spellings differ by their values only."""
    for convention, close in (("paper", 1e-12), ("tracked", 1e-3)):
        targets = [
            [leaf.target for leaf in convert(Mlp(f), (X,), convention=convention).leaves]
            for f in (F.gelu, gelu_tanh, SPELLINGS["GELU with erf"][0])
        ]
        assert targets[1] == pytest.approx(targets[0], rel=close) == targets[2]


class Mlp(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.up, self.down, self.function = nn.Linear(16, 32), nn.Linear(32, 16), function

    def forward(self, x):
        return self.down(self.function(self.up(x)))


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_one_scalar_function_stays(name: str):
    staged = stage(OTHERS[name], X)
    before = staged.targets()
    assert staged.rewrite("pointwise") == {"pointwise": 0}
    assert staged.targets() == before


def test_a_residual_ends_a_region():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            return x + gelu_tanh(self.linear(x))

    staged = found(Block())
    assert staged.kinds() == ["pointwise"]
    (call,) = (n for n in staged.module.graph.nodes if n.op == "call_module")
    assert call.args[0].target is torch.ops.aten.linear.default
    assert [user.target for user in call.users] == [torch.ops.aten.add.Tensor]


def test_a_gate_of_two_projections_stays_a_product():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            a = self.a(x)
            return a * torch.sigmoid(a) * self.b(x)

    staged = found(Gated())
    assert staged.kinds() == ["pointwise"]
    assert torch.ops.aten.mul.Tensor in staged.targets()


def test_a_value_inside_with_another_user():
    def function(x):
        r = torch.relu(x)
        return torch.tanh(r), r.mean(-1)

    staged = found(function)
    assert staged.kinds() == ["pointwise"]
    assert torch.ops.aten.relu.default in staged.targets()  # stays for the mean


def test_functions_of_functions_are_one_region():
    assert found(lambda x: torch.tanh(torch.sigmoid(x) * x) * x).kinds() == ["pointwise"]


def test_two_signals_give_two_regions():
    staged = found(lambda x, y: gelu_tanh(x) + gelu_tanh(y), X, X.flip(0))
    assert staged.kinds() == ["pointwise", "pointwise"]


def test_functions_of_weights_and_constants_are_not_touched():
    class Decay(nn.Module):
        def __init__(self):
            super().__init__()
            self.log = nn.Parameter(torch.zeros(16))

        def forward(self, x):
            return x * torch.exp(-torch.exp(self.log)) * (MASK * torch.sigmoid(MASK))

    assert found(Decay()).kinds() == []


def test_products_only():
    """What the paper's convention asks for: chains and sums stay, functions of functions multiplied do not."""
    staged = stage(lambda x: torch.tanh(torch.relu(x)) + x, X)
    assert fuse_pointwise(staged.module, staged.flow(), rules=ATEN, products_only=True) == 0
    staged = stage(gelu_tanh, X)
    assert fuse_pointwise(staged.module, staged.flow(), rules=ATEN, products_only=True) == 1

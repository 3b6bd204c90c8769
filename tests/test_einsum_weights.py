"""Weights in einsums: the atom's norm is that of the map from the other operand, found as a matrix by its Jacobian."""

import math

import pytest
import torch
from torch import Tensor, nn

from modnorm_fx import convert
from modnorm_fx.errors import WeightError

#: equation, shape of the activation, shape of the weight, and the labels that the two share in the result
CASES = {
    "heads": ("bld,dhk->blhk", (2, 3, 8), (8, 2, 5), ""),
    "heads merged": ("blhk,dhk->bld", (2, 3, 2, 5), (8, 2, 5), ""),
    "heads first": ("ibh,hnd->ibnd", (3, 2, 8), (8, 2, 5), ""),
    "spread inputs": ("blhk,hdk->bld", (2, 3, 2, 5), (2, 8, 5), ""),
    "one matrix per head": ("blhk,hkm->blhm", (2, 3, 4, 5), (4, 5, 6), "h"),
    "experts, out first": ("ebd,eod->ebo", (3, 2, 5), (3, 7, 5), "e"),
    "a vector per head": ("blhk,hk->blh", (2, 3, 4, 5), (4, 5), "h"),
    "any positions": ("...d,do->...o", (2, 3, 8), (8, 5), ""),
}


class Layer(nn.Module):
    def __init__(self, equation: str, shape: tuple[int, ...]):
        super().__init__()
        self.equation = equation
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, self.weight)


def induced(layer: Layer, shape: tuple[int, ...], shared: str) -> float:
    """√(in/out)·σ of the map at one position; the largest over what x and the weight share."""
    term = layer.equation.split(",")[0].replace("...", "XY")
    own = layer.equation.split(",")[1].split("->")[0]
    positions = [1 if label not in own else n for label, n in zip(term, shape, strict=True)]
    x = torch.zeros(positions)
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v).flatten(), x).flatten(1).detach()
    pieces = math.prod(n for label, n in zip(term, shape, strict=True) if label in shared)
    out, into = (n // pieces for n in jacobian.shape)
    return math.sqrt(into / out) * float(torch.linalg.matrix_norm(jacobian, 2))


@pytest.mark.parametrize("name", CASES)
def test_the_norm_is_that_of_the_map(name: str):
    equation, shape, weight, shared = CASES[name]
    layer = Layer(equation, weight)
    (leaf,) = convert(layer, (torch.randn(shape),), unknown="error").leaves
    assert leaf.atom.is_matrix and leaf.scale == pytest.approx(1.0)
    value = leaf.atom.norm(layer.weight.detach())
    assert float(value) == pytest.approx(induced(layer, shape, shared), rel=1e-4)
    step = torch.randn(weight)
    leaf.atom.dualize_(step, 1.0)
    assert float(leaf.atom.norm(step)) == pytest.approx(1.0, rel=1e-3)


def test_a_weight_without_sums_is_a_factor():
    (leaf,) = convert(Layer("bld,d->bld", (8,)), (torch.randn(2, 3, 8),)).leaves
    assert type(leaf.atom).__name__ == "Gain"


def test_a_diagonal_is_refused():
    with pytest.raises(WeightError, match="repeated in an einsum"):
        convert(Layer("bld,dd->bld", (8, 8)), (torch.randn(2, 3, 8),), unknown="error")


class Routed(nn.Module):
    """A matrix per expert for every token, experts before the tokens in the result."""

    def __init__(self, heads: bool):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.heads = heads
        self.up = nn.Parameter(torch.randn(4, 8, 6, generator=g))
        self.down = nn.Parameter(torch.randn(4, 6, 8, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("btd,edf->ebtf", x, self.up).relu()
        return torch.einsum("ebtf,efd->btd" if self.heads else "ebtf,efd->ebtd", hidden, self.down)


@pytest.mark.parametrize("heads", (False, True))
def test_what_a_later_product_keeps_apart_are_experts(heads: bool):
    """Against the Jacobian of one expert, or of all heads, which the next layer joins."""
    net = Routed(heads)
    leaf = next(leaf for leaf in convert(net, (torch.randn(2, 3, 8),), unknown="error").leaves if leaf.key == "up")
    maps = net.up.detach().mT  # [e, f, d]
    pieces = [maps.flatten(0, 1)] if heads else list(maps)
    found = max(math.sqrt(8 / len(m)) * float(torch.linalg.matrix_norm(m, 2)) for m in pieces)
    assert float(leaf.atom.norm(net.up.detach())) == pytest.approx(found, rel=1e-4)

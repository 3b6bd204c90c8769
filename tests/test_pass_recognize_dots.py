"""A product that is summed is a matrix product: where it fires, that it keeps the numbers, and which norm it gives."""

import math

import pytest
import torch
from staged import With, stage
from torch import Tensor, nn

import modnorm_fx as mn

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))

#: function of the model and x, shape of w, atom
FIRES = {
    "one output": (lambda m, x: (x * m.w).sum(-1), (6,), "Linear"),
    "kept axis": (lambda m, x: (m.w * x).sum(-1, keepdim=True), (6,), "Linear"),
    "one per head": (lambda m, x: (x * m.w).sum(dim=-1), (1, 4, 6), "Experts"),
    "written out": (lambda m, x: (x.unsqueeze(-2) * m.w).sum(-1), (5, 6), "Linear"),
    "transposed": (lambda m, x: (x.unsqueeze(-1) * m.w).sum(-2), (6, 5), "Linear"),
    "two axes": (lambda m, x: (x * m.w).sum((-2, -1)), (4, 6), "Linear"),
}
LEAVES = {
    "no parameter": lambda m, x: (x * x.exp()).sum(-1) + m.w.sum(),
    "used elsewhere": lambda m, x: (p := x * m.w).sum(-1, keepdim=True) + p,
    "positions": lambda m, x: (x * m.w).sum(0),
    "no product": lambda m, x: (x + m.w).sum(-1),
    "a number": lambda m, x: x + (m.w * 2).sum(),
    "a number first": lambda m, x: x + (0.5 * m.w).sum(0),
    "through a function": lambda m, x: (x * m.w.exp()).sum(-1),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires_and_keeps_the_numbers(name: str):
    function, shape, kind = FIRES[name]
    staged = stage(With(function, w=shape), X)
    assert staged.rewrite("dots")["dots"] == 1
    assert staged.error() < 1e-5
    (weight,) = staged.typed().values()
    atom = weight.uses[0][2]
    assert kind in (atom.kind, getattr(getattr(atom, "inner", None), "kind", ""))


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_others_alone(name: str):
    assert stage(With(LEAVES[name], w=(6,)), X).rewrite("dots")["dots"] == 0


@pytest.mark.parametrize("name", FIRES)
def test_the_norm_is_that_of_the_map(name: str):
    """√(in/out)·σ of the Jacobian at one position, and of one head if each has its own."""
    function, shape, kind = FIRES[name]
    model = With(function, w=shape)
    (leaf,) = mn.convert(model, (X,)).leaves
    assert leaf.scale == pytest.approx(1.0)
    row = torch.zeros(1, *X.shape[1:])
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x), row).detach()
    if name == "two axes":
        found = math.sqrt(24) * float(jacobian.norm())
    else:
        blocks = [jacobian.reshape(4, -1, 4, 6)[h, :, h] for h in range(4)]
        found = max(math.sqrt(6 / len(b)) * float(torch.linalg.matrix_norm(b, 2)) for b in blocks)
    assert float(leaf.atom.norm(model.w.detach())) == pytest.approx(found, rel=1e-4)


class Mixed(nn.Module):
    """Differential attention's λ: exp(q·k) of two parameters."""

    def __init__(self, width: int):
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)
        self.q, self.k = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (self.q * self.k).sum().exp()


def test_a_product_of_two_parameters_is_as_large_as_declared():
    """At most 1 for parameters of their declared norms, whatever the width, and 1 where one points along the other."""
    small, large = (mn.convert(Mixed(width), (torch.randn(2, 8),)) for width in (16, 1024))
    for key in small.targets:
        assert large.targets[key] == pytest.approx(small.targets[key], rel=1e-6)
    net = Mixed(1024)
    large.initialize_(net, torch.Generator().manual_seed(0))
    leaves = {leaf.key: leaf for leaf in large.leaves}
    with torch.no_grad():
        net.k.copy_(net.q / 1024)
    assert [float(leaves[key].atom.norm(getattr(net, key).detach())) for key in "qk"] == pytest.approx([1, 1], rel=1e-4)
    assert float((net.q * net.k).sum().detach()) == pytest.approx(1.0, rel=1e-4)

"""``x / sum(x)`` as one call: where it fires, that it keeps the numbers, and what it is for."""

import pytest
import torch
from staged import stage

import modnorm_fx as mn
from modnorm_fx.rules import Region

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def shares(function, *args) -> int:
    staged = stage(function, *(args or (X,)))
    staged.rewrite("shares")
    assert staged.error() < 1e-6
    return sum(isinstance(region, Region) and region.kind == "shares" for region in staged.regions())


FIRES = {
    "plain": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    "of one value": lambda x: (p := x.exp()) / p.sum(-1, keepdim=True),
    "epsilon": lambda x: (p := x.sigmoid()) / (p.sum(-1, keepdim=True) + 1e-6),
    "clamped": lambda x: (p := x.sigmoid()) / p.sum(1, keepdim=True).clamp_min(1e-9),
    "unsqueezed": lambda x: (p := x.sigmoid()) / p.sum(-1).unsqueeze(-1),
    "in-between cast": lambda x: (p := x.sigmoid()) / p.double().sum(-1, keepdim=True).float(),
}
LEAVES = {
    "another sum": lambda x: x / x.exp().sum(-1, keepdim=True),
    "saturation": lambda x: (p := x.exp()) / (p.sum(-1, keepdim=True) + 1.0),
    "no sum": lambda x: x.exp() / (x.exp() + 1e-3),
}


@pytest.mark.parametrize("name", [name for name in FIRES if name != "plain"])
def test_fires(name):
    assert shares(FIRES[name]) == 1


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_others_alone(name):
    assert shares(LEAVES[name]) == 0


def test_several_users_and_several_in_a_row():
    def sinkhorn(x):
        p = x.exp()
        for _ in range(3):
            p = p / p.sum(-1, keepdim=True)
            p = p / p.sum(-2, keepdim=True)
        return p + p.sum(-1, keepdim=True)

    assert shares(sinkhorn) == 6


class Sinkhorn(torch.nn.Module):
    def __init__(self, rounds: int):
        super().__init__()
        self.into, self.out, self.rounds = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), rounds

    def plan(self, x):
        p = x.sigmoid()
        for _ in range(self.rounds):
            p = p / p.sum(-1, keepdim=True)
            p = p / p.sum(-2, keepdim=True)
        return p

    def forward(self, x):
        return self.out(self.plan(self.into(x)))


def test_rounds_after_the_first_change_next_to_nothing():
    few, many = Sinkhorn(1), Sinkhorn(20)
    sizes = [torch.autograd.functional.jacobian(net.plan, X[0, :4, :4]).norm() for net in (few, many)]
    assert float(sizes[1] / sizes[0]) == pytest.approx(1, rel=0.1)
    targets = [mn.convert(net, (torch.randn(2, 6, 6),)).targets for net in (few, many)]
    assert targets[1] == pytest.approx(targets[0], rel=0.1)

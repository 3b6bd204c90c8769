"""Products with stacks of parameters: taken apart, same numbers, each piece the matrix that it is."""

import math

import pytest
import torch
from staged import stage
from torch import Tensor, nn

import modnorm_fx as mn

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Four experts whose weights are stacked for the product."""

    def __init__(self, how: str):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.up = nn.ModuleList(nn.Linear(8, 16, bias=False) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(16, 8, bias=False) for _ in range(4))
        self.router = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (torch.stack([e.weight for e in some]) for some in (self.up, self.down))
        gate = self.router(x).softmax(-1)
        if self.how == "einsum":
            hidden = torch.einsum("btd,efd->btef", x, up).relu()
            return torch.einsum("btef,edf,bte->btd", hidden, down, gate)
        if self.how == "experts first":
            hidden = torch.einsum("btd,efd->ebtf", x, up).relu()
            return torch.einsum("ebtf,edf,bte->btd", hidden, down, gate)
        if self.how == "bmm":
            tokens = x.flatten(0, 1).expand(4, -1, -1)
            out = torch.bmm(torch.bmm(tokens, up.mT).relu(), down.mT)
            return (out * gate.flatten(0, 1).T[..., None]).sum(0).view_as(x)
        tokens = x.flatten(0, 1)
        out = (torch.stack([e.weight.T for e in self.up]).mT @ tokens.T).relu()
        return (torch.stack([e.weight for e in self.down]) @ out).sum(0).T.reshape(x.shape) * gate.sum(-1, keepdim=True)


@pytest.mark.parametrize("how", ("einsum", "experts first", "bmm", "matmul"))
def test_every_expert_is_a_layer(how: str):
    net = Experts(how)
    staged = stage(net, X)
    assert staged.rewrite("stacked")["stacked"] >= 1 and staged.error() < 1e-5
    norm = mn.convert(net, (X,), unknown="error")
    kinds = {leaf.key: leaf.atom.kind for leaf in norm.leaves}
    assert {kinds[f"{name}.{i}.weight"] for name in ("up", "down") for i in range(4)} == {"Linear"}
    leaf = next(leaf for leaf in norm.leaves if leaf.key == "down.2.weight")
    weight = net.down[2].weight.detach()
    found = math.sqrt(16 / 8) * float(torch.linalg.matrix_norm(weight, 2))
    assert float(leaf.atom.norm(weight)) == pytest.approx(found, rel=1e-4)


def test_others_stay():
    class Data(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            y = self.layer(x)
            return torch.einsum("ebtd,btd->ebt", torch.stack([y, y.exp()]), x)

    assert stage(Data(), X).rewrite("stacked")["stacked"] == 0

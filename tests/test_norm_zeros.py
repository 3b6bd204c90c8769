"""What `initialize_` does with weights that are zero: a choice of the model's author, or memory that nobody wrote."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import modnorm_fx as mn


def test_initialisation_leaves_branches_that_start_at_zero() -> None:
    """timm's ResNets start the last gain of a residual branch at zero; a class token at zero is drawn all the same."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 8))
            self.up, self.norm, self.down = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
            nn.init.zeros_(self.norm.weight)
            nn.init.zeros_(self.down.weight)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([x, self.token])
            return x + self.norm(self.up(x)) + self.down(x)

    net = Net()
    mn.convert(net, (torch.randn(4, 8),)).initialize_(net, torch.Generator().manual_seed(0))
    assert not net.norm.weight.any() and not net.down.weight.any()
    assert net.token.any() and torch.linalg.matrix_norm(net.up.weight.detach(), 2).item() == pytest.approx(1.0)


def test_a_model_that_nobody_initialised_is_drawn_whole() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    norm = mn.convert(net, (torch.randn(4, 8),))
    for p in net.parameters():
        nn.init.zeros_(p)
    norm.initialize_(net, torch.Generator().manual_seed(0))
    assert torch.linalg.matrix_norm(net[0].weight.detach(), 2).item() == pytest.approx(1.0)
    assert torch.equal(net[1].weight.detach(), torch.ones(8))

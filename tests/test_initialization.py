"""What `initialize_` leaves as it is: what is zero (a choice of the model's author, or memory that nobody wrote), what
is frozen, and rows for padding."""

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


class Frozen(nn.Module):
    """Sinusoids that are a frozen parameter (as in Whisper) and a pretrained layer below a new head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 16, padding_idx=3)
        angles = torch.arange(16.0) * torch.arange(6.0)[:, None] / 7
        self.places = nn.Parameter(angles.sin(), requires_grad=False)
        self.pretrained = nn.Linear(16, 16).requires_grad_(False)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.pretrained(self.words(ids) + self.places)))


@pytest.mark.parametrize("change", ["initialize_", "project_"])
def test_what_is_frozen_stays(change: str, caplog: pytest.LogCaptureFixture) -> None:
    net = Frozen()
    norm = mn.convert(net, (torch.randint(0, 10, (2, 6)),))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(50.0)  # nothing is within its norm
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with caplog.at_level("INFO", logger="modnorm_fx"):
        getattr(norm, change)(net)
    changed = {name for name, p in net.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert {"words.weight", "head.weight"} <= changed <= {"words.weight", "head.weight", "head.bias"}
    assert "places, pretrained.weight" in caplog.text


def test_a_frozen_model_is_refused() -> None:
    net = Frozen()
    norm = mn.convert(net, (torch.randint(0, 10, (2, 6)),))
    with pytest.raises(mn.ModnormError, match="frozen"):
        norm.initialize_(net.requires_grad_(False))


def test_rows_for_padding_are_zero_as_torch_has_them() -> None:
    net = Frozen()
    mn.convert(net, (torch.randint(0, 10, (2, 6)),)).initialize_(net)
    rows = net.words.weight.detach().norm(dim=1)
    assert rows[3] == 0 and (rows > 0).sum() == 9


def test_rows_for_padding_of_tables_that_are_not_drawn_stay() -> None:
    net = Frozen()
    net.other = nn.Embedding(4, 2, padding_idx=1)
    with pytest.warns(UserWarning, match="other.weight"):
        norm = mn.convert(net, (torch.randint(0, 10, (2, 6)),))
    net.words.requires_grad_(False)
    for table in (net.words, net.other):
        nn.init.ones_(table.weight)
    norm.initialize_(net)
    assert (net.words.weight == 1).all() and (net.other.weight == 1).all()

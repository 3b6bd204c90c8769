"""Cells written out: the same numbers, a matrix per gate, and gains that hold over a loop in time."""

import math
import warnings

import pytest
import torch
from modnorm_fx.passes.unfold_cells import unfold_cells
from staged import stage
from torch import nn

import modnorm_fx as mn
from modnorm_fx.tree import allot

WIDTH = 32
aten = torch.ops.aten


class Loop(nn.Module):
    """A cell called at every time step, and a head on all of its states."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], WIDTH)
        state, states = (h, h) if isinstance(self.cell, nn.LSTMCell) else h, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            states.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(states, 1))


CELLS = {
    "lstm": lambda **o: nn.LSTMCell(WIDTH, WIDTH, **o),
    "gru": lambda **o: nn.GRUCell(WIDTH, WIDTH, **o),
    "tanh": lambda **o: nn.RNNCell(WIDTH, WIDTH, **o),
    "relu": lambda **o: nn.RNNCell(WIDTH, WIDTH, nonlinearity="relu", **o),
}


def converted(model: nn.Module, length: int):
    x = torch.randn(4, length, WIDTH, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mn.convert(model, (x,)), x


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("kind", CELLS)
def test_cells_become_equations_of_the_same_numbers(kind, bias):
    torch.manual_seed(0)
    staged = stage(Loop(CELLS[kind](bias=bias)), torch.randn(2, 3, WIDTH))
    assert unfold_cells(staged.module) == 3
    staged.module.graph.lint()
    staged.module.recompile()
    assert not [t for t in staged.targets() if "_cell" in str(t)]
    assert staged.error() < 1e-6


def test_other_ops_are_left_alone():
    staged = stage(nn.LSTM(WIDTH, WIDTH), torch.randn(3, 2, WIDTH))
    assert unfold_cells(staged.module) == 0
    assert aten.lstm.input in staged.targets()


@pytest.mark.parametrize("kind, gates", [("lstm", 4), ("gru", 3), ("tanh", 1)])
def test_each_gate_is_a_linear_layer(kind, gates):
    norm, _ = converted(Loop(CELLS[kind]()), 3)
    found = [leaf for leaf in norm.leaves if leaf.weight.startswith("cell.weight")]
    assert len(found) == 2 * gates
    assert {leaf.atom.describe() for leaf in found} == {"Linear 32→32"}
    assert {leaf.status for leaf in norm.leaves} == {"rules"}


@pytest.mark.parametrize("kind", ("lstm", "gru", "tanh"))
def test_uses_of_one_weight_add_in_quadrature(kind):
    """The change of the output by a random change of norm 1, relative to the output; a linear sum is 2.8 times that."""
    model = Loop(CELLS[kind]())
    norm, x = converted(model, 8)
    norm.initialize_(model, generator=torch.Generator().manual_seed(1))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        y = model(x)
        for leaf in norm.leaves:
            uses = [part.gain for part in allot(norm.tree, norm.convention) if part.node.key == leaf.key]
            gain = math.sqrt(sum(g * g for g in uses))
            assert leaf.target == pytest.approx(math.sqrt(leaf.mass / norm.mass) / gain)
            if not leaf.weight.startswith("cell.weight"):
                continue
            squares, part = [], leaf.read(parameters[leaf.weight])
            for seed in range(4):
                step = torch.zeros_like(part)
                leaf.atom.initialize_(step, 1.0, torch.Generator().manual_seed(seed))
                part.add_(step, alpha=1e-3)
                squares.append(float(((model(x) - y) / 1e-3).square().mean() / y.square().mean()))
                part.sub_(step, alpha=1e-3)
            assert math.sqrt(sum(squares) / 4) == pytest.approx(gain, rel=0.3), leaf.key

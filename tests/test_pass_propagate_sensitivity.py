"""The reverse sweep against all paths written out."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from modnorm_fx.passes.propagate_sensitivity import output_nodes
from random_nets import CONVENTIONS, Net, expected_gains, facts, programs
from staged import With
from torch import nn

import modnorm_fx as mn
from modnorm_fx.conventions import PAPER, TRACKED


@settings(max_examples=10, deadline=None)
@given(programs)
def test_gains_are_sums_over_paths(program):
    for convention in CONVENTIONS:
        found = facts(Net(program), convention)
        gains = {key: gain for (key, use), gain in found.sensitivities.gains.items()}
        assert gains == pytest.approx(expected_gains(program, convention))


def test_several_outputs_add_up_each_relative_to_its_scale():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8, bias=False)

        def forward(self, x):
            y = self.first(x)
            return 3 * y, {"half": 0.5 * y, "again": 3 * y, "tokens": y.argmax(-1)}

    for convention, expected in ((PAPER, 3 + 0.5 + 3), (TRACKED, 3**0.5)):
        found = facts(Two(), convention)
        assert found.sensitivities.gains["first.weight", 0] == pytest.approx(expected)


def test_an_output_that_is_returned_twice_counts_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    staged = facts(model, TRACKED).staged
    assert len(output_nodes(staged.module.graph, staged.flow())) == 1

    class Twice(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y, y

    found = facts(Twice(nn.Linear(8, 8, bias=False)), TRACKED)
    assert found.sensitivities.gains["0.weight", 0] == pytest.approx(1.0)


@pytest.mark.parametrize("depth", [1, 8, 48])
def test_a_pre_norm_trunk(depth: int):
    """s_l = √(1 + l), S_l = 1/s_l before every branch: the products telescope (theory, section 3)."""

    class Trunk(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(8, 8, bias=False)
            self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(depth))

        def forward(self, x):
            x = self.stem(x)
            for layer in self.layers:
                x = x + layer(nn.functional.layer_norm(x, (8,)))
            return nn.functional.layer_norm(x, (8,))

    gains = facts(Trunk(), TRACKED).sensitivities.gains
    assert gains["stem.weight", 0] == pytest.approx(1.0)
    for i in range(depth):
        assert gains[f"layers.{i}.weight", 0] == pytest.approx((i + 2) ** -0.5)
    linear = facts(Trunk(), PAPER).sensitivities.gains
    assert linear["stem.weight", 0] == pytest.approx(2.0**depth)


def test_a_dead_branch_has_no_sensitivity():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.dead = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x), self.dead(x).sign()

    gains = facts(Dead(), TRACKED).sensitivities.gains
    assert {key for (key, _), gain in gains.items() if gain > 0} == {"used.weight", "used.bias"}
    assert {gain for (key, _), gain in gains.items() if key.startswith("dead")} == {0.0}


@pytest.mark.parametrize("layers", [1, 4])
def test_effects_that_grow_with_every_layer_are_named(layers: int):
    """``sin(20 y)`` is chaotic, so that here they do: as autograd has it for a small change of the first weight."""

    def waves(s, x):
        y = s.a(x)
        for _ in range(layers):
            y = torch.sin(20 * y)
        return s.b(y)

    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = With(waves, a=nn.Linear(16, 16, bias=False), b=nn.Linear(16, 16, bias=False)).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        norm = mn.convert(model, (x,))
    norm.initialize_(model, torch.Generator().manual_seed(0))
    change = torch.randn(16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    change /= torch.linalg.matrix_norm(change, 2)

    def output(weight):
        return torch.func.functional_call(model, {"a.weight": weight}, (x,))

    _, moved = torch.func.jvp(output, (model.a.weight.detach(),), (change,))
    grown = float(moved.norm() / output(model.a.weight.detach()).norm()) > 1e3
    named = [str(w.message) for w in caught if "times as far as a.weight" in str(w.message)]
    assert grown == (layers == 4) and len(named) == grown

"""Constants of the graph are evaluated; buffers, inputs and masks are not; noise is the same every time."""

import math

import pytest
import torch
from modnorm_fx.passes import measure_constants as module
from modnorm_fx.passes.measure_constants import measure_constants
from staged import With, stage
from torch import nn

X = torch.randn(2, 6, 16)


def measured(function, **own) -> list[float]:
    staged = stage(With(lambda s, x: function(s, s.linear(x)), linear=nn.Linear(16, 16), **own), X)
    return list(measure_constants(staged.module, staged.flow()).values())


@pytest.mark.parametrize("function, expected", [
    (lambda s, y: y * torch.full((16,), -3.0), 3.0),
    (lambda s, y: y + torch.arange(16).float(), math.sqrt(sum(i * i for i in range(16)) / 16)),
    (lambda s, y: y + torch.arange(6)[:, None] / 6, math.sqrt(sum(i * i for i in range(6)) / 6) / 6),
    (lambda s, y: y * torch.ones_like(y) * 2, 1.0),
    (lambda s, y: y + y.new_full((16,), 0.25), 0.25),
    (lambda s, y: y + torch.zeros(16), 0.0),
    (lambda s, y: y + torch.empty(16), 0.0),  # whatever is in memory is not the same every time
    (lambda s, y: y + torch.empty_like(y), 0.0),
    (lambda s, y: y + y.new_empty(16) * 3, 0.0),
    (lambda s, y: y * torch.arange(16), math.sqrt(sum(i * i for i in range(16)) / 16)),
    (lambda s, y: y * (torch.arange(16) < 4), 0.5),
    (lambda s, y: y * torch.linspace(-1, 1, 16).cos(), float(torch.linspace(-1, 1, 16).cos().square().mean().sqrt())),
])  # fmt: skip
def test_constants(function, expected):
    assert measured(function) == [pytest.approx(expected)]


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, -1e9])
def test_masks_are_left_out(low):
    assert measured(lambda s, y: y + torch.full((6, 16), low).triu(1)) == [0.0]


def test_buffers_are_not_read():
    model = With(lambda s, x: s.linear(x) * s.table.exp(), linear=nn.Linear(16, 16))
    model.register_buffer("table", torch.ones(16))
    staged = stage(model, X)
    assert measure_constants(staged.module, staged.flow()) == {}


def test_only_what_a_signal_reads_is_evaluated():
    assert len(measured(lambda s, y: y + (torch.arange(16).float() / 16).sin())) == 1


def test_large_constants_are_not_evaluated(monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 10)
    assert measured(lambda s, y: y + torch.arange(16).float()) == []


@pytest.mark.parametrize("noise", [lambda y: torch.randn(4, 6, 16).mean(0), torch.randn_like, torch.rand_like])
def test_noise_is_the_same_noise_every_time(noise):
    torch.manual_seed(0)
    first = measured(lambda s, y: y + noise(y))
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    staged = stage(With(lambda s, x: s.linear(x) + noise(x), linear=nn.Linear(16, 16)), X)
    assert list(measure_constants(staged.module, staged.flow()).values()) == first
    del state


def test_the_users_random_numbers_are_not_touched():
    staged = stage(With(lambda s, x: s.linear(x) + torch.randn(16), linear=nn.Linear(16, 16)), X)
    flow = staged.flow()
    state = torch.random.get_rng_state()
    measure_constants(staged.module, flow)
    assert torch.equal(torch.random.get_rng_state(), state)

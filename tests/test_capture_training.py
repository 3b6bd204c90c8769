"""Capture of what only training reaches, or what chance, data and strides decide: the graph has all of it."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from modnorm_fx.models_zoo import build, coverage
from tiny_models import IDS, X, assert_same_outputs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from modnorm_fx import _copies, convert
from modnorm_fx.capture import capture


class Masked(nn.Module):
    """Training puts a learned vector in some places, which Python draws (wav2vec 2.0), and it may leave out layers."""

    layerdrop: float

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.mask = nn.Parameter(torch.randn(4))
        self.layerdrop = 0.9

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            places = torch.zeros(x.shape[:-1], dtype=torch.bool)
            places[random.randrange(2)] = True
            x = x.clone()
            x[places] = self.mask
        for layer in (self.first, self.second):
            if not (self.training and torch.rand([]) < self.layerdrop):
                x = F.dropout(layer(x), 0.5, self.training)
        return x


def test_parameters_that_only_training_uses_are_found_by_running_it() -> None:
    model = Masked()
    state = random.getstate(), torch.get_rng_state()
    captured = capture(model, (X,))
    assert (captured.route, captured.unused) == ("make_fx(train)", ())
    assert (random.getstate(), model.layerdrop) == (state[0], 0.9) and torch.equal(torch.get_rng_state(), state[1])
    _copies.keep_layers(model)
    with coverage._NoDropout(), torch.no_grad():
        _copies.seed()
        expected = model.train()(X)
        torch.testing.assert_close(captured(model, X)[0], expected)
    assert {leaf.weight for leaf in convert(model, (X,)).leaves} == dict(model.named_parameters()).keys()


def test_the_same_draws_whatever_was_drawn_before() -> None:
    graphs = []
    for number in range(3):
        random.seed(number)
        torch.manual_seed(number)
        graphs.append(capture(Masked(), (X,)).graph_module.code)
    assert graphs[0] == graphs[1] == graphs[2]


def test_no_dropout() -> None:
    x, heads = torch.randn(3, 4), torch.randn(1, 2, 6, 4)
    attention = nn.MultiheadAttention(4, 2, dropout=0.5)
    with coverage._NoDropout():
        assert torch.equal(F.dropout(x), x) and torch.equal(nn.Dropout2d()(heads), heads)
        assert torch.equal(torch.ops.aten.dropout.default(x, 0.5, True), x)
        found = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5)
        again = torch.ops.aten.scaled_dot_product_attention.default(heads, heads, heads, None, 0.5)
        trained = attention.train()(heads[0], heads[0], heads[0])[0]
    assert torch.equal(found, F.scaled_dot_product_attention(heads, heads, heads)) and torch.equal(again, found)
    torch.testing.assert_close(trained, attention.eval()(heads[0], heads[0], heads[0])[0])


def test_a_failed_route_leaves_no_traced_tensor_to_the_next() -> None:
    @functools.lru_cache
    def positions(length: int) -> Tensor:
        return torch.arange(length) / length

    class Positions(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x + positions(x.shape[-1]))
            return x if x.sum() > 0 else -x  # cannot be exported

    model = Positions(4, 4)
    captured = capture(model, (X,))
    assert captured.route == "make_fx(eval)"
    assert not any(isinstance(value, FakeTensor) for value in captured.constants.values())
    assert_same_outputs(captured, model, (X,), {})


@pytest.mark.parametrize("name", ["mixtral", "openai_privacy_filter"])
def test_all_experts_are_in_the_graph(name: str) -> None:
    model = build(f"hf:{name}-tiny").eval()
    model.set_experts_implementation("eager")  # a loop over the experts that the tokens choose
    captured = capture(model, kwargs={"input_ids": IDS[:1, :2] % 100})
    assert (captured.route, captured.unused) == ("export(eval)", ())
    assert model.config._experts_implementation == "eager"
    assert_same_outputs(captured, model, (), {"input_ids": IDS[:1, :2] % 100})
    leaves = convert(model, kwargs={"input_ids": IDS[:1, :2] % 100}).leaves
    covered = sum(
        leaf.atom.shape[0] * leaf.atom.shape[1] * leaf.atom.shape[2] for leaf in leaves if len(leaf.atom.shape) == 3
    )
    assert covered == sum(p.numel() for p in model.parameters() if p.dim() == 3)


def test_the_graph_runs_on_inputs_of_any_strides() -> None:
    class Rows(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(-1, 4))

    model, x = Rows(4, 4).requires_grad_(False), torch.randn(4, 2, 3)
    captured = capture(model, (x,))
    assert_same_outputs(captured, model, (x.permute(2, 0, 1).contiguous().permute(1, 2, 0),), {})

"""Softmax attention written out: scales, masks, casts and views on the way, and what is not attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from staged import Staged, stage
from torch import nn

G = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, 4, 6, 8, generator=G) for _ in range(3))
FLAT = tuple(t.reshape(8, 6, 8) for t in (Q, K, V))
HALF = tuple(t.bfloat16() for t in (Q, K, V))
SCALE = 8**-0.5
BLOCKED = torch.ones(6, 6).triu(1).bool()
MASK = torch.zeros(6, 6).masked_fill(BLOCKED, -math.inf)


def scores(q, k):
    return q @ k.transpose(-1, -2)


def bmm_with_views(q, k, v):
    logits = torch.bmm(q, k.transpose(1, 2)).view(2, 4, 6, 6) + MASK
    return torch.bmm(logits.view(8, 6, 6).softmax(-1), v)


#: spelling -> (function, factor of the logits inside, inputs)
SPELLINGS = {
    "scale after": (lambda q, k, v: (scores(q, k) * SCALE).softmax(-1) @ v, SCALE, (Q, K, V)),
    "divided": (lambda q, k, v: (scores(q, k) / 8**0.5).softmax(-1) @ v, SCALE, (Q, K, V)),
    "scale before": (lambda q, k, v: scores(q * SCALE, k).softmax(-1) @ v, 1.0, (Q, K, V)),
    "no scale": (lambda q, k, v: scores(q, k).softmax(-1) @ v, 1.0, (Q, K, V)),
    "mask added": (lambda q, k, v: (scores(q, k) * SCALE + MASK).softmax(-1) @ v, SCALE, (Q, K, V)),
    "mask, then scale": (lambda q, k, v: ((scores(q, k) + MASK) * SCALE).softmax(-1) @ v, SCALE, (Q, K, V)),
    "filled": (lambda q, k, v: (scores(q, k) * SCALE).masked_fill(BLOCKED, -1e9).softmax(-1) @ v, SCALE, (Q, K, V)),
    "where": (lambda q, k, v: torch.where(BLOCKED, -1e9, scores(q, k) * SCALE).softmax(-1) @ v, SCALE, (Q, K, V)),
    "softmax in float32": (
        lambda q, k, v: F.softmax(scores(q, k) * SCALE + MASK, -1, dtype=torch.float32).to(q.dtype) @ v, SCALE, HALF
    ),
    "dropout": (lambda q, k, v: F.dropout((scores(q, k) * SCALE).softmax(-1), 0.1, False) @ v, SCALE, (Q, K, V)),
    "bmm": (lambda q, k, v: torch.bmm((torch.bmm(q, k.mT) * SCALE).softmax(-1), v), SCALE, FLAT),
    "bmm with views": (bmm_with_views, 1.0, FLAT),
    "two factors": (lambda q, k, v: (scores(q, k) * SCALE / 2).softmax(-1) @ v, SCALE / 2, (Q, K, V)),
}  # fmt: skip
OTHERS = {
    "softmax over queries": lambda q, k, v: scores(q, k).softmax(-2) @ v,
    "no keys": lambda q, k, v: q[..., :6].softmax(-1) @ v,
    "sigmoid": lambda q, k, v: scores(q, k).sigmoid() @ v,
    "soft cap": lambda q, k, v: (50 * torch.tanh(scores(q, k) / 50)).softmax(-1) @ v,
    "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "averages on the right": lambda q, k, v: v.mT @ scores(q, k).softmax(-1),
}


class RelativeBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4, 6, 6))

    def forward(self, q, k, v):
        return (scores(q, k) * SCALE + self.bias).softmax(-1) @ v


def found(function, *inputs) -> Staged:
    staged = stage(function, *(inputs or (Q, K, V)))
    staged.rewrite("attention")
    assert staged.error() == 0.0
    return staged


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str):
    function, factor, inputs = SPELLINGS[name]
    staged = found(function, *inputs)
    (region,) = staged.regions()
    assert region.kind == "attention" and region.inputs[:3] == ("query", "key", "value")
    assert region.facts["scale"] == pytest.approx(factor)
    assert torch.ops.aten.softmax.int not in staged.targets()


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_plain_attention_stays(name: str):
    staged = stage(OTHERS[name], Q, K, V)
    before = staged.targets()
    assert staged.rewrite("attention") == {"attention": 0}
    assert staged.targets() == before


def test_a_learned_bias_stays_visible():
    assert found(RelativeBias()).kinds() == []


def test_weights_that_are_returned_stay_for_the_output():
    def function(q, k, v):
        weights = (scores(q, k) * SCALE).softmax(-1)
        return weights @ v, weights

    staged = found(function)
    assert staged.kinds() == ["attention"]
    assert torch.ops.aten.softmax.int in staged.targets()


def test_one_after_the_other():
    function = SPELLINGS["mask added"][0]
    staged = found(lambda q, k, v: function(function(q, k, v), k, v))
    assert staged.kinds() == ["attention", "attention"]


def test_two_readers_of_the_same_weights():
    def function(q, k, v):
        weights = (scores(q, k) * SCALE).softmax(-1)
        return weights @ v + weights @ torch.relu(v)

    assert found(function).kinds() == ["attention", "attention"]


def test_operands_are_the_products_own():
    staged = found(SPELLINGS["scale before"][0])
    (call,) = (n for n in staged.module.graph.nodes if n.op == "call_module")
    assert call.args[0].target is torch.ops.aten.mul.Tensor  # the query as it enters the product
    assert call.args[1].target is torch.ops.aten.transpose.int

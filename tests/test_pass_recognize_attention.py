"""Softmax attention written out: scales, masks, casts and views on the way, and what is not attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from staged import Staged, With, stage

from modnorm_fx.atoms import LogitBias, Scalar

G = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, 4, 6, 8, generator=G) for _ in range(3))
FLAT = tuple(t.reshape(8, 6, 8) for t in (Q, K, V))
HALF = tuple(t.bfloat16() for t in (Q, K, V))
SCALE = 8**-0.5
BLOCKED = torch.ones(6, 6).triu(1).bool()
MASK = torch.zeros(6, 6).masked_fill(BLOCKED, -math.inf)


def scores(q, k):
    return q @ k.transpose(-1, -2)


def less_the_largest(logits):
    return logits - logits.max(dim=-1, keepdim=True).values


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
    "baddbmm": (lambda q, k, v: torch.baddbmm(MASK, q, k.mT, beta=1, alpha=SCALE).softmax(-1) @ v, SCALE, FLAT),
    "einsum": (
        lambda q, k, v: torch.einsum(
            "bhij,bhjd->bihd", (torch.einsum("bhid,bhjd->bhij", q, k) * SCALE).softmax(-1), v
        ), SCALE, (Q, K, V),
    ),
    "values on the left": (lambda q, k, v: v.mT @ (scores(q, k) * SCALE).softmax(-1).mT, SCALE, (Q, K, V)),
    "less the largest": (lambda q, k, v: less_the_largest(scores(q, k) * SCALE).softmax(-1) @ v, SCALE, (Q, K, V)),
    "windows": (
        lambda q, k, v: (scores(q, k).view(2, 1, 4, 6, 6) * SCALE + MASK).view(-1, 4, 6, 6).softmax(-1) @ v,
        SCALE, (Q, K, V),
    ),
    "two factors": (lambda q, k, v: (scores(q, k) * SCALE / 2).softmax(-1) @ v, SCALE / 2, (Q, K, V)),
}  # fmt: skip
OTHERS = {
    "softmax over queries": lambda q, k, v: scores(q, k).softmax(-2) @ v,
    "no keys": lambda q, k, v: q[..., :6].softmax(-1) @ v,
    "sigmoid": lambda q, k, v: scores(q, k).sigmoid() @ v,
    "heads mixed": lambda q, k, v: (scores(q, k) * SCALE).roll(1, 1).softmax(-1) @ v,
    "times gates for each key": lambda q, k, v: (scores(q, k) * k.mean(-1)[:, :, None]).softmax(-1) @ v,
    "a last axis of other length": lambda q, k, v: scores(q, k).reshape(2, 4, 12, 3).softmax(-1) @ v[:, :, :3],
    "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "averages on the right": lambda q, k, v: v.mT @ scores(q, k).softmax(-1),
}


def relative_bias(own, q, k, v):
    return (scores(q, k) * SCALE + own.bias).softmax(-1) @ v


def scaled_relative_bias(own, q, k, v):
    """As DeBERTa has it: content and position are divided by one number."""
    return ((scores(q, k) + own.bias + q @ own.position) * SCALE).softmax(-1) @ v


def looked_up(own, q, k, v):
    """As Swin has it: a table of one bias per head and distance."""
    index = torch.arange(36) % 7
    table = own.bias[index].view(6, 6, 4).permute(2, 0, 1).unsqueeze(0)
    return (scores(q * SCALE, k) + table).softmax(-1) @ v


def sum_of_tables(own, q, k, v):
    """Learned numbers for rows and columns, added before they meet the logits."""
    return (scores(q, k) * SCALE + (own.bias.unsqueeze(-1) + own.position.sum() * k.mean())).softmax(-1) @ v


def sinks(own, q, k, v):
    """As GPT-OSS has it: a learned logit per head takes part in the softmax and is dropped."""
    logits = torch.cat([scores(q, k) * SCALE, own.bias.reshape(1, 4, 1, 1).expand(2, 4, 6, 1)], dim=-1)
    return less_the_largest(logits).softmax(-1)[..., :-1] @ v


def temperature(own, q, k, v):
    """As XCiT and Swin v2 have it: a learned number per head multiplies cosines."""
    cosines = scores(F.normalize(q, dim=-1), F.normalize(k, dim=-1))
    return (cosines * own.bias.clamp(max=4.6).exp().view(4, 1, 1)).softmax(-1) @ v


#: model -> (shape of its parameter, operands of the region after query, key, value, factor of the first, atom)
LEARNED = {
    "relative bias": (relative_bias, (4, 6, 6), ("bias",), 1.0, LogitBias),
    "scaled": (scaled_relative_bias, (4, 6, 6), ("bias", "bias1"), SCALE, LogitBias),
    "table": (looked_up, (7, 4), ("bias",), 1.0, LogitBias),
    "sum of tables": (sum_of_tables, (4, 6), ("bias",), 1.0, LogitBias),
    "sinks": (sinks, (4,), ("bias",), 1.0, LogitBias),
    "temperature": (temperature, (4,), ("temperature",), None, Scalar),
}


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


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_stays_an_operand(name: str):
    function, shape, operands, factor, atom = LEARNED[name]
    staged = found(With(function, bias=shape, position=(8, 6)), Q, K, V)
    (region,) = (r for r in staged.regions() if r.kind == "attention")
    assert region.inputs[3 : 3 + len(operands)] == operands
    assert region.facts["biases"].get("bias") == (pytest.approx(factor) if factor else None)
    ((_, operand, found_atom),) = staged.typed("sample")["bias"].uses
    assert isinstance(found_atom, atom) and (operand[0] in operands or name == "sum of tables")


@pytest.mark.parametrize("cap", [50.0, 0.5])
def test_a_soft_cap_bounds_the_logits(cap: float):
    staged = found(lambda q, k, v: (cap * torch.tanh(scores(q, k) * SCALE / cap)).softmax(-1) @ v)
    (region,) = staged.regions()
    assert region.facts["scale"] == pytest.approx(SCALE) and region.facts["cap"] == pytest.approx(cap)


def test_a_bias_of_several_sums():
    def function(q, k, v):
        return (scores(q, k) * SCALE + scores(q, k.roll(1, 2)).roll(1, -1) + MASK).softmax(-1) @ v

    staged = found(function)
    (region,) = staged.regions()
    assert region.inputs[:4] == ("query", "key", "value", "bias")
    assert torch.ops.aten.roll.default in staged.targets()  # the bias is computed outside


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

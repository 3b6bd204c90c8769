"""The fallback by running an op: against the table on ops that have a rule, and against closed forms."""

import math

import pytest
import torch
from modnorm_fx.passes.sample import SamplingError, sample
from op_calls import Example, T, W, build
from torch import fx, nn

from modnorm_fx import ATEN
from modnorm_fx.rules import operands

aten = torch.ops.aten
BIG = T((64, 64), 0.7)


def sampled(op, example: Example):
    call, specs = build(op, example)
    module = fx.GraphModule(nn.Module(), call.node.graph)
    for node in specs:
        node.meta["val"] = node.meta["val"].float()
    return call, sample(module, call, [o for o, n in operands(call.args) if n in specs])


KNOWN = {
    "gelu": (aten.gelu.default, Example((BIG,))),
    "relu": (aten.relu.default, Example((BIG,))),
    "sum": (aten.sum.dim_IntList, Example((BIG, [-1]))),
    "product": (aten.mul.Tensor, Example((BIG, T((64, 64), 1.3)))),
    "matrix product": (aten.mm.default, Example((BIG, T((64, 48), 1.3)))),
    "layer norm": (aten.layer_norm.default, Example((BIG, [64]))),
    "joined": (aten.cat.default, Example(([BIG, T((64, 192), 1.3)], 1))),
    "sum of two": (aten.add.Tensor, Example((BIG, T((64, 64), 1.3)), {"alpha": 2})),
}


@pytest.mark.parametrize("name", KNOWN)
def test_it_says_what_the_rules_say(name: str):
    call, found = sampled(*KNOWN[name])
    rule = ATEN[KNOWN[name][0]].function(call)
    assert found.scale == pytest.approx(rule.scale, rel=0.1)
    for operand, _ in operands(call.args):
        assert found.of(operand) == pytest.approx(rule.of(operand), rel=0.15), operand


def test_it_is_deterministic_and_leaves_the_users_random_numbers_alone():
    state = torch.random.get_rng_state()
    first, second = (sampled(*KNOWN["gelu"])[1] for _ in range(2))
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), state)


TRANSFORMS = {
    "from real": (aten._fft_r2c.default, T((64, 64), 0.7), torch.float32, (1, False)),
    "of complex": (aten._fft_c2c.default, T((64, 64), 0.7, "complex"), torch.complex64, (2, True)),
    "to real": (aten._fft_c2r.default, T((64, 33), 0.7, "complex"), torch.complex64, (2, 64)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_complex_values(name: str):
    op, spec, dtype, rest = TRANSFORMS[name]
    call, specs = build(op, Example((spec, [1], *rest)))
    for node in specs:
        node.meta["val"] = torch.empty(spec.shape, dtype=dtype)
    found = sample(fx.GraphModule(nn.Module(), call.node.graph), call, [("self", None)])
    rule = ATEN[op].function(call)
    assert found.scale == pytest.approx(rule.scale, rel=0.1)
    assert found.of(("self", None)) == pytest.approx(rule.of(("self", None)), rel=0.1)


def test_the_real_part_of_something_complex():
    """Half of the square of what is there, and of a change of it."""
    example = Example((T((64, 64)),), run=lambda x: torch.view_as_real(x.to(torch.complex64)).select(-1, 0))
    call, specs = build(aten.relu.default, example)
    call.node.target = torch.real
    for node in specs:
        node.meta["val"] = torch.empty(64, 64, dtype=torch.complex64)
    found = sample(fx.GraphModule(nn.Module(), call.node.graph), call, [("self", None)])
    assert found.scale == pytest.approx(math.sqrt(0.5), rel=0.1)
    assert found.of(("self", None)) == pytest.approx(math.sqrt(0.5), rel=0.1)


def test_ops_that_draw_or_round_cannot_be_sampled():
    with pytest.raises(SamplingError, match="no output has a derivative"):
        sampled(aten.argmax.default, Example((BIG, -1)))


def test_an_op_that_fails_on_random_inputs_says_so():
    example = Example((T((4, 4)),), run=lambda x: x)
    with pytest.raises(SamplingError, match="LinAlgError"):
        sampled(aten.linalg_cholesky.default, example)


def test_an_op_that_is_not_finite_says_so():
    with pytest.raises(SamplingError, match="not finite"):
        sampled(aten.log.default, Example((BIG,)))


def test_a_scale_of_zero_is_sampled_at_one():
    _, found = sampled(aten.relu.default, Example((T((64, 64), 0.0),)))
    assert found.of(("self", None)) == pytest.approx(math.sqrt(0.5), rel=0.1)


def test_weights_count_by_their_entries():
    """A weight of an op without a rule: RMS over entries, which is what Scalar's target is compared with."""
    _, found = sampled(aten.mm.default, Example((T((64, 32)), W("linear_t", (32, 48)))))
    assert found.of(("mat2", None)) == pytest.approx(math.sqrt(32), rel=0.15)


def masked(x, mask):
    return x.masked_fill(mask, 0.0)


def test_masks_are_true_in_half_of_their_places():
    example = Example((BIG, torch.zeros(64, 64, dtype=torch.bool)), run=masked)
    call, specs = build(masked, example)
    found = sample(fx.GraphModule(nn.Module(), call.node.graph), call, [("arg0", None)])
    assert found.of(("arg0", None)) == pytest.approx(math.sqrt(0.5), rel=0.1)


def test_a_mask_that_decides_on_a_size_is_all_true():
    whole = torch.ones(64, 64, dtype=torch.bool)
    scattered = lambda x, mask: x[mask].view(64, 64) if bool(mask.all()) else x[mask].view(-1, 64, 64)  # noqa: E731
    call, _ = build(scattered, Example((BIG, whole), run=scattered))
    found = sample(fx.GraphModule(nn.Module(), call.node.graph), call, [("arg0", None)])
    assert found.of(("arg0", None)) == pytest.approx(1.0, rel=0.1)


def test_indices_are_spread_over_the_smallest_axis():
    picked = lambda x, index: x[index]  # noqa: E731
    call, _ = build(picked, Example((BIG, torch.zeros(32, dtype=torch.long)), run=picked))
    found = sample(fx.GraphModule(nn.Module(), call.node.graph), call, [("arg0", None)])
    assert found.of(("arg0", None)) == pytest.approx(1.0, rel=0.15)


def test_an_empty_output_says_so():
    empty = lambda x: x[:0] * 2  # noqa: E731
    call, _ = build(empty, Example((BIG,), run=empty))
    with pytest.raises(SamplingError, match="empty"):
        sample(fx.GraphModule(nn.Module(), call.node.graph), call, [("arg0", None)])

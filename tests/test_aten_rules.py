"""Every row of the table is held to its claim, by Jacobians of random calls.

* ``exact``: √(‖J‖_F²/n_y) equals the claimed sensitivity in every draw, and so does the RMS of the output;
* ``bound``: σ_max(J)·√(n_x/n_y) never exceeds it;
* ``typical``: √(E‖J‖_F²/n_y) is within a tenth of it, and so is the output's RMS (pointwise: 2e-3 against a grid);
* ``declared``: rows about weights hold as bounds for weights of norm 1, rearrangements as equalities, averages for
  parts that move alike; the rest must at least not be exceeded on random inputs.
"""

import math
from dataclasses import replace
from inspect import isfunction

import pytest
import torch
from modula import bond
from op_calls import Example, T, W, build, grid_moments, measure, moves_of
from op_examples import EXAMPLES, POINTWISE
from staged import first_region, stage

from modnorm_fx import ATEN
from modnorm_fx.conventions import PAPER
from modnorm_fx.rules import Local, operands

aten = torch.ops.aten
F = torch.nn.functional
CALLS = [(op, example) for op, examples in EXAMPLES.items() for example in examples]
FUNCTIONS = [(op, rest) for op, calls in POINTWISE.items() for rest in calls]


def rms_norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def response_norm(x):
    norms = x.norm(dim=0, keepdim=True)
    return x * (norms / norms.mean(-1, keepdim=True))


def rotary(x):
    angle = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


#: rows for recognised pieces: kind -> (function of one signal, its shape, check)
REGIONS = {
    "rms_norm": [(rms_norm, (2, 64), "typical"), (lambda x: F.normalize(x, dim=-1), (2, 64), "typical")],
    "layer_norm": [
        (lambda x: (x - x.mean(-1, True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt(), (2, 64), "typical")
    ],
    "mean_subtract": [(lambda x: x - x.mean(-1, keepdim=True), (6, 8), "bound")],
    "shares": [(lambda x: x / (x.sum(-1, keepdim=True) + 1e-6), (4, 64), "typical")],
    "response_norm": [(response_norm, (40, 8), "typical")],
    "rotary": [(rotary, (2, 5, 8), "exact")],
    "pointwise": [(lambda x: x * torch.sigmoid(1.7 * x), (40, 50), "typical")],
    "attention": [],  # of three signals: test_attention_written_out
    "computed_weight": [],  # of parameters: test_pass_computed_weights
    "weighted_average": [],  # tests of recognize_averages
    "linear_attention": [],
    "smoothing": [],
    "interpolation": [],  # of two signals: tests of recognize_averages
    "straight_through": [],  # tests of recognize_straight_through
}


def test_every_row_has_an_example_and_every_example_a_row():
    examples = set(EXAMPLES) | set(POINTWISE) | set(REGIONS)
    assert set(ATEN) - examples == set()
    assert examples - set(ATEN) == set()


def hold(status: str, claim: Local, scale: float | None, found: dict, slack: float = 0.1) -> None:
    for operand, m in found.items():
        value = claim.of(operand)
        assert value is not None, f"the rule says nothing of {operand}"
        if status in ("exact", "exact_sensitivity"):
            assert m.each == pytest.approx([value] * len(m.each), rel=1e-5), operand
        elif status == "bound":
            assert m.bound <= value * (1 + 1e-6), operand
        elif status == "typical":
            assert m.typical == pytest.approx(value, rel=slack), operand
        elif status == "average":  # parts that move alike pass as they are, and on random inputs less
            assert m.ones == pytest.approx(value, rel=1e-6), operand
            assert m.typical <= value * (1 + 1e-6), operand
        elif status == "positions":
            assert value == 1.0
        elif status == "written":  # what was there, and what is written over a part of it: at most what it is itself
            assert m.typical <= value * (1 + 1e-6) <= 1 + 1e-5, operand
        else:
            assert m.typical <= value * (1 + slack / 2), operand
    if scale is not None and status in ("exact", "positions", "written"):
        assert scale == pytest.approx(claim.scale, rel=1e-5)
    elif scale is not None and status == "typical":
        assert scale == pytest.approx(claim.scale, rel=slack)
    elif scale is not None and status in ("bound", "average", "not_exceeded", "weights"):
        assert scale <= claim.scale * (1 + 1e-6 if status == "bound" else 1 + slack / 2)


def _name(value: object) -> str:
    """Of an op; functions by name, since their text holds an address."""
    return "" if isinstance(value, Example) else value.__name__ if isfunction(value) else str(value)


@pytest.mark.parametrize("op, example", CALLS, ids=_name)
def test_row(op, example: Example):
    call, specs = build(op, example)
    claim = ATEN[op].function(call)
    status = example.check or ATEN[op].status
    if status == "weights":
        hold_weights(call, specs, example, claim)
    elif status != "skip":
        scale, found = measure(call, specs, example, draws=2 if status.startswith("exact") else 6)
        hold(status, claim, scale if example.scale and status != "exact_sensitivity" else None, found)
        for operand, moved in moves_of(call, specs, example, 8, W).items():
            assert math.sqrt(sum(v * v for v in moved.rms) / 8) == pytest.approx(claim.of(operand), rel=0.1), operand


def hold_weights(call, specs, example: Example, claim: Local) -> None:
    """With weights of norm 1 nothing moves the output by more than claimed, and something gets near it."""
    y, _ = measure(call, specs, example, draws=1)
    assert 0.2 * claim.scale <= y <= claim.scale * (1 + 1e-6)
    for kinds in (W, T):
        for operand, moved in moves_of(call, specs, example, 8, kinds).items():
            value = claim.of(operand)
            assert value is not None, f"the rule says nothing of {operand}"
            assert 0.2 * value <= max(moved.norm) <= value * (1 + 1e-6), operand


@pytest.mark.parametrize("scale", (0.3, 1.0, 2.0))
@pytest.mark.parametrize("op, rest", FUNCTIONS, ids=str)
def test_pointwise_row(op, rest, scale: float):
    call, _ = build(op, Example((T((2, 2), scale), *rest)))
    claim = ATEN[op].function(call)
    value, slope = grid_moments(lambda x: op(x, *rest), scale)
    assert claim.scale == pytest.approx(value, rel=2e-3, abs=1e-9)
    assert claim.of(("self", None)) == pytest.approx(slope, rel=2e-3, abs=1e-9)


def region_call(function, spec: T):
    """A call of the region that the passes find in ``function``, and how to measure it."""
    region, others = first_region(function, torch.randn(spec.shape))
    run = lambda *a: region(*(v.double() for v in a[:-1]))  # noqa: E731
    example = Example((spec, *others, region), run=run)
    call, specs = build(lambda *a: None, example)
    args = dict(zip(region.inputs, call.node.args, strict=False)) | {"region": region}
    return region, replace(call, args=args), specs, example


@pytest.mark.parametrize("kind, function, shape, status", [(k, *rest) for k, rs in REGIONS.items() for rest in rs])
def test_region_row(kind, function, shape, status):
    spec = T(shape, 0.7, {"exact": "rows"}.get(status, {"shares": "positive"}.get(kind, "gauss")))
    region, call, specs, example = region_call(function, spec)
    assert region.kind == kind
    claim = ATEN[kind].function(call)
    if kind == "pointwise":
        value, slope = grid_moments(region, 0.7)
        assert (claim.scale, claim.of(("input", None))) == pytest.approx((value, slope), rel=2e-3)
    else:
        scale, found = measure(call, specs, example, draws=2)
        hold(status, claim, scale, found)


@pytest.mark.parametrize("factor", (0.25, 0.6))
def test_attention_written_out(factor: float):
    """The region claims what the fused op claims, whatever the scales of its inputs."""
    args = [T((1, 2, 8, 16), s) for s in (0.7, 1.0, 1.3)]
    fused, _ = build(aten.scaled_dot_product_attention.default, Example(tuple(args), {"scale": factor}))
    staged = stage(lambda q, k, v: ((q @ k.mT) * factor).softmax(-1) @ v, *(torch.randn(a.shape) for a in args))
    staged.rewrite("attention")
    (region,) = staged.regions()
    assert region.inputs[:3] == ("query", "key", "value")
    written = replace(fused, args={name: fused.args[name] for name in region.inputs[:3]} | {"region": region})
    claims = [ATEN[op].function(c).sensitivity for op, c in (("attention", written), (fused.node.target, fused))]
    assert claims[0] == pytest.approx(claims[1])


# --- the paper's convention: what modula's bonds declare ------------------------------------------------------------

S = T((4, 6, 8))
BONDS = [
    (bond.ReLU(), aten.relu.default, Example((S,))),
    (bond.GELU(), aten.gelu.default, Example((S,))),
    (bond.Abs(), aten.abs.default, Example((S,))),
    (bond.Mean(1), aten.mean.dim, Example((S, [1]))),
    (bond.AvgPool(), aten.adaptive_avg_pool2d.default, Example((S, [1, 1]))),
    (bond.Flatten(), aten.flatten.using_ints, Example((S, 1))),
    (bond.FunctionalAttention(True), aten.scaled_dot_product_attention.default, Example((S, S, S), {"scale": 1 / 8})),
]


@pytest.mark.parametrize("declared, op, example", BONDS, ids=lambda v: type(v).__name__)
def test_paper_declares_what_modula_declares(declared, op, example: Example):
    call, specs = build(op, example, PAPER)
    claim = ATEN[op].function(call)
    for operand, node in operands(call.args):
        if node in specs:
            assert claim.of(operand) == pytest.approx(declared.sensitivity), operand


NORMS = [(bond.RMSDivide(), rms_norm), (bond.MeanSubtract(), lambda x: x - x.mean(-1, keepdim=True))]


@pytest.mark.parametrize("declared, function", NORMS)
def test_paper_declares_what_modula_declares_of_norms(declared, function):
    region, call, _, _ = region_call(function, T((4, 8)))
    call = replace(call, convention=PAPER, scales=dict.fromkeys(call.scales, 1.0))
    assert ATEN[region.kind].function(call).of(("input", None)) == declared.sensitivity


@pytest.mark.parametrize("op, example", CALLS, ids=_name)
def test_every_row_works_under_paper(op, example: Example):
    """Finite, and it says something of every operand."""
    call, specs = build(op, example, PAPER)
    claim = ATEN[op].function(call)
    for operand, node in operands(call.args):
        if node in specs:
            assert 0 <= claim.of(operand) < math.inf

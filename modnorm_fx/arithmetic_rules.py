"""Rules for sums, products and averages."""

from __future__ import annotations

import math
from typing import Any

import torch

from . import weight_atoms as atom_of
from .quadrature import Sign, joint_moments
from .rules import Call, Local, RuleTable

__all__ = ["ARITHMETIC"]

aten = torch.ops.aten
ARITHMETIC = RuleTable()

SCALAR_CHAIN = "chain rule; theory: scalar c·a has sensitivity |c|"


@ARITHMETIC.rule(aten.add.Tensor, aten.sub.Tensor, status="typical",
           source="independent terms; each operand passes as it is",
           weights={"self": atom_of.added, "other": atom_of.added})  # fmt: skip
def add(call: Call) -> Local:
    alpha = 1.0 if call["alpha"] is None else float(call["alpha"])
    if call.is_tensor("self") and not call.is_tensor("other"):  # a number
        shift = alpha * float(call["other"])
        return Local(_shifted(call, 1.0, -shift if call.node.target is aten.sub.Tensor else shift), {"self": 1.0})
    alpha = abs(alpha)
    return Local(call.convention.add((call.scale("self"), alpha * call.scale("other"))), {"self": 1.0, "other": alpha})


SHIFT = "a shift of a zero-mean term, or of one of known sign, |z|, whose mean is √(2/π)·s; the operand passes as it is"


def _shifted(call: Call, factor: float, shift: float) -> float:
    """Size of ``shift + factor·x``: the remainder of a gate, 1 - g, is no larger than 1."""
    s, add, sign = call.scale("self"), call.convention.add, call.sign("self")
    if not call.convention.tracks_scales or sign not in (Sign.POSITIVE, Sign.NEGATIVE):
        return add((abs(factor) * s, abs(shift)))
    mean = math.sqrt(2 / math.pi) * factor * s * (1 if sign is Sign.POSITIVE else -1)
    return math.sqrt((mean + shift) ** 2 + (1 - 2 / math.pi) * (factor * s) ** 2)


@ARITHMETIC.rule(aten.add.Scalar, aten.sub.Scalar, status="typical", source=SHIFT)
def add_scalar(call: Call) -> Local:
    sign = -1.0 if call.node.target is aten.sub.Scalar else 1.0
    return Local(_shifted(call, 1.0, sign * float(call["alpha"]) * float(call["other"])), {"self": 1.0})


@ARITHMETIC.rule(aten.rsub.Scalar, status="typical", source="other - alpha·self: " + SHIFT)
def rsub_scalar(call: Call) -> Local:
    alpha = float(call["alpha"])
    return Local(_shifted(call, -alpha, float(call["other"])), {"self": abs(alpha)})


@ARITHMETIC.rule(aten.mul.Tensor, status="typical", source="product rule; independent factors: s = s_a s_b",
           weights={"self": atom_of.multiplied, "other": atom_of.multiplied})  # fmt: skip
def mul(call: Call) -> Local:
    a, b = call.scale("self"), call.scale("other")
    return Local(a * b, {"self": b, "other": a})


@ARITHMETIC.rule(aten.mul.Scalar, status="exact", source=SCALAR_CHAIN)
def mul_scalar(call: Call) -> Local:
    c = abs(float(call["other"]))
    return Local(c * call.scale("self"), {"self": c})


@ARITHMETIC.rule(aten.div.Scalar, status="exact", source=SCALAR_CHAIN)
def div_scalar(call: Call) -> Local:
    c = 1 / abs(float(call["other"]))
    return Local(c * call.scale("self"), {"self": c})


@ARITHMETIC.rule(aten.div.Tensor, status="typical", source="quotient rule at the operands' scales",
           weights={"other": atom_of.multiplied, "self": atom_of.multiplied})  # fmt: skip
def div(call: Call) -> Local:
    a, b = call.scale("self"), call.scale("other")
    return Local(a / b, {"self": 1 / b, "other": a / b**2})


@ARITHMETIC.rule(aten.neg.default, status="exact", source=SCALAR_CHAIN, pointwise=True)
def neg(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 1.0})


@ARITHMETIC.rule(
    aten.abs.default,
    status="exact",
    source="|‖x‖| = ‖x‖ and |d|x|| = |dx|; arXiv 2405.14813, table of bonds: 1",
    pointwise=True,
)
def absolute(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 1.0})


@ARITHMETIC.rule(aten.mean.dim, aten.mean.default, status="declared",
           source="an average of parts that move alike: 1 (arXiv 2405.14813, bonds Mean and AvgPool); features move "
           "each its own way, and n of any sign average to 1/√n")  # fmt: skip
def mean(call: Call) -> Local:
    root = 1 / math.sqrt(_features_averaged(call)) if call.convention.tracks_scales else 1.0
    return Local(root * call.scale("self"), {"self": root})


def _features_averaged(call: Call) -> int:
    """Features of any sign per feature of an average; 1 where all that there is is averaged, as in a loss."""
    dims, shape = call["dim"], call.shape("self")
    if not dims or not call.shape() or call.sign("self") in (Sign.POSITIVE, Sign.NEGATIVE):
        return 1
    own = call.features.get(call["self"], frozenset())
    return math.prod(shape[a] for a in {int(d) % len(shape) for d in dims} & own)


@ARITHMETIC.rule(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default,
           aten.adaptive_avg_pool1d.default,
           aten._adaptive_avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
           status="declared",
           source="an average of parts that move alike (arXiv 2405.14813, bond AvgPool): 1")  # fmt: skip
@ARITHMETIC.rule(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
           aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default,
           aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default,
           aten.fractional_max_pool2d.default, aten.fractional_max_pool3d.default, aten.amax.default, aten.amin.default,
           aten.max.default, aten.max.dim, aten.min.default, aten.min.dim, aten.aminmax.default,
           aten.median.default, aten.median.dim, aten.nanmedian.default, aten.nanmedian.dim, aten.kthvalue.default,
           aten.mode.default, aten.cummax.default, aten.cummin.default,
           aten.maximum.default, aten.minimum.default, aten.fmax.default, aten.fmin.default,
           aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor,
           status="declared", source="picks one entry, whose change passes as it is")  # fmt: skip
def pool(call: Call) -> Local:
    names = [name for name in ("self", "input", "other", "min", "max") if call.is_tensor(name)]
    return Local(max(call.scale(name) for name in names), dict.fromkeys(names, 1.0))


@ARITHMETIC.rule("shares", status="typical",
           source="x/Σx of n entries |z|: Σx = n√(2/π)·s, and only what sets entries apart passes")  # fmt: skip
def shares(call: Call) -> Local:
    if call.is_average("input"):  # rows of a softmax sum to 1 already; they count in units of their effect
        return Local(call.scale("input"), {"input": 1.0})
    shape = call.shape("input")
    total = math.prod(shape[a] for a in call["region"].facts["axes"]) * math.sqrt(2 / math.pi)
    return Local(1 / total, {"input": 1 / (total * call.scale("input"))})


@ARITHMETIC.rule("straight_through", status="declared",
           source="has the value of q, which follows x as a quantiser does: a relative change passes")  # fmt: skip
def straight_through(call: Call) -> Local:
    x, q = call.scale("input"), call.scale("value")
    return Local(q, {"input": q / x, "value": 1.0})


@ARITHMETIC.rule(aten.addcmul.default, aten.addcdiv.default, status="typical",
           source="a sum of independent terms; product and quotient rule at the operands' scales",
           weights={"self": atom_of.added, "tensor1": atom_of.multiplied, "tensor2": atom_of.multiplied})  # fmt: skip
def add_product(call: Call) -> Local:
    c = 1.0 if call["value"] is None else abs(float(call["value"]))
    s, a, b = call.scale("self"), call.scale("tensor1"), call.scale("tensor2")
    if call.node.target is aten.addcmul.default:
        term, slopes = c * a * b, (c * b, c * a)
    else:
        term, slopes = c * a / b, (c / b, c * a / b**2)
    return Local(call.convention.add((s, term)), {"self": 1.0, "tensor1": slopes[0], "tensor2": slopes[1]})


@ARITHMETIC.rule(aten.lerp.Scalar, aten.lerp.Tensor, status="typical",
           source="(1 - w)·a + w·b, product rule",
           weights={"self": atom_of.added, "end": atom_of.added, "weight": atom_of.multiplied})  # fmt: skip
def interpolate(call: Call) -> Local:
    a, b, w, add = call.scale("self"), call.scale("end"), call.scale("weight"), call.convention.add
    rest = add((1.0, w)) if call.is_tensor("weight") else abs(1 - float(call["weight"]))
    return Local(add((rest * a, w * b)), {"self": rest, "end": w, "weight": add((a, b))})


@ARITHMETIC.rule("interpolation", status="typical", weights={"part": atom_of.multiplied},
           source="(1 - a)·x + a·y, product rule; a gate or a learned number in (0, 1) counts as 1/2")  # fmt: skip
def interpolation(call: Call) -> Local:
    x, y, add = call.scale("input"), call.scale("other"), call.convention.add
    a = 0.5 if call.is_tensor("part") else float(call["region"].facts["part"])
    return Local(add((abs(1 - a) * x, abs(a) * y)), {"input": abs(1 - a), "other": abs(a), "part": add((x, y))})


@ARITHMETIC.rule(aten.div.Tensor_mode, aten.floor_divide.default, status="declared",
           source="a rounded quotient; its derivative is zero, as autograd has it")  # fmt: skip
def rounded_quotient(call: Call) -> Local:
    whole = call["rounding_mode"] is None and call.node.target is aten.div.Tensor_mode
    a, b = call.scale("self"), call.scale("other")
    return Local(a / b, {"self": float(whole) / b, "other": float(whole) * a / b**2})


@ARITHMETIC.rule(aten.atan2.default, aten.hypot.default, aten.copysign.Tensor, aten.logaddexp.default,
           aten.logaddexp2.default, aten.pow.Tensor_Tensor, status="typical",
           weights=dict.fromkeys(("self", "other", "exponent"), atom_of.multiplied),
           source="quadrature of f and its two derivatives over independent Gaussian operands")  # fmt: skip
def pairwise(call: Call) -> Local:
    first, second = list(call.args)[:2]
    op: Any = call.node.target
    _, scale, (a, b) = joint_moments(op, (call.scale(first), call.scale(second)))
    return Local(scale, {first: a, second: b})


@ARITHMETIC.rule(aten.xlogy.Tensor, status="declared",
           source="product rule at the operands' sizes; a logarithm counts as 1 at least")  # fmt: skip
def entropy(call: Call) -> Local:
    a, b = call.scale("self"), call.scale("other")
    log = max(1.0, abs(math.log(b)) if b else 1.0)
    return Local(a * log, {"self": log, "other": a / b})


@ARITHMETIC.rule(aten.linalg_cross.default, status="typical", source="every entry is a difference of two products")
def cross(call: Call) -> Local:
    a, b, two = call.scale("self"), call.scale("other"), call.convention.add((1.0, 1.0))
    return Local(two * a * b, {"self": two * b, "other": two * a})

"""Rules for sums, products and averages."""

from __future__ import annotations

import math

import torch

from . import weight_atoms as atom_of
from .rules import Call, Local, RuleTable

__all__ = ["ARITHMETIC"]

aten = torch.ops.aten
ARITHMETIC = RuleTable()

SCALAR_CHAIN = "chain rule; theory: scalar c·a has sensitivity |c|"


@ARITHMETIC.rule(aten.add.Tensor, aten.sub.Tensor, status="typical",
           source="independent terms; each operand passes as it is",
           weights={"self": atom_of.added, "other": atom_of.added})  # fmt: skip
def add(call: Call) -> Local:
    alpha = 1.0 if call["alpha"] is None else abs(float(call["alpha"]))
    return Local(call.convention.add((call.scale("self"), alpha * call.scale("other"))), {"self": 1.0, "other": alpha})


@ARITHMETIC.rule(
    aten.add.Scalar,
    aten.sub.Scalar,
    status="typical",
    source="a shift of a zero-mean term; the operand passes as it is",
)
def add_scalar(call: Call) -> Local:
    shift = abs(float(call["alpha"]) * float(call["other"]))
    return Local(call.convention.add((call.scale("self"), shift)), {"self": 1.0})


@ARITHMETIC.rule(aten.rsub.Scalar, status="typical", source="other - alpha·self: a shift of a zero-mean term")
def rsub_scalar(call: Call) -> Local:
    alpha = abs(float(call["alpha"]))
    return Local(call.convention.add((alpha * call.scale("self"), abs(float(call["other"])))), {"self": alpha})


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
           source="an average of parts that move alike: 1 (arXiv 2405.14813, bonds Mean and AvgPool)")  # fmt: skip
def mean(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 1.0})


@ARITHMETIC.rule(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default,
           aten.adaptive_avg_pool1d.default,
           aten._adaptive_avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
           status="declared",
           source="an average of parts that move alike (arXiv 2405.14813, bond AvgPool): 1")  # fmt: skip
@ARITHMETIC.rule(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
           aten.adaptive_max_pool2d.default,
           aten.max_pool2d_with_indices.default, aten.amax.default, aten.amin.default, aten.max.dim,
           aten.maximum.default,
           aten.minimum.default, status="declared", source="picks one entry, whose change passes as it is")  # fmt: skip
def pool(call: Call) -> Local:
    names = [name for name in ("self", "input", "other") if call.is_tensor(name)]
    return Local(max(call.scale(name) for name in names), dict.fromkeys(names, 1.0))


@ARITHMETIC.rule(aten.sum.dim_IntList, aten.sum.default, status="typical", source="n independent terms: √n")
def total(call: Call) -> Local:
    axes, shape = call["dim"], call.shape("self")
    n = math.prod(shape[a] for a in axes) if axes else math.prod(shape)
    root = math.sqrt(n) if call.convention.tracks_scales else float(n)
    return Local(root * call.scale("self"), {"self": root})

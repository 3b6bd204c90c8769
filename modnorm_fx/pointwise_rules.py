"""Rules for scalar functions of one operand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from . import weight_atoms as atom_of
from .quadrature import gaussian_moments
from .rules import Call, Local, RuleTable

__all__ = ["POINTWISE"]

aten = torch.ops.aten
POINTWISE = RuleTable()

#: what the paper declares for GELU (arXiv 2405.14813, table of bonds), however it is spelled
GELU = 1 / math.sqrt(2)
TYPICAL_MAP = "Gauss-Hermite quadrature of f and f' at the operating scale"


def _pointwise(call: Call, function: Callable[[torch.Tensor], torch.Tensor], name: str) -> Local:
    """Typical scale and slope of a scalar function at the operand's scale, for entries of its sign."""
    scale, slope = gaussian_moments(function, call.scale(name), call.sign(name), growing=call.is_running(name))
    return Local(scale, {name: slope})


def _call_op(call: Call) -> Callable[[torch.Tensor], torch.Tensor]:
    """The node's op as a function of one tensor, its other arguments as they are."""
    op: Any = call.node.target

    def run(z: torch.Tensor) -> torch.Tensor:
        args = [z if isinstance(a, fx.Node) else a for a in call.node.args]
        return op(*args, **call.node.kwargs)

    return run


@POINTWISE.rule(aten.relu.default, status="exact", pointwise=True,
           source="half of the entries, so 1/√2 of the RMS and of a change; arXiv 2405.14813, bond ReLU")  # fmt: skip
def relu(call: Call) -> Local:
    return Local(call.scale("self") / math.sqrt(2), {"self": 1 / math.sqrt(2)})


@POINTWISE.rule(
    aten.gelu.default,
    status="typical",
    pointwise=True,
    source=TYPICAL_MAP + "; arXiv 2405.14813, bond GELU declares 1/√2",
)
def gelu(call: Call) -> Local:
    if not call.convention.tracks_scales:
        return Local(1.0, {"self": GELU})
    return _pointwise(call, _call_op(call), "self")


@POINTWISE.rule(
    aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.elu.default, aten.celu.default,
    aten.selu.default, aten.mish.default, aten.softplus.default, aten.leaky_relu.default, aten.hardswish.default,
    aten.hardsigmoid.default, aten.hardtanh.default, aten.relu6.default, aten.exp.default, aten.exp2.default,
    aten.expm1.default, aten.sin.default, aten.cos.default, aten.erf.default, aten.square.default, aten.clamp.default,
    aten.clamp_min.default, aten.clamp_max.default, aten.log_sigmoid.default, aten.atan.default, aten.erfc.default,
    aten.sinh.default, aten.cosh.default, aten.asinh.default, aten.sinc.default, aten.special_ndtr.default,
    aten.special_log_ndtr.default,
    aten.special_i0.default, aten.special_i0e.default, aten.special_i1.default,
    aten.special_i1e.default, aten.deg2rad.default, aten.rad2deg.default, aten.softshrink.default,
    status="typical", source=TYPICAL_MAP, pointwise=True,
)  # fmt: skip
def smooth(call: Call) -> Local:
    return _pointwise(call, _call_op(call), "self")


@POINTWISE.rule(
    aten.sign.default, aten.sgn.default, status="exact", source="±1; its derivative is zero, as autograd has it"
)
def sign(call: Call) -> Local:
    return Local(1.0, {"self": 0.0})


@POINTWISE.rule(aten.round.default, aten.floor.default, aten.ceil.default, aten.trunc.default, status="declared",
           source="a quantiser keeps the size; its derivative is zero, as autograd has it")  # fmt: skip
def quantise(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 0.0})


@POINTWISE.rule(aten.remainder.Scalar, aten.fmod.Scalar, aten.frac.default, aten.rrelu.default, aten.pow.Scalar,
           aten.threshold.default, aten.hardshrink.default,
           status="typical", source=TYPICAL_MAP)  # fmt: skip
def stepped(call: Call) -> Local:
    name = next(name for name in ("self", "exponent") if call.is_tensor(name))
    return _pointwise(call, _call_op(call), name)


@POINTWISE.rule(aten.acos.default, aten.asin.default, aten.atanh.default, aten.erfinv.default, aten.logit.default,
           aten.tan.default,
           status="declared",
           source="inside the domain by construction: value and slope at the tracked size, at most 0.9")  # fmt: skip
def bounded(call: Call) -> Local:
    x = torch.tensor(min(call.scale("self"), 0.9), dtype=torch.float64, requires_grad=True)
    y = _call_op(call)(x)
    (slope,) = torch.autograd.grad(y, x)
    return Local(abs(float(y.detach())), {"self": abs(float(slope))})


@POINTWISE.rule(aten.pow.Tensor_Scalar, status="typical", source=TYPICAL_MAP, pointwise=True)
def power(call: Call) -> Local:
    exponent = float(call["exponent"])
    if exponent < 0 or exponent != int(exponent):  # of something positive
        return positive(call)
    return _pointwise(call, _call_op(call), "self")


@POINTWISE.rule("pointwise", status="typical", source=TYPICAL_MAP + ", the region executed on the nodes")
def region(call: Call) -> Local:
    if call["region"].facts.get("name") == "gelu" and not call.convention.tracks_scales:
        return Local(1.0, {"input": GELU})
    return _pointwise(call, call["region"], "input")


@POINTWISE.rule(aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default, aten.log.default, aten.log1p.default,
           aten.log2.default, aten.log10.default, aten.lgamma.default, aten.digamma.default, aten.special_entr.default,
           status="typical", pointwise=True,
           source="functions of a positive quantity of the tracked size: value and slope there")  # fmt: skip
def positive(call: Call) -> Local:
    x = torch.tensor(call.scale("self"), dtype=torch.float64, requires_grad=True)
    y = _call_op(call)(x)
    (slope,) = torch.autograd.grad(y, x)
    return Local(abs(float(y.detach())), {"self": abs(float(slope))})


@POINTWISE.rule(
    aten.prelu.default,
    status="typical",
    source=TYPICAL_MAP + " at the usual slope 1/4",
    weights={"weight": atom_of.gain},
)
def prelu(call: Call) -> Local:
    scale, slope = gaussian_moments(lambda z: torch.nn.functional.leaky_relu(z, 0.25), call.scale("self"))
    return Local(scale, {"self": slope, "weight": call.scale("self") / math.sqrt(2)})

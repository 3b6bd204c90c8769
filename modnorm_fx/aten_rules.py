"""The table of local rules, one short function per ATen op.

To add an op, copy its neighbour: name the operands as the schema does, say which operand may be a weight and what
atom it then is, and give the status and the source. ``tests/test_aten_rules.py`` walks every row and checks its claim
against sampled Jacobians.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from . import weight_atoms as atom_of
from .quadrature import gaussian_moments
from .rules import Call, Local, RuleTable, shape_of

__all__ = ["ATEN"]

aten = torch.ops.aten
ATEN = RuleTable()

SCALAR_CHAIN = "chain rule; theory: scalar c·a has sensitivity |c|"
UNIT_WEIGHTS = (
    "weights count as norm 1 by declaration: |Wx| <= |W| |x| in the induced norm (arXiv 2405.14813, section 2)"
)
REARRANGES = "moves entries; the RMS over features is unchanged"
TYPICAL_MAP = "Gauss-Hermite quadrature of f and f' at the operating scale"
NORM_LAYER = "output has unit RMS whatever the input's scale s, so a relative change passes as it is: 1/s"


# --- weights meet activations ---------------------------------------------------------------------------------------


@ATEN.rule(
    aten.linear.default,
    status="declared",
    source=UNIT_WEIGHTS,
    weights={"weight": atom_of.linear, "bias": atom_of.bias},
)
def linear(call: Call) -> Local:
    s = call.scale("input")
    return Local(s, {"input": 1.0, "weight": s, "bias": 1.0})


@ATEN.rule(
    aten.addmm.default,
    status="declared",
    source=UNIT_WEIGHTS,
    weights={"mat2": atom_of.linear_transposed, "self": atom_of.bias},
)
def addmm(call: Call) -> Local:
    s = call.scale("mat1")
    return Local(s, {"mat1": 1.0, "mat2": s, "self": 1.0})


@ATEN.rule(
    aten.convolution.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
    aten.conv2d.padding, aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    status="declared", source=UNIT_WEIGHTS, weights={"weight": atom_of.conv, "bias": atom_of.bias},
)  # fmt: skip
def convolution(call: Call) -> Local:
    s = call.scale("input")
    return Local(s, {"input": 1.0, "weight": s, "bias": 1.0})


@ATEN.rule(aten._grouped_mm.default, "transformers.grouped_mm_fallback.default", status="declared",
           source=UNIT_WEIGHTS + "; every row meets one expert",
           weights={"mat2": atom_of.matmul_right, "weight": atom_of.matmul_right, "bias": atom_of.table})  # fmt: skip
def grouped_matmul(call: Call) -> Local:
    rows, experts = ("self", "mat2") if "mat2" in call.args else ("input", "weight")
    s = call.scale(rows)
    return Local(s, {rows: 1.0, experts: s, "bias": 1.0})


@ATEN.rule(aten.embedding.default, status="declared", source=UNIT_WEIGHTS, weights={"weight": atom_of.embedding})
def embedding(call: Call) -> Local:
    s = call.scale("weight")
    return Local(s, {"weight": 1.0})


@ATEN.rule(
    aten.matmul.default, aten.mm.default, aten.bmm.default, status="typical",
    source="n independent zero-mean terms add in quadrature: √n s_a s_b; a weight counts as norm 1; a softmax row is "
    "an average",
    weights={"self": atom_of.matmul_left, "other": atom_of.matmul_right, "mat2": atom_of.matmul_right},
)  # fmt: skip
def matmul(call: Call) -> Local:
    right = "mat2" if "mat2" in call.args else "other"
    a, b = call.scale("self"), call.scale(right)
    if call.is_weight("self") or call.is_weight(right):
        return Local(a * b, {"self": b, right: a})
    share = _attention_share(call)
    if call.is_average("self"):
        return Local(b, {"self": share * b, right: share})
    if call.is_average(right):
        return Local(a, {"self": share, right: share * a})
    root = math.sqrt(call.shape("self")[-1]) if call.convention.tracks_scales else float(call.shape("self")[-1])
    return Local(root * a * b, {"self": root * b, right: root * a})


def _attention_share(call: Call) -> float:
    """What each of q, k, v passes on, such that attention as a whole passes a change of the input it is computed from
    as it is.

    The paper multiplies its attention by 1/3 for that (three paths, added). Existing models have no such factor, and
    a trunk of branches that pass more than they are large makes the first layers' sensitivity grow with a power of
    depth; so ``tracked`` declares 1/√3 each (three paths, in quadrature).
    """
    return 3**-0.5 if call.convention.tracks_scales else 1.0


@ATEN.rule(
    aten.scaled_dot_product_attention.default, "attention", status="declared",
    weights={"attn_mask": atom_of.logit_bias},
    source="an average of v, so the scale of v; logits move by scale·√d_head·s per unit of q or k, their average by "
    "that times s_v "
    "(scale·d_head where scales are not tracked: arXiv 2405.14813, section 3.3); see _attention_share",
)  # fmt: skip
def attention(call: Call) -> Local:
    d = call.shape("query")[-1]
    scale = call["region"].facts["scale"] if call["region"] else call["scale"]
    factor = (1 / math.sqrt(d) if scale is None else scale) * (math.sqrt(d) if call.convention.tracks_scales else d)
    q, k, v, share = call.scale("query"), call.scale("key"), call.scale("value"), _attention_share(call)
    row = share * v * _softmax_slope(call, factor * q * k)
    return Local(v, {"query": row * factor * k, "key": row * factor * q, "value": share, "attn_mask": row})


def _softmax_slope(call: Call, logits: float) -> float:
    """Slope of a softmax row, in units of its effect on an average of unit values, at logits of the given scale.

    1 up to unit logits. Beyond, the row has saturated and follows relative changes of its logits: 1/scale. Models that
    do not divide their logits by √d (T5) keep them near 1 by small q and k; at norm 1 they would gain √d a layer.
    """
    return 1 / max(1.0, logits) if call.convention.tracks_scales else 1.0


# --- sums, products, averages ---------------------------------------------------------------------------------------


@ATEN.rule(aten.add.Tensor, aten.sub.Tensor, status="typical", source="independent terms; each operand passes as it is",
           weights={"self": atom_of.added, "other": atom_of.added})  # fmt: skip
def add(call: Call) -> Local:
    alpha = 1.0 if call["alpha"] is None else abs(float(call["alpha"]))
    return Local(call.convention.add((call.scale("self"), alpha * call.scale("other"))), {"self": 1.0, "other": alpha})


@ATEN.rule(
    aten.add.Scalar,
    aten.sub.Scalar,
    status="typical",
    source="a shift of a zero-mean term; the operand passes as it is",
)
def add_scalar(call: Call) -> Local:
    shift = abs(float(call["alpha"]) * float(call["other"]))
    return Local(call.convention.add((call.scale("self"), shift)), {"self": 1.0})


@ATEN.rule(aten.rsub.Scalar, status="typical", source="other - alpha·self: a shift of a zero-mean term")
def rsub_scalar(call: Call) -> Local:
    alpha = abs(float(call["alpha"]))
    return Local(call.convention.add((alpha * call.scale("self"), abs(float(call["other"])))), {"self": alpha})


@ATEN.rule(aten.mul.Tensor, status="typical", source="product rule; independent factors: s = s_a s_b",
           weights={"self": atom_of.multiplied, "other": atom_of.multiplied})  # fmt: skip
def mul(call: Call) -> Local:
    a, b = call.scale("self"), call.scale("other")
    return Local(a * b, {"self": b, "other": a})


@ATEN.rule(aten.mul.Scalar, status="exact", source=SCALAR_CHAIN)
def mul_scalar(call: Call) -> Local:
    c = abs(float(call["other"]))
    return Local(c * call.scale("self"), {"self": c})


@ATEN.rule(aten.div.Scalar, status="exact", source=SCALAR_CHAIN)
def div_scalar(call: Call) -> Local:
    c = 1 / abs(float(call["other"]))
    return Local(c * call.scale("self"), {"self": c})


@ATEN.rule(aten.div.Tensor, status="typical", source="quotient rule at the operands' scales",
           weights={"other": atom_of.multiplied, "self": atom_of.multiplied})  # fmt: skip
def div(call: Call) -> Local:
    a, b = call.scale("self"), call.scale("other")
    return Local(a / b, {"self": 1 / b, "other": a / b**2})


@ATEN.rule(aten.neg.default, status="exact", source=SCALAR_CHAIN, pointwise=True)
def neg(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 1.0})


@ATEN.rule(
    aten.abs.default,
    status="exact",
    source="|‖x‖| = ‖x‖ and |d|x|| = |dx|; arXiv 2405.14813, table of bonds: 1",
    pointwise=True,
)
def absolute(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 1.0})


@ATEN.rule(aten.mean.dim, aten.mean.default, status="declared",
           source="an average of parts that move alike: 1 (arXiv 2405.14813, bonds Mean and AvgPool)")  # fmt: skip
def mean(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 1.0})


@ATEN.rule(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool1d.default,
           aten._adaptive_avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
           status="declared",
           source="an average of parts that move alike (arXiv 2405.14813, bond AvgPool): 1")  # fmt: skip
@ATEN.rule(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.adaptive_max_pool2d.default,
           aten.max_pool2d_with_indices.default, aten.amax.default, aten.amin.default, aten.max.dim,
           aten.maximum.default,
           aten.minimum.default, status="declared", source="picks one entry, whose change passes as it is")  # fmt: skip
def pool(call: Call) -> Local:
    names = [name for name in ("self", "input", "other") if call.is_tensor(name)]
    return Local(max(call.scale(name) for name in names), dict.fromkeys(names, 1.0))


@ATEN.rule(aten.sum.dim_IntList, aten.sum.default, status="typical", source="n independent terms: √n")
def total(call: Call) -> Local:
    axes, shape = call["dim"], call.shape("self")
    n = math.prod(shape[a] for a in axes) if axes else math.prod(shape)
    root = math.sqrt(n) if call.convention.tracks_scales else float(n)
    return Local(root * call.scale("self"), {"self": root})


# --- rearrangements -------------------------------------------------------------------------------------------------


@ATEN.rule(
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.transpose.int, aten.permute.default,
    aten.t.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.expand.default, aten.flatten.using_ints, aten.unflatten.int, aten.slice.Tensor, aten.select.int,
    aten.narrow.default, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    aten.movedim.intlist, aten.swapaxes.default, aten.numpy_T.default, aten.mT.default,
    status="declared", source=REARRANGES, view=True,
)  # fmt: skip
@ATEN.rule(
    aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.to.dtype, aten.to.device,
    aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.dropout.default,
    aten.native_dropout.default, aten.roll.default, aten.flip.default, aten.repeat.default,
    aten.constant_pad_nd.default, aten.pad.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
    aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec,
    aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec, aten.gather.default,
    aten.index_select.default, aten.unfold.default, aten.im2col.default, aten.repeat_interleave.self_int,
    aten.channel_shuffle.default,
    status="declared", source=REARRANGES,
)  # fmt: skip
def rearrange(call: Call) -> Local:
    name = "self" if "self" in call.args else "input"
    return Local(call.scale(name), {name: 1.0})


@ATEN.rule(aten.type_as.default, aten.to.other, status="declared", source=REARRANGES)
def cast_like(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 1.0, "other": 0.0})


@ATEN.rule(aten.copy.default, status="declared", source=REARRANGES + "; what was there before is gone")
def copy(call: Call) -> Local:
    return Local(call.scale("src"), {"self": 0.0, "src": 1.0})


@ATEN.rule(aten.index.Tensor, status="declared", source=REARRANGES, weights={"self": atom_of.looked_up})
def index(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 1.0})


@ATEN.rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.tril.default, aten.triu.default, status="bound",
           source="keeps an entry or replaces it by a constant")  # fmt: skip
def mask(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 1.0})


@ATEN.rule(
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    status="bound",
    source="each entry comes from one operand",
)
def where(call: Call) -> Local:
    names = [name for name in ("self", "other") if call.is_tensor(name)]
    return Local(max(call.scale(name) for name in names), dict.fromkeys(names, 1.0))


@ATEN.rule(aten.cat.default, aten.stack.default, status="exact", weights={"tensors": atom_of.joined},
           source="along features: RMS of the whole, √f_i for the share f_i of features; else as it is")  # fmt: skip
def cat(call: Call) -> Local:
    tensors = call["tensors"]
    n = len(tensors)
    axis = int(call["dim"] or 0) % len(call.shape())
    sizes = [1] * n if call.node.target is aten.stack.default else [shape_of(t)[axis] for t in tensors]
    scales = [call.scale("tensors", i) for i in range(n)]
    if not call.convention.tracks_scales:
        return Local(1.0, {"tensors": [1.0] * n})
    shares = [size / sum(sizes) for size in sizes]
    scale = math.sqrt(sum(f * s * s for f, s in zip(shares, scales, strict=True)))
    along_features = axis in call.features.get(call.node, frozenset())
    return Local(scale, {"tensors": [math.sqrt(f) if along_features else 1.0 for f in shares]})


# --- norm layers ----------------------------------------------------------------------------------------------------


def _norm(call: Call, name: str = "input", weight: str = "weight") -> Local:
    return Local(1.0, {name: 1 / call.scale(name), weight: 1.0, "bias": 1.0})


@ATEN.rule(aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default, aten.instance_norm.default,
           status="typical",
           source=NORM_LAYER, weights={"weight": atom_of.gain, "bias": atom_of.bias})  # fmt: skip
@ATEN.rule(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default,
           aten._native_batch_norm_legit_functional.default,
           aten.native_batch_norm.default, aten.cudnn_batch_norm.default, status="declared",
           source=NORM_LAYER + "; over the statistics of the batch, as in training",
           weights={"weight": atom_of.gain, "bias": atom_of.bias})  # fmt: skip
def norm_layer(call: Call) -> Local:
    return _norm(call)


@ATEN.rule("rms_norm", "layer_norm", status="typical", source=NORM_LAYER)
def written_norm(call: Call) -> Local:
    out = float(call["region"].facts["scale"]) if call.convention.tracks_scales else 1.0
    return Local(out, {"input": out / call.scale("input")})


@ATEN.rule("mean_subtract", status="bound", source="a projection; arXiv 2405.14813, bond MeanSubtract: 1")
def mean_subtract(call: Call) -> Local:
    return Local(call.scale("input"), {"input": 1.0})


@ATEN.rule("rotary", status="exact", source="a rotation of pairs of features")
def rotary(call: Call) -> Local:
    return Local(call.scale("input"), {"input": 1.0})


# --- pointwise ------------------------------------------------------------------------------------------------------


def _pointwise(call: Call, function: Callable[[torch.Tensor], torch.Tensor], name: str) -> Local:
    """Typical scale and slope of a scalar function at the operand's scale."""
    scale, slope = gaussian_moments(function, call.scale(name))
    return Local(scale, {name: slope})


def _call_op(call: Call) -> Callable[[torch.Tensor], torch.Tensor]:
    """The node's op as a function of one tensor, its other arguments as they are."""
    op: Any = call.node.target

    def run(z: torch.Tensor) -> torch.Tensor:
        args = [z if isinstance(a, fx.Node) else a for a in call.node.args]
        return op(*args, **call.node.kwargs)

    return run


@ATEN.rule(aten.relu.default, status="exact", pointwise=True,
           source="half of the entries, so 1/√2 of the RMS and of a change; arXiv 2405.14813, bond ReLU")  # fmt: skip
def relu(call: Call) -> Local:
    return Local(call.scale("self") / math.sqrt(2), {"self": 1 / math.sqrt(2)})


@ATEN.rule(
    aten.gelu.default,
    status="typical",
    pointwise=True,
    source=TYPICAL_MAP + "; arXiv 2405.14813, bond GELU declares 1/√2",
)
def gelu(call: Call) -> Local:
    if not call.convention.tracks_scales:
        return Local(1.0, {"self": 1 / math.sqrt(2)})
    return _pointwise(call, _call_op(call), "self")


@ATEN.rule(
    aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.elu.default, aten.celu.default,
    aten.selu.default, aten.mish.default, aten.softplus.default, aten.leaky_relu.default, aten.hardswish.default,
    aten.hardsigmoid.default, aten.hardtanh.default, aten.relu6.default, aten.exp.default, aten.exp2.default,
    aten.expm1.default, aten.sin.default, aten.cos.default, aten.erf.default, aten.square.default, aten.clamp.default,
    aten.clamp_min.default, aten.clamp_max.default, aten.log_sigmoid.default, aten.atan.default,
    status="typical", source=TYPICAL_MAP, pointwise=True,
)  # fmt: skip
def smooth(call: Call) -> Local:
    return _pointwise(call, _call_op(call), "self")


@ATEN.rule(aten.sign.default, aten.sgn.default, status="exact", source="±1; its derivative is zero, as autograd has it")
def sign(call: Call) -> Local:
    return Local(1.0, {"self": 0.0})


@ATEN.rule(aten.round.default, aten.floor.default, aten.ceil.default, aten.trunc.default, status="declared",
           source="a quantiser keeps the size; its derivative is zero, as autograd has it")  # fmt: skip
def quantise(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 0.0})


@ATEN.rule(aten.pow.Tensor_Scalar, status="typical", source=TYPICAL_MAP, pointwise=True)
def power(call: Call) -> Local:
    exponent = float(call["exponent"])
    if exponent < 0 or exponent != int(exponent):  # of something positive
        return positive(call)
    return _pointwise(call, _call_op(call), "self")


@ATEN.rule("pointwise", status="typical", source=TYPICAL_MAP + ", the region executed on the nodes")
def region(call: Call) -> Local:
    return _pointwise(call, call["region"], "input")


@ATEN.rule(aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default, aten.log.default, aten.log1p.default,
           status="typical", pointwise=True,
           source="functions of a positive quantity of the tracked size: value and slope there")  # fmt: skip
def positive(call: Call) -> Local:
    x = torch.tensor(call.scale("self"), dtype=torch.float64, requires_grad=True)
    y = _call_op(call)(x)
    (slope,) = torch.autograd.grad(y, x)
    return Local(abs(float(y.detach())), {"self": abs(float(slope))})


@ATEN.rule(aten.softmax.int, aten._softmax.default, status="declared",
           source="in units of its effect on an average of unit values (see _softmax_slope)")  # fmt: skip
def softmax(call: Call) -> Local:
    return Local(1.0, {"self": _softmax_slope(call, call.scale("self"))})


@ATEN.rule(aten.log_softmax.int, status="declared",
           source="logits less one number a row: their scale, and a change of them passes as it is")  # fmt: skip
def log_softmax(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 1.0})


@ATEN.rule(aten.glu.default, status="typical", source="a·σ(b) on halves of the features, product rule")
def glu(call: Call) -> Local:
    s = call.scale("self")
    gate, slope = gaussian_moments(torch.sigmoid, s)
    return Local(s * gate, {"self": math.hypot(gate, s * slope)})


@ATEN.rule(
    aten.prelu.default,
    status="typical",
    source=TYPICAL_MAP + " at the usual slope 1/4",
    weights={"weight": atom_of.gain},
)
def prelu(call: Call) -> Local:
    scale, slope = gaussian_moments(lambda z: torch.nn.functional.leaky_relu(z, 0.25), call.scale("self"))
    return Local(scale, {"self": slope, "weight": call.scale("self") / math.sqrt(2)})

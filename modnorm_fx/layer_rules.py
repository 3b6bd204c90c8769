"""Rules for layers: what multiplies activations by weights, and norm layers."""

from __future__ import annotations

import math

import torch

from . import weight_atoms as atom_of
from .matrix_atoms import met_taps
from .rules import Call, Local, RuleTable
from .slices import returned, take_slice

__all__ = ["LAYERS"]

aten = torch.ops.aten
LAYERS = RuleTable()

UNIT_WEIGHTS = (
    "weights count as norm 1 by declaration: |Wx| <= |W| |x| in the induced norm (arXiv 2405.14813, section 2)"
)
NORM_LAYER = "output has unit RMS whatever the input's scale s, so a relative change passes as it is: 1/s"


def _norm_of(call: Call, name: str) -> float:
    """Norm of the matrix of a layer: what it is declared or measured to be; a constant matrix counts as 1."""
    return call.scale(name) if call.is_weight(name) else 1.0


@LAYERS.rule(
    aten.linear.default,
    status="declared",
    source=UNIT_WEIGHTS,
    weights={"weight": atom_of.linear, "bias": atom_of.bias},
)
def linear(call: Call) -> Local:
    s, w = call.scale("input"), _norm_of(call, "weight")
    return Local(s * w, {"input": w, "weight": s, "bias": 1.0})


@LAYERS.rule(
    aten.addmm.default,
    status="declared",
    source=UNIT_WEIGHTS,
    weights={"mat2": atom_of.linear_transposed, "self": atom_of.bias},
)
def addmm(call: Call) -> Local:
    s, w = call.scale("mat1"), _norm_of(call, "mat2")
    return Local(s * w, {"mat1": w, "mat2": s, "self": 1.0})


@LAYERS.rule(
    aten.baddbmm.default,
    status="typical",
    source="a sum and a batched product: √n s_a s_b over n terms, a weight counts as norm 1",
    weights={"self": atom_of.bias, "batch1": atom_of.matmul_left, "batch2": atom_of.matmul_right},
)
def baddbmm(call: Call) -> Local:
    a, b = call.scale("batch1"), call.scale("batch2")
    terms = 1.0 if call.is_weight("batch1") or call.is_weight("batch2") else float(call.shape("batch1")[-1])
    factor = abs(float(call["alpha"])) * (math.sqrt(terms) if call.convention.tracks_scales else terms)
    beta = abs(float(call["beta"]))
    scale = call.convention.add((beta * call.scale("self"), factor * a * b))
    return Local(scale, {"self": beta, "batch1": factor * b, "batch2": factor * a})


@LAYERS.rule(
    aten.convolution.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
    aten.conv2d.padding, aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    status="declared", weights={"weight": atom_of.conv, "bias": atom_of.bias},
    source=UNIT_WEIGHTS + "; a depthwise one that is tracked has K taps of size 1/K and any sign, which add up to 1/√K",
)  # fmt: skip
def convolution(call: Call) -> Local:
    s, w, taps = call.scale("input"), _norm_of(call, "weight"), _depthwise_taps(call)
    typical = 1 / math.sqrt(taps) if call.convention.tracks_scales else 1.0
    return Local(s * w * typical, {"input": w * typical, "weight": s * typical, "bias": 1.0})


def _depthwise_taps(call: Call) -> int:
    """Taps that meet in an output of a convolution with a filter of its own for each channel; 1 for others.

    Behind a norm layer it makes no difference. In a stream without one (``x + conv(x)``, convolutions as position
    encodings) a branch that counts as large as the stream makes it grow by √2 each time: by 2¹⁸ in a large DaViT.
    """
    _, channels, *kernel = call.shape("weight")
    groups = call.args.get("groups")
    if channels > 1 or not isinstance(groups, int) or groups == 1:
        return 1
    return met_taps(kernel, atom_of.spread_of(call.node, call.args, len(kernel)))


@LAYERS.rule(aten._grouped_mm.default, "transformers.grouped_mm_fallback.default", status="declared",
           source=UNIT_WEIGHTS + "; every row meets one expert",
           weights={"mat2": atom_of.matmul_right, "weight": atom_of.matmul_right, "bias": atom_of.table})  # fmt: skip
def grouped_matmul(call: Call) -> Local:
    rows, experts = ("self", "mat2") if "mat2" in call.args else ("input", "weight")
    s, w = call.scale(rows), _norm_of(call, experts)
    return Local(s * w, {rows: w, experts: s, "bias": 1.0})


@LAYERS.rule(aten.embedding.default, status="declared", source=UNIT_WEIGHTS, weights={"weight": atom_of.embedding})
def embedding(call: Call) -> Local:
    s = call.scale("weight")
    return Local(s, {"weight": 1.0})


def _norm(call: Call, name: str = "input", weight: str = "weight") -> Local:
    s = call.scale(name) or 1.0  # biases alone, which start at zero: they leave it as soon as they move
    return Local(1.0, {name: 1 / s, weight: 1.0, "bias": 1.0})


@LAYERS.rule(aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default, aten.instance_norm.default,
           aten.native_layer_norm.default, aten.native_group_norm.default, aten._fused_rms_norm.default,
           status="typical",
           source=NORM_LAYER, weights={"weight": atom_of.gain, "bias": atom_of.bias})  # fmt: skip
@LAYERS.rule(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default,
           aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit.no_stats,
           aten.native_batch_norm.default, aten.cudnn_batch_norm.default, status="declared",
           source=NORM_LAYER + "; over the statistics of the batch, as in training",
           weights={"weight": atom_of.gain, "bias": atom_of.bias})  # fmt: skip
def norm_layer(call: Call) -> Local:
    return _norm(call)


@LAYERS.rule("rms_norm", "layer_norm", status="typical", source=NORM_LAYER)
def written_norm(call: Call) -> Local:
    out = float(call["region"].facts["scale"]) if call.convention.tracks_scales else 1.0
    return Local(out, {"input": out / call.scale("input")})


@LAYERS.rule("response_norm", status="declared",
             source="x times norms of x over their mean: factors of size 1, each of which averages over all positions "
             "and so moves little; a relative change passes as it is")  # fmt: skip
def response_norm(call: Call) -> Local:
    return Local(call.scale("input"), {"input": 1.0})


@LAYERS.rule("mean_subtract", status="bound", source="a projection; arXiv 2405.14813, bond MeanSubtract: 1")
def mean_subtract(call: Call) -> Local:
    return Local(call.scale("input"), {"input": 1.0})


@LAYERS.rule("computed_weight", status="typical",
             source="norm of the matrix and central differences of the map at its declared point, in the norm of the "
             "layer that uses it (see passes/measure_matrix.py)")  # fmt: skip
def computed_weight(call: Call) -> Local:
    facts = call["region"].facts
    return Local(facts["scale"], facts["sensitivity"])


@LAYERS.rule(take_slice, status="declared", source="some of the entries, of the same size")
def sliced(call: Call) -> Local:
    return Local(call.scale("weight"), {"weight": 1.0})


@LAYERS.rule(returned, status="declared", weights={"weight": atom_of.source},
             source="an output of size 1, whatever it stands for")  # fmt: skip
def output(call: Call) -> Local:
    return Local(1.0, {"weight": 1.0})


@LAYERS.rule("rotary", status="exact", source="a rotation of pairs of features")
def rotary(call: Call) -> Local:
    return Local(call.scale("input"), {"input": 1.0})

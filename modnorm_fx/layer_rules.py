"""Rules for layers: what multiplies activations by weights, and norm layers."""

from __future__ import annotations

import torch

from . import weight_atoms as atom_of
from .rules import Call, Local, RuleTable

__all__ = ["LAYERS"]

aten = torch.ops.aten
LAYERS = RuleTable()

UNIT_WEIGHTS = (
    "weights count as norm 1 by declaration: |Wx| <= |W| |x| in the induced norm (arXiv 2405.14813, section 2)"
)
NORM_LAYER = "output has unit RMS whatever the input's scale s, so a relative change passes as it is: 1/s"


@LAYERS.rule(
    aten.linear.default,
    status="declared",
    source=UNIT_WEIGHTS,
    weights={"weight": atom_of.linear, "bias": atom_of.bias},
)
def linear(call: Call) -> Local:
    s = call.scale("input")
    return Local(s, {"input": 1.0, "weight": s, "bias": 1.0})


@LAYERS.rule(
    aten.addmm.default,
    status="declared",
    source=UNIT_WEIGHTS,
    weights={"mat2": atom_of.linear_transposed, "self": atom_of.bias},
)
def addmm(call: Call) -> Local:
    s = call.scale("mat1")
    return Local(s, {"mat1": 1.0, "mat2": s, "self": 1.0})


@LAYERS.rule(
    aten.convolution.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
    aten.conv2d.padding, aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    status="declared", source=UNIT_WEIGHTS, weights={"weight": atom_of.conv, "bias": atom_of.bias},
)  # fmt: skip
def convolution(call: Call) -> Local:
    s = call.scale("input")
    return Local(s, {"input": 1.0, "weight": s, "bias": 1.0})


@LAYERS.rule(aten._grouped_mm.default, "transformers.grouped_mm_fallback.default", status="declared",
           source=UNIT_WEIGHTS + "; every row meets one expert",
           weights={"mat2": atom_of.matmul_right, "weight": atom_of.matmul_right, "bias": atom_of.table})  # fmt: skip
def grouped_matmul(call: Call) -> Local:
    rows, experts = ("self", "mat2") if "mat2" in call.args else ("input", "weight")
    s = call.scale(rows)
    return Local(s, {rows: 1.0, experts: s, "bias": 1.0})


@LAYERS.rule(aten.embedding.default, status="declared", source=UNIT_WEIGHTS, weights={"weight": atom_of.embedding})
def embedding(call: Call) -> Local:
    s = call.scale("weight")
    return Local(s, {"weight": 1.0})


def _norm(call: Call, name: str = "input", weight: str = "weight") -> Local:
    return Local(1.0, {name: 1 / call.scale(name), weight: 1.0, "bias": 1.0})


@LAYERS.rule(aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default, aten.instance_norm.default,
           status="typical",
           source=NORM_LAYER, weights={"weight": atom_of.gain, "bias": atom_of.bias})  # fmt: skip
@LAYERS.rule(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default,
           aten._native_batch_norm_legit_functional.default,
           aten.native_batch_norm.default, aten.cudnn_batch_norm.default, status="declared",
           source=NORM_LAYER + "; over the statistics of the batch, as in training",
           weights={"weight": atom_of.gain, "bias": atom_of.bias})  # fmt: skip
def norm_layer(call: Call) -> Local:
    return _norm(call)


@LAYERS.rule("rms_norm", "layer_norm", status="typical", source=NORM_LAYER)
def written_norm(call: Call) -> Local:
    out = float(call["region"].facts["scale"]) if call.convention.tracks_scales else 1.0
    return Local(out, {"input": out / call.scale("input")})


@LAYERS.rule("mean_subtract", status="bound", source="a projection; arXiv 2405.14813, bond MeanSubtract: 1")
def mean_subtract(call: Call) -> Local:
    return Local(call.scale("input"), {"input": 1.0})


@LAYERS.rule("rotary", status="exact", source="a rotation of pairs of features")
def rotary(call: Call) -> Local:
    return Local(call.scale("input"), {"input": 1.0})

"""Rules for attention: products of activations, softmax, and the two in one call."""

from __future__ import annotations

import math

import torch

from . import weight_atoms as atom_of
from .rules import Call, Local, RuleTable

__all__ = ["ATTENTION"]

aten = torch.ops.aten
ATTENTION = RuleTable()


@ATTENTION.rule(
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


@ATTENTION.rule(
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


@ATTENTION.rule(aten.softmax.int, aten._softmax.default, status="declared",
           source="in units of its effect on an average of unit values (see _softmax_slope)")  # fmt: skip
def softmax(call: Call) -> Local:
    return Local(1.0, {"self": _softmax_slope(call, call.scale("self"))})


@ATTENTION.rule(aten.log_softmax.int, status="declared",
           source="logits less one number a row: their scale, and a change of them passes as it is")  # fmt: skip
def log_softmax(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 1.0})

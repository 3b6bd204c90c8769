"""Rules for attention: products of activations, softmax, and the two in one call."""

from __future__ import annotations

import math

import torch

from . import weight_atoms as atom_of
from .rules import Call, Local, RuleTable

__all__ = ["ATTENTION", "FUSED"]

aten = torch.ops.aten
ATTENTION = RuleTable()

#: what scaled_dot_product_attention becomes where a graph is traced below it
FUSED = tuple(
    getattr(aten, f"_scaled_dot_product_{name}").default
    for name in (
        "attention_math", "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
        "fused_attention_overrideable",
    )
)  # fmt: skip


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
    if call.is_average("self") or call.is_average(right):
        return Local(a * b, {"self": share * b, right: share * a})
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
    aten.scaled_dot_product_attention.default, "attention", *FUSED, status="declared",
    weights=dict.fromkeys(("attn_mask", "attn_bias", "bias", "bias1", "bias2", "bias3"), atom_of.logit_bias)
    | {"temperature": atom_of.multiplied},
    source="an average of v, so the scale of v; logits move by scale·√d_head·s per unit of q or k, their average by "
    "that times s_v "
    "(scale·d_head where scales are not tracked: arXiv 2405.14813, section 3.3); see _attention_share",
)  # fmt: skip
def attention(call: Call) -> Local:
    """``bias``: what is added to the logits; a common shift of them changes nothing, so it saturates no softmax.
    ``temperature``: a tensor that multiplies them. A soft cap bounds them."""
    facts = call["region"].facts if call["region"] else {"scale": call["scale"]}
    d = facts.get("width") or call.shape("query")[-1]
    scale = 1 / math.sqrt(d) if facts["scale"] is None else abs(facts["scale"])
    factor = scale * (math.sqrt(d) if call.convention.tracks_scales else d)
    q, k, v, share = call.scale("query"), call.scale("key"), call.scale("value"), _attention_share(call)
    temperature = call.scale("temperature") if call.is_tensor("temperature") else 1.0
    logits = temperature * factor * q * k
    row = share * v * _softmax_slope(call, min(logits, facts.get("cap") or logits))
    biases = {name: row * abs(c) for name, c in facts.get("biases", {}).items()}
    return Local(v, {"query": row * temperature * factor * k, "key": row * temperature * factor * q, "value": share,
                     "attn_mask": row, "attn_bias": row, "temperature": row * factor * q * k} | biases)  # fmt: skip


@ATTENTION.rule("weighted_average", status="declared",
                source="an average, so the scale of the values; as a product with rows of a softmax")  # fmt: skip
def weighted_average(call: Call) -> Local:
    v, share = call.scale("value"), _attention_share(call)
    return Local(v, {"weights": share * v, "value": share})


@ATTENTION.rule("linear_attention", status="declared",
                source="q kᵀ v over the sums of q kᵀ: an average of v with positive weights, whatever the sizes of q "
                "and k; shares as in softmax attention")  # fmt: skip
def linear_attention(call: Call) -> Local:
    v, share = call.scale("value"), _attention_share(call)
    return Local(v, {"query": share * v / call.scale("query"), "key": share * v / call.scale("key"), "value": share})


@ATTENTION.rule("smoothing", status="declared", weights={"gain": atom_of.multiplied},
                source="x + g (pool(x) - x) is between x and its averages over windows for g between 0 and 1, so at "
                "most x; the difference of white noise and its average over n has size √(1 - 1/n)")  # fmt: skip
def smoothing(call: Call) -> Local:
    s = call.scale("input")
    return Local(s, {"input": 1.0, "gain": s * math.sqrt(1 - 1 / int(call["region"].facts["window"]))})


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

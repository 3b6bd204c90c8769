"""Pass (rewrite): softmax attention written out, ``softmax(q kᵀ · c + mask) v``, becomes one call.

Scales before or after the mask, casts, dropout, views and exogenous masks are looked through. Attention with a
learned bias or a soft cap stays as it is: its parts have rules of their own that give the same numbers.

Assumes a functional graph and its flow. Promises the same outputs.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from modnorm_fx.regions import extract

from .canonicalize import CASTS, aten, is_call, number
from .flow import Flow

MATMULS = (aten.matmul.default, aten.bmm.default)
SOFTMAX = (aten.softmax.int, aten._softmax.default)
VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.reshape.default,
    aten.dropout.default,
    *CASTS,
)
MASKS = (
    aten.add.Tensor,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
)


def recognize_attention(module: fx.GraphModule, flow: Flow) -> int:
    """Rewrites ``module`` in place and returns how many attentions were found."""
    count = 0
    for node in list(module.graph.nodes):
        if not is_call(node, *MATMULS):
            continue
        found = _attention(node, flow)
        if found:
            query, key, value, factor, inside = found
            extract(module, "attention", inside, node, {"query": query, "key": key, "value": value}, {"scale": factor})
            count += 1
    return count


def _attention(output: fx.Node, flow: Flow) -> tuple[fx.Node, fx.Node, fx.Node, float, list[fx.Node]] | None:
    """(query, key, value, factor on the logits, nodes inside)."""
    inside: list[fx.Node] = [output]

    def through(node: Any, *targets: Any) -> Any:
        while is_call(node, *targets):
            inside.append(node)
            node = node.args[0]
        return node

    args: Any = output.args
    weights, value = args[:2]
    softmax = through(weights, *VIEWS)
    if (
        not is_call(softmax, *SOFTMAX)
        or softmax.args[1] not in (-1, softmax.meta["val"].dim() - 1)
        or not flow.signal(value)
    ):
        return None
    inside.append(softmax)
    node: Any = softmax.args[0]
    factor = 1.0
    while not is_call(node, *MATMULS):
        node = through(node, *VIEWS)
        if is_call(node, *MATMULS):
            break
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return None
        signals = [s for s in node.all_input_nodes if not flow.exogenous(s)]
        if len(signals) != 1:
            return None
        if is_call(node, aten.mul.Tensor, aten.mul.Scalar) and number(node.args[1]):
            factor *= float(node.args[1])
        elif is_call(node, aten.div.Tensor, aten.div.Scalar) and number(node.args[1]):
            factor /= float(node.args[1])
        elif not is_call(node, *MASKS):
            return None
        inside.append(node)
        node = signals[0]
    inside.append(node)
    args = node.args
    query, key = args[:2]
    if not (flow.signal(query) and flow.signal(key)):
        return None
    return query, key, value, factor, inside

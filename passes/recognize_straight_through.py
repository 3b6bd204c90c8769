"""Pass (rewrite): a straight-through estimator becomes one call.

``x + (q - x).detach()``, ``q - x.detach() + x``: the value is q (a rounded x, the nearest row of a codebook, a one-hot
choice), and the gradient is passed on to x. Taken as a sum, the output would be as large as x, √2 times over for every
quantiser in a row, and q would count beside it.

Assumes a functional ATen graph. Promises the same outputs (the region runs the ops it was cut from).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from modnorm_fx.regions import extract

from .canonicalize import aten, cone, is_call, strip
from .flow import Flow

#: what the names of ops that round to a grid and pass a gradient on have in common
QUANTISER = "fake_quantize_per_"


def recognize_straight_through(module: fx.GraphModule, flow: Flow) -> int:
    """Rewrites ``module`` in place and returns how many were found."""
    count = 0
    for node in list(module.graph.nodes):
        found = _match(node)
        if found is None:
            continue
        x, q, inside = found
        if not flow.signal(x) or x is q or node.meta["val"].shape != x.meta["val"].shape:
            continue
        extract(module, "straight_through", inside, node, {"input": x, "value": q})
        count += 1
    return count


def passed_on(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Of each straight-through estimator in a graph, written out or an op of its own (``fake_quantize``), the node that
    its gradient is passed on to."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        match = _match(node)
        if match is not None and match[0] is not match[1]:
            found[node] = match[0]
        elif node.op == "call_function" and QUANTISER in str(node.target):
            found[node] = node.all_input_nodes[0]
    return found


def _match(node: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """The x and the q of a straight-through estimator that ends in ``node``, and the ops that it is made of."""
    if not _plain(node, aten.add.Tensor, aten.sub.Tensor):
        return None
    left, right = node.args[:2]
    pairs: list[tuple[Any, Any]] = [(left, right), (right, left)] if is_call(node, aten.add.Tensor) else []
    for x, rest in pairs:
        inner: Any = _detached(rest)
        if _plain(inner, aten.sub.Tensor) and strip(inner.args[1]) is strip(x):  # x + (q - x).detach()
            return x, inner.args[0], _inside(node, x, inner.args[0])
        if _plain(rest, aten.sub.Tensor) and _detached(rest.args[1]) is strip(x):  # x + (q - x.detach())
            q: Any = rest.args[0]
            return x, q, _inside(node, x, q)
    if is_call(node, aten.sub.Tensor) and _plain(left, aten.add.Tensor):  # (q + x) - x.detach()
        total: Any = left
        for x, q in ((total.args[0], total.args[1]), (total.args[1], total.args[0])):
            if _detached(right) is strip(x):
                return x, q, _inside(node, x, q)
    return None


def _plain(node: Any, *targets: Any) -> bool:
    """A sum or difference of two tensors."""
    return is_call(node, *targets) and all(isinstance(a, fx.Node) for a in node.args[:2]) and not node.kwargs


def _detached(node: Any) -> Any:
    """What a detached value was, None where it is not detached."""
    node = strip(node)
    return strip(node.args[0]) if is_call(node, aten.detach.default) else None


def _inside(node: fx.Node, x: fx.Node, q: fx.Node) -> list[fx.Node]:
    return cone(node, lambda n: n in (x, q, strip(x), strip(q)))[0]

"""Pass (rewrite): ``x / sum(x)`` becomes one call.

Routing weights made to sum to 1, attention without a softmax, Sinkhorn iterations. Taken as a quotient, x counts twice,
and twenty iterations multiply the count by a thousand.

Assumes a functional ATen graph and its flow. Promises the same outputs (the region runs the ops it was cut from).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from modnorm_fx.regions import extract

from .canonicalize import aten, cone, is_call, number, strip
from .flow import Flow

#: what keeps a sum what it is
KEEPS = (aten.expand.default, aten.unsqueeze.default, aten.clamp_min.default, aten.clamp.default)
#: the most that may be added to the sum without a change of its meaning
EPSILON = 1e-2


def recognize_shares(module: fx.GraphModule, flow: Flow) -> int:
    """Rewrites ``module`` in place and returns how many quotients were found."""
    count = 0
    for node in list(module.graph.nodes):
        if not is_call(node, aten.div.Tensor):
            continue
        args: Any = node.args
        x, total = args[0], _total(args[1])
        if total is None or not flow.signal(x) or strip(total.args[0]) is not strip(x):
            continue
        start = x if total.args[0] is x else strip(x)
        inside, _ = cone(node, lambda n, start=start: n is start)  # type: ignore[misc]
        extract(module, "shares", inside, node, {"input": start}, {"axes": tuple(total.args[1])})
        count += 1
    return count


def _total(node: Any) -> Any:
    """The sum along axes that a divisor is."""
    while isinstance(node, fx.Node):
        node = strip(node, *KEEPS)
        if is_call(node, aten.sum.dim_IntList) and node.args[1]:
            return node
        if not (is_call(node, aten.add.Tensor, aten.add.Scalar) and number(node.args[1])):
            return None
        args: Any = node.args
        if abs(args[1]) > EPSILON:
            return None
        node = args[0]
    return None

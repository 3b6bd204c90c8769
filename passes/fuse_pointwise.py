"""Pass (rewrite): a scalar function spelled in several ops becomes one call.

GELU written with ``tanh`` and ``pow``, ``x * sigmoid(x)``, squared ReLU: every entry of the output is a function of
the same entry of one signal. The region is later run on quadrature nodes, so no name is needed. Single functions and
plain multiples are left alone: they have rules of their own. A sum with something that is not a function of the same
signal (a residual) ends a region.

Assumes a functional graph and its flow. Promises the same outputs.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from modnorm_fx.regions import extract
from modnorm_fx.rules import RuleTable, op_key

from .canonicalize import aten, is_call, number, shape
from .flow import Flow

LINEAR = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Scalar,
    aten.rsub.Scalar,
    aten.mul.Scalar,
    aten.div.Scalar,
)


def fuse_pointwise(module: fx.GraphModule, flow: Flow, *, rules: RuleTable, products_only: bool = False) -> int:
    """Rewrites ``module`` in place and returns how many regions were fused.

    Args:
        products_only: leave chains and sums of functions alone. The paper's recursion composes and adds declared
            sensitivities (its ``Abs @ GELU`` and ``½·Identity + ½·ReLU``); only products are outside of its algebra.
    """
    roots: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        root = _root(node, roots, flow, rules)
        if root is not None:
            roots[node] = root
    count = 0
    for node in list(module.graph.nodes):
        if node in roots and _ends(node, roots):
            output = _without_multiples(node, roots)
            if output is None:
                continue
            inside = _inside(output, roots)
            if _worthwhile(inside, products_only):
                extract(module, "pointwise", inside, output, {"input": roots[output]})
                count += 1
    return count


def _root(node: fx.Node, roots: dict[fx.Node, fx.Node], flow: Flow, rules: RuleTable) -> fx.Node | None:
    """The one signal that ``node`` is a scalar function of, or None."""
    if node.op != "call_function" or not flow.signal(node):
        return None
    row = rules.get(op_key(node.target))
    if not (is_call(node, *LINEAR) or (row is not None and row.pointwise)):
        return None
    sources = node.all_input_nodes
    found = {roots.get(source, source) for source in sources}
    if len(found) != 1:
        return None
    root = found.pop()
    return root if flow.signal(root) and _same_shape(node, root) else None


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return hasattr(b.meta.get("val"), "shape") and shape(a) == shape(b)


def _ends(node: fx.Node, roots: dict[fx.Node, fx.Node]) -> bool:
    return any(roots.get(user) is not roots[node] for user in node.users)


def _without_multiples(node: fx.Node, roots: dict[fx.Node, fx.Node]) -> fx.Node | None:
    while is_call(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor) and number(node.args[1]):
        args: Any = node.args
        node = args[0]
        if node not in roots:
            return None
    return node


def _inside(output: fx.Node, roots: dict[fx.Node, fx.Node]) -> set[fx.Node]:
    inside, todo = set(), [output]
    while todo:
        node = todo.pop()
        if node not in inside and roots.get(node) is roots[output]:
            inside.add(node)
            todo.extend(node.all_input_nodes)
    return inside


def _worthwhile(inside: set[fx.Node], products_only: bool) -> bool:
    """Two non-linear ops, or one with a product or sum of two functions of the signal; two multiples are not."""
    curved = sum(not is_call(node, *LINEAR) for node in inside)
    joined = [n for n in inside if is_call(n, *LINEAR) and len(n.args) > 1 and isinstance(n.args[1], fx.Node)]
    if products_only:
        return any(is_call(node, aten.mul.Tensor, aten.div.Tensor) for node in joined)
    return curved >= 2 or len(joined) >= 1

"""Pass (rewrite): a scalar function spelled in several ops becomes one call.

GELU written with ``tanh`` and ``pow``, ``x * sigmoid(x)``, squared ReLU: every entry of the output is a function of
the same entry of one signal. The region is later run on quadrature nodes, so no name is needed; for people it bears
that of the known function whose values it has. Single functions and
plain multiples are left alone: they have rules of their own. A sum with something that is not a function of the same
signal (a residual) ends a region.

Assumes a functional graph and its flow. Promises the same outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from modnorm_fx.regions import Region, extract
from modnorm_fx.rules import RuleTable, op_key

from .canonicalize import CASTS, aten, is_call, number, shape
from .flow import ARITHMETIC, Flow

#: functions that regions are named after
KNOWN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "squared_relu": lambda x: F.relu(x).square(),
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
}
#: largest difference to a known function at which a region bears its name; the usual approximation of GELU by tanh is
#: within 5e-4, and quick_gelu differs from GELU by 2e-2
ALIKE = 1e-3


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
                ops = sorted(inside)
                call = extract(module, "pointwise", inside, output, {"input": roots[output]})
                region: Any = module.get_submodule(str(call.target))
                region.facts["name"] = _name(region, ops)
                count += 1
    return count


def _name(region: Region, inside: Sequence[fx.Node]) -> str:
    """The known function that the region is, or ``pointwise(tanh, pow)`` by its ops that are no arithmetic."""
    z = torch.linspace(-4, 4, 33)
    values = region(z).float()
    for name, known in KNOWN.items():
        if values.shape == z.shape and torch.allclose(values, known(z), rtol=0, atol=ALIKE):
            return name
    ops = [str(getattr(n.target, "_opname", n.target)) for n in inside if not is_call(n, *ARITHMETIC, *CASTS)]
    return f"pointwise({', '.join(dict.fromkeys(ops)) or 'polynomial'})"


def _root(node: fx.Node, roots: dict[fx.Node, fx.Node], flow: Flow, rules: RuleTable) -> fx.Node | None:
    """The one signal that ``node`` is a scalar function of, or None."""
    if node.op != "call_function" or not flow.signal(node):
        return None
    row = rules.get(op_key(node.target))
    if not (is_call(node, *ARITHMETIC) or (row is not None and row.pointwise)):
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
    curved = sum(not is_call(node, *ARITHMETIC) for node in inside)
    joined = [n for n in inside if is_call(n, *ARITHMETIC) and len(n.args) > 1 and isinstance(n.args[1], fx.Node)]
    if products_only:
        return any(is_call(node, aten.mul.Tensor, aten.div.Tensor) for node in joined)
    return curved >= 2 or len(joined) >= 1

"""Pass (rewrite): rotary position embeddings, in any of their spellings, become one call.

``x*cos + rotate_half(x)*sin``, ``cat(x1*cos - x2*sin, x2*cos + x1*sin)``, the interleaved form, the partial form that
leaves some features alone, and the complex form. What they share: the output is linear in one signal x with exogenous
coefficients, has as many entries as x, and a sign is flipped on the way.

Assumes a functional graph and its flow. Promises the same outputs.
"""

from __future__ import annotations

from torch import fx

from modnorm_fx.regions import extract

from .canonicalize import CASTS, aten, is_call
from .flow import Flow

MOVES = CASTS | {
    aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.cat.default,
    aten.stack.default, aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.select.int, aten.unbind.int, aten.flatten.using_ints, aten.transpose.int,
    aten.permute.default, aten.view_as_complex.default, aten.view_as_real.default, aten.unflatten.int,
}  # fmt: skip
SIGNS = frozenset({aten.neg.default, aten.sub.Tensor})
SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
ENDS = (aten.cat.default, aten.add.Tensor, aten.flatten.using_ints, aten.view.default, aten.stack.default)
#: the longest spelling seen has 19 nodes
LONGEST = 40


def recognize_rotary(module: fx.GraphModule, flow: Flow) -> int:
    """Rewrites ``module`` in place and returns how many rotations were found. The last node of a spelling wins."""
    count = 0
    gone: set[fx.Node] = set()
    for node in reversed(list(module.graph.nodes)):
        if node in gone or not is_call(node, *ENDS) or not flow.signal(node):
            continue
        found = _rotation(node, flow)
        if found is None:
            continue
        start, inside = found
        extract(module, "rotary", inside, node, {"input": start})
        gone.update(n for n in inside if n is node or not n.users)
        count += 1
    return count


def _rotation(output: fx.Node, flow: Flow) -> tuple[fx.Node, list[fx.Node]] | None:
    frontier = {output}
    inside: list[fx.Node] = []
    products = signs = 0
    while len(inside) < LONGEST:
        node = max(frontier)
        if len(frontier) == 1 and products >= 2 and signs >= 1 and _size(node) == _size(output):
            return node, inside
        frontier.remove(node)
        sources = [s for s in node.all_input_nodes if flow.signal(s)]
        if not sources or not _linear(node, sources):
            return None
        complex_product = is_call(node, aten.mul.Tensor) and node.meta["val"].is_complex()
        products += 2 * complex_product or is_call(node, aten.mul.Tensor)
        signs += bool(complex_product) or (node.target in SIGNS)
        inside.append(node)
        frontier.update(sources)
    return None


def _linear(node: fx.Node, sources: list[fx.Node]) -> bool:
    if is_call(node, aten.mul.Tensor):  # by an exogenous tensor
        return len(sources) == 1 and len(node.all_input_nodes) == 2
    if node.target in SUMS:
        return len(sources) == 2
    return is_call(node, *MOVES, aten.neg.default) or getattr(node.target, "__name__", "") == "getitem"


def _size(node: fx.Node) -> int:
    return node.meta["val"].numel() if hasattr(node.meta["val"], "numel") else -1

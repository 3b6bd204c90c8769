"""Pass (rewrite): ``x.type_as(y)`` and ``x.to(y)`` become casts to the type that y has.

A cast then looks the same to all later passes however it was written, and y is not read for its type.

Assumes the graph as captured, whose types are known. Promises the same outputs.
"""

from __future__ import annotations

from torch import fx

from .canonicalize import aten, is_call


def write_casts(module: fx.GraphModule) -> int:
    """Rewrites ``module`` in place and returns how many casts took their type from a tensor."""
    graph = module.graph
    like = [node for node in graph.nodes if is_call(node, aten.type_as.default, aten.to.other)]
    for node in like:
        with graph.inserting_before(node):
            cast = graph.call_function(aten.to.dtype, (node.args[0], node.meta["val"].dtype))
        cast.meta = dict(node.meta)
        node.replace_all_uses_with(cast)
        graph.erase_node(node)
    return len(like)

"""Pass (rewrite): no tensor is read for its type alone.

``x.type_as(y)`` becomes a cast to the type that y has, and a new tensor in the type of y takes it from an input of the
graph: y is then used for what it holds and nothing else, and a cast looks the same however it was written.

Assumes the graph as captured, whose types are known. Promises the same outputs.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from .canonicalize import aten

#: casts to the type of another tensor
LIKE = frozenset({aten.type_as.default, aten.to.other})
#: tensors in the type of their first argument, of which they take nothing else
NEW = frozenset({aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default})


def release_types(module: fx.GraphModule) -> int:
    """Rewrites ``module`` in place and returns how many tensors lent their type."""
    graph = module.graph
    inputs = list(graph.find_nodes(op="placeholder"))
    count = 0
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.args else None
        if node.target in LIKE:
            with graph.inserting_before(node):
                cast = graph.call_function(aten.to.dtype, (source, node.meta["val"].dtype))
            cast.meta = dict(node.meta)
            node.replace_all_uses_with(cast)
            graph.erase_node(node)
            count += 1
        elif node.target in NEW:
            same = (i for i in inputs if getattr(i.meta.get("val"), "dtype", None) == source.meta["val"].dtype)
            node.replace_input_with(source, next(same, source))
            count += node.args[0] is not source
    return count

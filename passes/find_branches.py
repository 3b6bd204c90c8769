"""Pass: how many residual branches share a stream, and which weights write them.

A stream is a chain of sums ``h + f(h)``; casts, views, dropout and relu (branches add up through it, as it is
homogeneous) leave it the same stream, anything else (a norm layer, a projected shortcut) ends it. What writes a branch
are the last weights of ``f``, behind which nothing changes its scale but numbers, gates and sums: a matrix, experts, a
LayerScale, the gain of a norm layer.

Assumes typed weights. Promises the number of branches of its stream for every use of a weight that writes a branch, for
streams in which every branch is written by weights; others are left out, since scaling some of their branches alone
would drown those.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from operator import getitem

from torch import fx

from modnorm_fx.atoms import Conv, Experts, Gain, Linear, PatchConv, Reshaped
from modnorm_fx.rules import RuleTable

from .canonicalize import CASTS, aten, shape
from .flow import Flow
from .type_atoms import Weight

__all__ = ["find_branches"]

#: weight key, index of the use
Use = tuple[str, int]

WRITERS = (Linear, Conv, PatchConv, Experts, Gain)
SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
COPIED = frozenset({*CASTS, aten.type_as.default, aten.dropout.default})
#: what a stream passes without ending
PASSED = COPIED | {aten.relu.default}
#: what a branch may pass behind its last weight: copies and sums of its entries
MOVED = frozenset(
    {
        *COPIED, getitem, aten.roll.default, aten.index.Tensor, aten.sum.dim_IntList, aten.masked_fill.Scalar,
        aten.constant_pad_nd.default, aten.pad.default,
    }
)  # fmt: skip
PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})


def find_branches(graph: fx.Graph, flow: Flow, weights: Sequence[Weight], *, rules: RuleTable) -> dict[Use, int]:
    """(weight key, index of the use) -> number of branches of the stream that it writes to."""
    uses: dict[fx.Node, list[Use]] = defaultdict(list)
    for w in weights:
        for i, (node, _, atom) in enumerate(w.uses):
            shifted = any(affine.shift for affine in w.affine[i : i + 1])  # 1 + g, which starts at g = 0
            if isinstance(atom.inner if isinstance(atom, Reshaped) else atom, WRITERS) and not shifted:
                uses[node].append((w.key, i))
    bit = {node: 1 << i for i, node in enumerate(graph.nodes)}
    above: dict[fx.Node, int] = {}  # a node and all it depends on
    start: dict[fx.Node, fx.Node] = {}  # sum of a stream -> where the stream starts
    count: Counter[fx.Node] = Counter()
    writers: dict[fx.Node, set[Use]] = defaultdict(set)
    whole: dict[fx.Node, bool] = defaultdict(lambda: True)
    for node in graph.nodes:
        above[node] = bit[node]
        for before in node.all_input_nodes:
            above[node] |= above[before]
        for stream, branch in _as_residual(node):
            source = _source(stream, rules)
            first = start.get(source, source)
            if not above[branch] & bit[first] or _source(branch, rules) in (source, first):
                continue
            found = _writers(branch, flow, uses, rules)
            start[node] = first
            count[first] += 1
            writers[first].update(found)
            whole[first] &= bool(found)
            break
    return {use: count[first] for first, found in writers.items() if whole[first] for use in found}


def _as_residual(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(stream, branch): both ways to read a sum of two tensors of its shape."""
    if node.op != "call_function" or node.target not in SUMS:
        return
    a, b = node.args[:2]
    if isinstance(a, fx.Node) and isinstance(b, fx.Node) and shape(a) == shape(b) == shape(node):
        yield a, b
        yield b, a


def _source(node: fx.Node, rules: RuleTable) -> fx.Node:
    """The value that the stream has at a node."""
    while node.op == "call_function" and (node.target in PASSED or _is_view(node, rules)):
        node = node.all_input_nodes[0]
    return node


def _is_view(node: fx.Node, rules: RuleTable) -> bool:
    return node.target in rules and rules[node.target].view


def _writers(node: fx.Node, flow: Flow, uses: Mapping[fx.Node, list[Use]], rules: RuleTable) -> list[Use]:
    """The last weights on the way to a value; none where it cannot be said. Each term of a sum has its own."""
    if uses.get(node):
        return uses[node]
    if node.op != "call_function":
        return []
    signals = [n for n in node.all_input_nodes if flow.signal(n)]
    if node.target in SUMS:
        found = [_writers(n, flow, uses, rules) for n in signals]
        return [use for part in found for use in part] if all(found) else []
    if node.target in PRODUCTS:  # by a number, or by a gate that is the same for all features
        signals = [n for n in signals if shape(n) == shape(node)]
    elif not (node.target in MOVED or _is_view(node, rules)):
        return []
    return _writers(signals[0], flow, uses, rules) if len(signals) == 1 else []

"""Pass: how many residual branches share a stream, and which weights write them.

A stream is a chain of sums ``h + f(h)``; casts, views, dropout and relu (branches add up through it, as it is
homogeneous) leave it the same stream, anything else (a norm layer, a projected shortcut) ends it. What writes a branch
are the last weights of ``f``, behind which nothing changes its scale but numbers, gates and sums: a matrix, experts, a
LayerScale, the gain of a norm layer.

Assumes typed weights. Promises every stream, with the uses of weights that write its branches and the branches that no
weight writes. A stream with such a branch is left as it is (``written``): smaller ones beside it would be drowned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import getitem

from torch import fx

from modnorm_fx.atoms import Conv, Experts, Gain, Linear, PatchConv, Reshaped
from modnorm_fx.rules import RuleTable

from .canonicalize import CASTS, aten, shape
from .flow import Flow
from .type_atoms import Weight

__all__ = ["Stream", "Use", "dependencies", "find_branches", "written"]

#: weight key, index of the use
Use = tuple[str, int]

WRITERS = (Linear, Conv, PatchConv, Experts, Gain)
SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
COPIED = frozenset({*CASTS, aten.dropout.default})
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


@dataclass
class Stream:
    """A residual stream: its first value, how many branches it has, which uses of weights write them, and the branches
    (as the nodes that are added) of which that cannot be said."""

    first: fx.Node
    count: int = 0
    writers: set[Use] = field(default_factory=set)
    unwritten: list[fx.Node] = field(default_factory=list)


def written(streams: Iterable[Stream]) -> dict[Use, int]:
    """(weight key, index of the use) -> number of branches of the stream that it writes to, where weights write all."""
    return {use: s.count for s in streams if not s.unwritten for use in s.writers}


def find_branches(graph: fx.Graph, flow: Flow, weights: Sequence[Weight], *, rules: RuleTable) -> list[Stream]:
    """The streams that carry signals, in order."""
    uses: dict[fx.Node, list[Use]] = defaultdict(list)
    for w in weights:
        for i, (node, _, atom) in enumerate(w.uses):
            shifted = any(affine.shift for affine in w.affine[i : i + 1])  # 1 + g, which starts at g = 0
            if isinstance(atom.inner if isinstance(atom, Reshaped) else atom, WRITERS) and not shifted:
                uses[node].append((w.key, i))
    bit, above = dependencies(graph)
    streams: dict[fx.Node, Stream] = {}  # by their first value and by each sum
    for node in graph.nodes:
        for so_far, branch in _as_residual(node) if flow.signal(node) else ():
            source = _source(so_far, rules)
            stream = streams.get(source) or Stream(source)
            if not above[branch] & bit[stream.first] or _source(branch, rules) in (source, stream.first):
                continue
            found = _writers(branch, flow, uses, rules)
            stream.count += 1
            stream.writers.update(found)
            stream.unwritten += [] if found else [branch]
            streams[stream.first] = streams[node] = stream
            break
    return [stream for first, stream in streams.items() if first is stream.first]


def dependencies(graph: fx.Graph) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
    """A bit for each node, and the bits of each node and all that it depends on."""
    bit = {node: 1 << i for i, node in enumerate(graph.nodes)}
    above: dict[fx.Node, int] = {}
    for node in graph.nodes:
        above[node] = bit[node]
        for before in node.all_input_nodes:
            above[node] |= above[before]
    return bit, above


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

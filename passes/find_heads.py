"""Pass: which matrices make queries or keys, and of how many heads.

The logits of a head depend on its own features of the query and the key alone, and a step of norm 1 of the matrix that
makes those of H heads can move one head's by √H times their scale: the matrix is measured by the RMS over all heads. So
each head's counts, which is √H times the sensitivity (``Convention.heads``).

From the operands of every softmax attention the pass goes back, through views, joins, rotations, norm layers and
pointwise ops, to the matrices that made them, and follows the features of one head on the way.

Assumes typed weights and feature axes. Promises the number of heads for every such use of a matrix, and the operands
behind which none was found (they keep the sensitivity that they have).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import fx

from modnorm_fx.atoms import Conv, Experts, Linear, PatchConv, Reshaped
from modnorm_fx.attention_rules import FUSED
from modnorm_fx.rules import RuleTable, arguments, operands, shape_of

from .canonicalize import CASTS, aten
from .feature_axes import MOVES, RESHAPES, SPATIAL, Axes, regroup
from .find_branches import SUMS, Use, dependencies
from .flow import Flow
from .type_atoms import Weight

__all__ = ["Heads", "find_heads"]

ATTENTION = frozenset({"attention", aten.scaled_dot_product_attention.default, *FUSED})
MATRICES = (Linear, Conv, PatchConv, Experts)
PARTS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.slice.Tensor})
JOINS = frozenset({aten.cat.default, aten.slice_scatter.default})
#: copies of a head's features for several heads of queries (``expand`` makes them as well)
COPIES = frozenset({aten.repeat.default, aten.repeat_interleave.self_int})
#: what works on each entry, or on the features of a head or of all heads, without mixing heads by learned numbers
PASSED = SPATIAL | CASTS | {
    aten.layer_norm.default, aten.rms_norm.default, aten.dropout.default, aten.roll.default,
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar,
    aten.constant_pad_nd.default, aten.pad.default, aten.where.self, aten.masked_fill.Scalar,
}  # fmt: skip


@dataclass
class Heads:
    """What the pass found.

    Attributes:
        of: (weight key, index of the use) -> number of heads of the queries or keys that the matrix makes.
        lost: (attention, operand) behind which there is no matrix that the pass could find, or one that makes values
            as well, or none that makes whole heads.
    """

    of: dict[Use, int] = field(default_factory=dict)
    lost: list[tuple[fx.Node, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """The axes of a node's value that hold the features of a head, of which it has ``size``."""

    node: fx.Node
    axes: Axes
    size: int


def find_heads(
    module: fx.GraphModule, flow: Flow, weights: Sequence[Weight], axes: Mapping[fx.Node, Axes], *, rules: RuleTable
) -> Heads:
    """All attentions whose softmax the graph still has as one call."""
    makers: dict[fx.Node, list[Use]] = defaultdict(list)
    for w in weights:
        for i, (node, _, atom) in enumerate(w.uses):
            layer = atom.inner if isinstance(atom, Reshaped) else atom
            if isinstance(layer, MATRICES) and not (isinstance(layer, Conv) and layer.groups > 1):
                makers[node].append((w.key, i))
    found = Heads()
    walk = _Walk(module, flow, makers, rules, *dependencies(module.graph))
    for node in module.graph.nodes:
        if node.op not in ("call_function", "call_module"):
            continue
        key, args = arguments(node, module)
        if key not in ATTENTION:
            continue
        value = args["value"]
        whole = _Place(value, axes.get(value, frozenset()), math.prod(shape_of(value)[a] for a in axes.get(value, ())))
        packed = {place.node for place in walk.origins(whole)}
        for name in ("query", "key"):
            source = args[name]
            summed = args["region"].facts["summed"][name] if key == "attention" else -1
            axis = summed % len(shape_of(source))
            start = _Place(source, frozenset({axis}), shape_of(source)[axis])
            counts = {
                place.node: count
                for place in walk.origins(start)
                if place.node in makers and place.node not in packed and (count := _count(place, axes))
            }
            if not counts and flow.signal(source):
                found.lost.append((node, name))
            for maker, count in counts.items():
                for use in makers[maker]:
                    found.of[use] = max(count, found.of.get(use, 1))
    return found


def _count(place: _Place, axes: Mapping[fx.Node, Axes]) -> int:
    """How many heads have their features in the output of a matrix; 0 if it does not consist of whole heads."""
    if not place.axes & axes[place.node]:
        return 0
    count, rest = divmod(math.prod(shape_of(place.node)[a] for a in axes[place.node]), place.size)
    return 0 if rest else count


@dataclass(frozen=True)
class _Walk:
    """From the features of a head back to what made them; ``bit`` and ``above`` as ``dependencies`` gives them."""

    module: fx.GraphModule
    flow: Flow
    makers: Mapping[fx.Node, Any]
    rules: RuleTable
    bit: Mapping[fx.Node, int]
    above: Mapping[fx.Node, int]

    def origins(self, start: _Place) -> Iterator[_Place]:
        """The places that the pass cannot go behind, matrices among them."""
        todo, seen = [start], {start}
        while todo:
            place = todo.pop()
            before = [] if place.node in self.makers else list(self.behind(place))
            if not before:
                yield place
            todo += [p for p in before if p not in seen]
            seen.update(before)

    def behind(self, place: _Place) -> Iterator[_Place]:
        """The same features in the operands that an op moves or changes entry by entry; none for other ops, and none
        for the sums of a residual stream, which holds more than queries or keys."""
        node, axes, size = place.node, place.axes, place.size
        if node.op not in ("call_function", "call_module"):
            return
        key, args = arguments(node, self.module)
        signals = [n for _, n in operands(args) if self.flow.signal(n)]
        if not signals or (key in SUMS and self._is_residual(signals)):
            return
        source, after = signals[0], shape_of(node)
        before = shape_of(source)
        if key in RESHAPES or key == "rotary":
            yield _Place(source, regroup(after, before, axes), size)
        elif key in MOVES:
            move: Any = node.target
            moved = move(torch.empty([a + 1 for a in range(len(before))], device="meta"), *node.args[1:], **node.kwargs)
            yield _Place(source, frozenset(moved.shape[a] - 1 for a in axes), size)
        elif key is aten.copy.default:
            yield _Place(args["src"], axes, size)
        elif key is getitem and source.target in SPATIAL:
            yield _Place(source, axes, size)
        elif key is getitem and source.target is aten.unbind.int:
            _, unbound = arguments(source, self.module)
            yield _Place(unbound["self"], _with_axis(axes, unbound["dim"] % (len(after) + 1)), size)
        elif key is aten.select.int:
            yield _Place(source, _with_axis(axes, args["dim"] % len(before)), size)
        elif key is aten.unsqueeze.default:
            at = args["dim"] % len(after)
            yield _Place(source, frozenset(a - (a > at) for a in axes if a != at), size)
        elif key in COPIES:  # new axes in front; other axes are longer
            own = frozenset(a - len(after) + len(before) for a in axes)
            copied = {a for a in own if a >= 0 and before[a] != after[a + len(after) - len(before)]}
            if min(own, default=0) >= 0 and not copied:
                yield _Place(source, own, size)
        elif key in PARTS or key in JOINS or (key is getitem and source.target in PARTS):
            merged = math.prod(after[a] for a in axes) != size
            for n in source.all_input_nodes if key is getitem else signals:
                resized = any(shape_of(n)[a] != after[a] for a in axes)
                if not (resized and merged):
                    yield _Place(n, axes, math.prod(shape_of(n)[a] for a in axes) if resized else size)
        elif (
            key is aten.expand.default
            or key in PASSED
            or node.op == "call_module"
            or (key in self.rules and self.rules[key].pointwise)
        ):
            for n in signals:
                shift = len(after) - len(shape_of(n))
                own = frozenset(a - shift for a in axes)
                if all(a >= 0 and shape_of(n)[a] == after[a + shift] for a in own):
                    yield _Place(n, own, size)

    def _is_residual(self, terms: Sequence[fx.Node]) -> bool:
        """Whether one of two terms is computed from the other."""
        return len(terms) == 2 and any(self.above[a] & self.bit[b] for a, b in (terms, terms[::-1]))


def _with_axis(axes: Axes, at: int) -> Axes:
    """The same axes of a value that has one more, at ``at``."""
    return frozenset(a + (a >= at) for a in axes)

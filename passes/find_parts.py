"""Pass: where the places of one signal are taken apart and joined again.

A stream may be taken apart by its places and put together again: a class token beside its patches
(``cat([x[:, :1], x[:, 1:] + f(x[:, 1:])], 1)``), the tokens of an expert (``y[i] += f(x[i])``), the places of a mask
(``where(m, f(x), x)``). A change of the stream then reaches the whole by several paths that meet at no place, so that
they count together as much as one: each by the root of its share f of their places. Operands that come from different
signals (a class token joined with patches) are not of this kind.

Where the share is counted depends on what picks the places. Slices pick certain ones, which a head may read alone: the
slice passes √f, and a layer that works on the slice keeps all of its effect. Indices and masks pick places like any
others, and their join passes √f, as ``index_add`` does.

To be found, operands must be computed from the same signal place by place: through views, picks, sums, pointwise ops,
norm layers, layers without a window and other joins. Attention, convolutions and reductions mix places and end the
search.

Assumes a functional graph, its flow and its feature axes. Promises, for the operands of joins and picks that pass less
than all, their share of the places.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import getitem

from torch import fx

from modnorm_fx.reduction_rules import WRITES
from modnorm_fx.rules import Operand, RuleTable, arguments, operands, shape_of

from .canonicalize import CASTS, aten, is_call, strip
from .feature_axes import Axes
from .flow import Flow

__all__ = ["Parts", "find_parts"]

#: join or pick -> operand -> its share of the places of a signal that it and others hold
Parts = dict[fx.Node, dict[Operand, float]]

CHOICES = frozenset({aten.where.self, aten.masked_scatter.default})
#: ops that pick places of their first operand, by an index
PICKS = frozenset({aten.index.Tensor, aten.gather.default, aten.index_select.default, aten.masked_select.default})
SLICES = frozenset({aten.slice.Tensor, aten.select.int, aten.narrow.default})
SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int})
#: ops that keep places apart, of all operands that have those of the output
PASSED = frozenset(
    {
        *CASTS, aten.dropout.default, aten.layer_norm.default,
        aten.rms_norm.default, aten.softmax.int, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor,
        aten.mul.Scalar, aten.div.Scalar, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.ScalarOther,
        aten.where.ScalarSelf, "rms_norm", "layer_norm", "mean_subtract", "rotary", "pointwise", "straight_through",
    }
)  # fmt: skip
#: ops that do so where all but one operand are weights
LAYERS = frozenset(
    {
        aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default,
        aten.baddbmm.default, aten.einsum.default, aten._grouped_mm.default,
    }
)  # fmt: skip
#: joins and copies of places
GATHERED = frozenset(
    {
        aten.cat.default, aten.stack.default, aten.index_add.default, aten.scatter_add.default, aten.pad.default,
        aten.constant_pad_nd.default, aten.roll.default, aten.flip.default,
    }
)  # fmt: skip


def find_parts(module: fx.GraphModule, flow: Flow, axes: Mapping[fx.Node, Axes], *, rules: RuleTable) -> Parts:
    """The joins of which at least two operands hold places of one signal, and the slices that took them apart."""
    search = _Search(module, axes)
    for node in module.graph.nodes:
        if flow.signal(node):
            search.add(node, list(_place_by_place(node, module, flow, rules)))
    for node in search.bit:
        if is_call(node, aten.cat.default):
            search.cat(node)
        elif is_call(node, *CHOICES):
            search.choice(node)
    for chain in search.chains():
        search.writes(chain)
    return dict(search.found)


def _place_by_place(node: fx.Node, module: fx.GraphModule, flow: Flow, rules: RuleTable) -> Iterator[fx.Node]:
    """The signals whose places a value has, each computed from what stood there."""
    if node.op not in ("call_function", "call_module"):
        return
    key, args = arguments(node, module)
    signals = [n for _, n in operands(args) if flow.signal(n)]
    row = rules.get(key)
    if key in PICKS:
        yield from signals[:1]
    elif key is aten.copy.default:  # what was there is gone
        yield from (n for n in signals if n is args["src"])
    elif key is getitem or key in GATHERED or key in WRITES or (row is not None and row.view):
        yield from signals
    elif key in LAYERS or str(key) == "transformers.grouped_mm_fallback.default":
        yield from signals if len(signals) == 1 else ()
    elif key in PASSED or key in CHOICES or (row is not None and row.pointwise):
        yield from (n for n in signals if len(signals) == 1 or shape_of(n) == shape_of(node))


@dataclass
class _Search:
    """Of the signals so far: ``sources``, what each was computed from place by place, ``bit``, one for each, and
    ``reach``, the bits of it and of all that lies behind it; ``counts``, how many parts a choice was made of."""

    module: fx.GraphModule
    axes: Mapping[fx.Node, Axes]
    found: defaultdict[fx.Node, dict[Operand, float]] = field(default_factory=lambda: defaultdict(dict))
    sources: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    bit: dict[fx.Node, int] = field(default_factory=dict)
    reach: dict[fx.Node, int] = field(default_factory=dict)
    counts: dict[fx.Node, int] = field(default_factory=dict)

    def add(self, node: fx.Node, sources: list[fx.Node]) -> None:
        self.sources[node], self.bit[node] = sources, 1 << len(self.bit)
        self.reach[node] = self.bit[node]
        for source in sources:
            self.reach[node] |= self.reach[source]

    def meet(self, a: fx.Node, b: fx.Node) -> bool:
        return bool(self.reach.get(a, 0) & self.reach.get(b, 0))

    def behind(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether ``node`` was computed from ``source``, place by place."""
        return bool(self.reach.get(node, 0) & self.bit.get(source, 0))

    def groups(self, nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
        """Those that have a signal in common, directly or by others in between; the others are left out."""
        groups: list[list[fx.Node]] = []
        for node in nodes:
            meeting = [group for group in groups if any(self.meet(node, other) for other in group)]
            groups = [g for g in groups if g not in meeting] + [[n for g in meeting for n in g] + [node]]
        return [group for group in groups if len(group) > 1]

    def cat(self, node: fx.Node) -> None:
        """By sizes along the axis. Parts along features, and parts of equal size, have their shares by cat's rule."""
        _, args = arguments(node, self.module)
        tensors: list[fx.Node] = args["tensors"]
        axis = int(args["dim"] or 0) % len(shape_of(node))
        parts = [n for n in tensors if n in self.bit and len(shape_of(n)) == len(shape_of(node))]
        sizes = {n: shape_of(n)[axis] for n in parts}
        equal = len(parts) == len(tensors) and len(set(sizes.values())) == 1
        if equal or axis in self.axes.get(node, frozenset()):
            return
        for group in self.groups(parts):
            whole = max(1, sum(sizes[n] for n in group))
            for n in group:
                reads = self.reads(n, [other for other in group if other is not n])
                for read in reads:
                    self.share(read, sizes[n] / whole)
                if not reads:
                    self.found[node] |= {("tensors", i): sizes[n] / whole for i, t in enumerate(tensors) if t is n}

    def reads(self, part: fx.Node, others: Iterable[fx.Node]) -> list[fx.Node]:
        """The slices that took the part from signals that others hold as well."""
        shared = 0
        for other in others:
            shared |= self.reach.get(other, 0)
        todo, seen, found = [part], {part}, []
        while todo:
            node = todo.pop()
            if self.is_slice(node) and self.bit.get(node.all_input_nodes[0], 0) & shared:
                found.append(node)
                continue
            before = [n for n in self.sources[node] if n not in seen and self.reach[n] & shared]
            seen.update(before)
            todo += before
        return found

    def is_slice(self, node: fx.Node) -> bool:
        """Whether a node holds certain places of another, by their positions."""
        _, args = arguments(node, self.module) if node.op == "call_function" else (None, {})
        if node.target is getitem and is_call(node.args[0], *SPLITS):
            _, args = arguments(node.args[0], self.module)
        elif node.target not in SLICES:
            return False
        source = args["self"]
        return int(args["dim"]) % len(shape_of(source)) not in self.axes.get(source, frozenset())

    def share(self, read: fx.Node, share: float) -> None:
        """Lets a slice pass the root of a share; of several joins the largest."""
        name = "arg0" if read.target is getitem else "self"
        self.found[read][name, None] = max(share, self.found[read].get((name, None), 0.0))

    def choice(self, node: fx.Node) -> None:
        """Equal shares, since the mask is data; so have all parts that are chosen one after the other (`counts`). By
        the number of entries where those to be filled in stand in a row and are fewer."""
        _, args = arguments(node, self.module)
        filled = node.target is aten.masked_scatter.default
        names = ("self", "source" if filled else "other")
        a, b = (args[name] for name in names)
        if not self.meet(a, b):
            return
        entries = math.prod(shape_of(b)), math.prod(shape_of(a))
        if filled and 0 < entries[0] < entries[1]:
            share = entries[0] / entries[1]
        elif self.behind(a, b) or self.behind(b, a):  # a signal, and what becomes of it
            share = 0.5
        else:
            self.counts[node] = self.counts.get(a, 1) + self.counts.get(b, 1)
            share = self.counts.get(b, 1) / self.counts[node]
        self.found[node] |= {(names[0], None): 1 - share, (names[1], None): share}

    def chains(self) -> list[list[fx.Node]]:
        """Runs of writes into one tensor: each into what the last one left, which nothing but the next one reads."""
        chains: dict[fx.Node, list[fx.Node]] = {}
        for node in self.bit:
            if (written := self.written(node)) is None:
                continue
            before, source = self.read_back(written[0]), written[1]
            chain = chains.get(before)
            if chain is not None and (self.spent(before, node) or self.behind(source, before)):
                chain.append(node)
            else:
                chain = [node]
            chains[node] = chain
        return list({id(chain): chain for chain in chains.values()}.values())

    def spent(self, node: fx.Node, write: fx.Node) -> bool:
        """Whether nothing reads ``node`` but a write into it: ``y[:, t] = h`` also reads what it then copies over."""
        for user in node.users:
            if user is write or self.holds(user, write):
                continue
            over = is_call(user, aten.copy.default) and user.args[1] is not node
            passes = is_call(user, *SLICES, *WRITES, *CASTS)
            if not (over or (passes and self.spent(user, write))):
                return False
        return True

    def holds(self, node: fx.Node, write: fx.Node) -> bool:
        """Whether what a write writes is another, or holds it in turn (of a slice of a slice)."""
        written = self.written(node)
        return written is not None and (written[1] is write or self.holds(written[1], write))

    def writes(self, chain: list[fx.Node]) -> None:
        """By the number of entries. ``self`` keeps the rest where it held the signal everywhere: where it was there
        before the first write, or where what is written was computed from what stood there. Places that are written one
        after the other into an empty tensor leave each other as they are."""
        written = {node: found for node in chain if (found := self.written(node))}
        start = written[chain[0]][0]
        for group in self.groups(dict.fromkeys([start, *(source for _, source in written.values())])):
            for node, (before, source) in written.items():
                if source not in group:
                    continue
                share = min(1.0, math.prod(shape_of(source)) / max(1, math.prod(shape_of(node))))
                others = [before, *(other for other in group if other is not source)]
                reads = self.reads(source, others) if self.along_places(node) else []
                for read in reads:
                    self.share(read, share)
                if not reads:
                    self.found[node][WRITES[node.target], None] = share
                if start in group or self.behind(source, before):
                    self.found[node]["self", None] = 1 - share

    def along_places(self, node: fx.Node) -> bool:
        """Whether a slice of places is written over (one of features passes its share by the rule)."""
        _, args = arguments(node, self.module)
        features = self.axes.get(node, frozenset())
        return is_call(node, aten.slice_scatter.default) and int(args["dim"]) % len(shape_of(node)) not in features

    def written(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """What a write writes over, and what with."""
        if node.op != "call_function" or node.target not in WRITES:
            return None
        _, args = arguments(node, self.module)
        source = args[WRITES[node.target]]
        return None if args.get("accumulate") or not isinstance(source, fx.Node) else (args["self"], source)

    def read_back(self, node: fx.Node) -> fx.Node:
        """What was written to the very places that a slice reads (``y[a:b][i] = f``, time and again)."""
        while is_call(node := strip(node), aten.slice.Tensor, aten.select.int):
            args = arguments(node, self.module)[1]
            source = strip(args["self"])
            if not is_call(source, aten.slice_scatter.default, aten.select_scatter.default):
                break
            written = arguments(source, self.module)[1]
            if {k: v for k, v in written.items() if k != "src"} != args | {"self": written["self"]}:
                break
            node = written["src"]
        return node

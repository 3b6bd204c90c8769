"""Views as data: what a chain of view ops does to a tensor, read off sizes, strides and offset of a meta tensor.

A view is a box of indices: ``size``, ``stride`` and ``offset`` into contiguous storage. Running the graph's own view
ops on a meta tensor therefore tells which entries of a weight (or features of an output) reach a node, exactly and
without touching data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from modnorm_fx.atoms import Atom, Reshaped, Slice
from modnorm_fx.rules import RuleTable, op_key

from .canonicalize import aten
from .flow import ARITHMETIC, COPIES


def replay(node: fx.Node, value: Any, rules: RuleTable) -> Any | None:
    """The view that ``node`` makes of ``value`` (its first argument), or None if it is not a view or would have to
    copy."""
    if node.op != "call_function":
        return None
    if node.target in COPIES:
        return value
    row = rules.get(op_key(node.target))
    getitem = getattr(node.target, "__name__", "") == "getitem"
    if not getitem and not (row is not None and row.view):
        return None
    if any(isinstance(a, fx.Node) for a in node.args[1:]):
        return None
    target: Any = node.target
    if target in (aten._unsafe_view.default, aten.reshape.default):
        target = aten.view.default
    try:
        result = target(value, *node.args[1:], **node.kwargs)
    except RuntimeError:  # the layout has no such view: the op copies
        return None
    return result


def canonical(t: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """The set of entries a view covers, order aside: (size, stride) pairs by falling stride, contiguous ones merged."""
    dims = sorted(((n, s) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1 and s > 0), key=lambda d: -d[1])
    merged: list[tuple[int, int]] = []
    for n, s in dims:
        if merged and merged[-1][1] == n * s:
            merged[-1] = (merged[-1][0] * n, s)
        else:
            merged.append((n, s))
    return tuple(merged)


def feature_slice(t: torch.Tensor, stride: int, count: int) -> Slice | str:
    """Which features a view of an output covers. Features are ``count`` indices that lie ``stride`` apart in the
    output.

    Returns a Slice along axis 0 (period = count when contiguous), ``"all"``, or ``"irregular"``.
    """
    inside = [(n, s) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1 and stride <= s < stride * count]
    if any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True)):
        return "irregular"
    start = (t.storage_offset() // stride) % count
    dims = canonical(torch.empty_strided([n for n, _ in inside], [s // stride for _, s in inside], device="meta"))
    if not dims:
        found = Slice(0, start, start + 1, count)
    elif len(dims) == 1 and dims[0][1] == 1:
        found = Slice(0, start, start + dims[0][0], count)
    elif len(dims) == 1:
        found = Slice(0, start, start + 1, dims[0][1])
    elif len(dims) == 2 and dims[1][1] == 1:
        found = Slice(0, start, start + dims[1][0], dims[0][1])
    else:
        return "irregular"
    covered = 1
    for n, _ in dims:
        covered *= n
    if covered == count:
        return "all"
    width = found.stop - found.start
    if found.stop > found.period or count % found.period or covered != count // found.period * width:
        return "irregular"
    return found


def sliced(t: torch.Tensor, whole: torch.Tensor) -> tuple[Slice, ...] | None:
    """The slice of ``whole`` (contiguous) that the view ``t`` covers: () for all of it, None if it is no block along
    one axis."""
    entries = canonical(t)
    if entries == canonical(whole):
        return ()
    for axis, (size, stride) in enumerate(zip(whole.shape, whole.stride(), strict=True)):
        start = (t.storage_offset() // stride) % size
        for length in _lengths(entries, size - start):
            part = whole.narrow(axis, start, length)
            if part.storage_offset() == t.storage_offset() and canonical(part) == entries:
                return (Slice(axis, start, start + length, size),)
    return None


def _lengths(entries: tuple[tuple[int, int], ...], longest: int) -> list[int]:
    total = 1
    for n, _ in entries:
        total *= n
    return [n for n in range(1, longest + 1) if total % n == 0]


#: ops whose output has, at every place, a function of the entries of the operands at that place (and of statistics)
PLACEWISE = ARITHMETIC | {
    aten.div.Scalar, aten.sub.Scalar, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf,
    aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.tril.default, aten.triu.default, aten.maximum.default,
    aten.minimum.default, aten.dropout.default, aten.div.Tensor_mode, aten.sign.default, aten.round.default,
    aten.nan_to_num.default, aten.addcmul.default, aten.lerp.Scalar,
}  # fmt: skip
#: ops that take entries, or rows, by an index, and the argument that is the index
GATHERS: dict[Any, int] = {
    aten.index.Tensor: 1, aten.index_select.default: 2, aten.gather.default: 2, aten.take.default: 1,
    aten.embedding.default: 1,
}  # fmt: skip
#: views that change the order of axes and nothing else
TRANSPOSES = frozenset(
    {aten.t.default, aten.mT.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default}
)
BATCH_NORMS = frozenset(
    {
        aten.batch_norm.default, aten.native_batch_norm.default, aten._native_batch_norm_legit.default,
        aten._native_batch_norm_legit.no_stats, aten._native_batch_norm_legit_no_training.default,
        aten._native_batch_norm_legit_functional.default,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Arrangement:
    """How the entries of a tensor lie in a value that has one of them at every place.

    Attributes:
        view: the value as a meta tensor over those entries; stride 0 where one entry goes to several places.
        copies: rearrangements that no view expresses, first to last: (shape before, permutation, shape after) of what
            is stored; ``view`` is over the last one.
        added: whether the entries were added, as a vector to rows, to something else that is learned.
    """

    view: Any
    copies: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...] = ()
    added: bool = False

    @classmethod
    def of(cls, size: tuple[int, ...]) -> Arrangement:
        """A tensor as it is stored."""
        return cls(torch.empty(size, device="meta"))

    @property
    def is_whole(self) -> bool:
        """Every entry goes to one place."""
        return isinstance(self.view, torch.Tensor) and not _broadcasts(self.view)

    def wrap(self, size: tuple[int, ...], make: Callable[[tuple[int, ...], torch.Tensor], Atom]) -> Atom:
        """The atom of a tensor of shape ``size``: ``make(shape, view)`` for what the view is over, behind the
        copies."""
        if not self.copies:
            return make(size, self.view)
        atom = make(self.copies[-1][2], self.view)
        befores = [size, *(after for _, _, after in self.copies[:-1])]
        for before, (stored, order, _) in reversed(list(zip(befores, self.copies, strict=True))):
            atom = Reshaped(atom, before, order, stored)
        return atom


def follow(
    nodes: Sequence[fx.Node], start: fx.Node, arrangement: Arrangement, rules: RuleTable
) -> dict[fx.Node, Arrangement]:
    """Where the entries of ``start`` are, place by place, in the values computed from it; values that mix them (sums,
    products of matrices) are left out."""
    found = {start: arrangement}
    learned = {start} | {n for n in nodes if n.op == "placeholder"}
    for node in nodes:
        if any(s in learned for s in node.all_input_nodes):
            learned.add(node)
        if node is not start and node.op == "call_function" and any(s in found for s in node.all_input_nodes):
            arrived = _step(node, found, learned, rules)
            if arrived is not None:
                found[node] = arrived
    return found


def _step(
    node: fx.Node, found: Mapping[fx.Node, Arrangement], learned: set[fx.Node], rules: RuleTable
) -> Arrangement | None:
    first: Any = node.args[0] if node.args else None
    row = rules.get(op_key(node.target))
    if getattr(node.target, "__name__", "") == "getitem":
        before = found[first]
        if isinstance(before.view, tuple | list):
            place: Any = node.args[1]
            return replace(before, view=before.view[place])
        return before if node.args[1] == 0 else None
    value = node.meta.get("val")
    size = value.shape if isinstance(value, torch.Tensor) else None
    if node.target in COPIES or (row is not None and row.view):
        return _viewed(node, found[first], size, rules) if first in found else None
    if node.target in BATCH_NORMS:
        if first in found:
            return found[first]
        gain: Any = node.args[1] if len(node.args) > 1 else None
        if gain not in found or not isinstance(first, fx.Node):
            return None
        whole = first.meta["val"].shape
        per_channel = found[gain].view.view(1, -1, *[1] * (len(whole) - 2))
        return replace(found[gain], view=per_channel.expand(whole))
    if node.target is aten.cat.default:  # a block of the value
        blocks = [s for s in node.all_input_nodes if s in found]
        return found[blocks[0]] if len(blocks) == 1 else None
    if node.target is aten._weight_norm.default or node.target in PLACEWISE or (row is not None and row.pointwise):
        return _together(node, found, learned, size)
    return None


def _viewed(node: fx.Node, before: Arrangement, size: Any, rules: RuleTable) -> Arrangement | None:
    view = replay(node, before.view, rules)
    if view is not None:
        return replace(before, view=view)
    if size is None or not before.is_whole or any(isinstance(a, fx.Node) for a in node.args[1:]):
        return None
    order = sorted(range(before.view.dim()), key=lambda d: (before.view.shape[d] > 1, -before.view.stride(d)))
    stored = tuple(before.view.shape[d] for d in order)  # a reshape that has to copy
    copy = (stored, tuple(order.index(d) for d in range(len(order))), tuple(size))
    return replace(before, view=torch.empty(tuple(size), device="meta"), copies=(*before.copies, copy))


def _together(
    node: fx.Node, found: Mapping[fx.Node, Arrangement], learned: set[fx.Node], size: Any
) -> Arrangement | None:
    """Operands broadcast against each other; two arrangements of the same entries would mix them."""
    if size is None:
        return None
    arrived: list[Arrangement] = []
    fewer = False
    for source in node.all_input_nodes:
        if source in found:
            fewer |= found[source].view.numel() < math.prod(size)
            try:
                arrived.append(replace(found[source], view=found[source].view.expand(size)))
            except RuntimeError:
                return None
    kinds = {(tuple(a.view.stride()), a.copies) for a in arrived}
    if len(kinds) != 1:
        return None
    others = [s for s in node.all_input_nodes if s in learned and s not in found]
    adds = node.target in (aten.add.Tensor, aten.sub.Tensor) and bool(others) and fewer
    return replace(arrived[0], added=adds or any(a.added for a in arrived))


def _broadcasts(view: torch.Tensor) -> bool:
    return any(n > 1 and s == 0 for n, s in zip(view.shape, view.stride(), strict=True))

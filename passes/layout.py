"""Views as data: what a chain of view ops does to a tensor, read off sizes, strides and offset of a meta tensor.

A view is a box of indices: ``size``, ``stride`` and ``offset`` into contiguous storage. Running the graph's own view
ops on a meta tensor therefore tells which entries of a weight (or features of an output) reach a node, exactly and
without touching data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from modnorm_fx.atoms import Slice
from modnorm_fx.rules import RuleTable, op_key

from .canonicalize import aten
from .flow import COPIES


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

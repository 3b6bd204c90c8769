"""Which updates are worked on together: parameters of equal shape, type, device and use, stacked in one buffer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .atoms import Atom, Slice

if TYPE_CHECKING:
    from .norm import Leaf, ModularNorm

__all__ = ["Bucket", "Line", "buckets", "placement"]

Placement = tuple[torch.dtype, torch.device]


@dataclass(frozen=True)
class Line:
    """The same part of every parameter of a bucket: leaves with one atom, in the order of the stack."""

    slices: tuple[Slice, ...]
    atom: Atom
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True)
class Bucket:
    """Parameters whose updates are stacked `[n, *shape]`, and what is measured in them."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    lines: tuple[Line, ...]


def placement(update: Tensor) -> Placement:
    """What of an update, besides its shape, decides about its bucket."""
    return update.dtype, update.device


def buckets(norm: ModularNorm, updates: Mapping[str, Placement]) -> tuple[Bucket, ...]:
    """The buckets for updates of these parameters, in order of their first weight's first use.

    Args:
        norm: the norm. updates: parameter -> dtype and device of its update; parameters without a leaf are left out.
    """
    by_weight: dict[str, list[Leaf]] = {}
    for leaf in norm.leaves:
        by_weight.setdefault(leaf.weight, []).append(leaf)
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, leaves in by_weight.items():
        if name in updates:
            uses = tuple((leaf.slices, leaf.atom) for leaf in leaves)
            groups.setdefault((tuple(norm.shapes[name]), updates[name], uses), []).append(name)
    return tuple(
        Bucket(tuple(names), tuple(norm.shapes[names[0]]), *updates[names[0]], _lines([by_weight[n] for n in names]))
        for names in groups.values()
    )


def _lines(leaves: list[list[Leaf]]) -> tuple[Line, ...]:
    return tuple(Line(same[0].slices, same[0].atom, same) for same in zip(*leaves, strict=True))

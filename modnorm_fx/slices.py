"""``take_slice``: the part of a weight that one of several packed projections uses, as a graph op."""

from __future__ import annotations

import torch

from .atoms import Slice

__all__ = ["take_slice"]


def take_slice(weight: torch.Tensor, axis: int, start: int, stop: int, period: int) -> torch.Tensor:
    """Entries with ``start <= i % period < stop`` along ``axis``; a view when contiguous (``period`` is the axis'
    size)."""
    return Slice(axis, start, stop, period).read(weight)


take_slice.argument_names = ("weight", "axis", "start", "stop", "period")  # type: ignore[attr-defined]

"""What the passes put into a graph for a weight: ``take_slice``, the part of it that one of several packed projections
uses, and ``returned``, the weight as an output of the model."""

from __future__ import annotations

import torch

from .atoms import Slice

__all__ = ["returned", "take_slice"]


def take_slice(weight: torch.Tensor, axis: int, start: int, stop: int, period: int) -> torch.Tensor:
    """Entries with ``start <= i % period < stop`` along ``axis``; a view when contiguous (``period`` is the axis'
    size)."""
    return Slice(axis, start, stop, period).read(weight)


take_slice.argument_names = ("weight", "axis", "start", "stop", "period")  # type: ignore[attr-defined]


def returned(weight: torch.Tensor) -> torch.Tensor:
    """The weight itself, or what is computed from it alone, where the model returns it."""
    return weight


returned.argument_names = ("weight",)  # type: ignore[attr-defined]

"""What a coordinate check found, as tables for the terminal: level or not, and measured against predicted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

from .coordcheck import LEVEL, Coordinate, Prediction, spread, together
from .transfer import Size

__all__ = ["coordinate_tables", "prediction_table"]


def coordinate_tables(found: Sequence[Coordinate]) -> list[Table]:
    """One table along the widths and one along the depths, where there are several."""
    sizes = sorted({one.size for one in found})
    smallest = Size(min(size.width for size in sizes), min(size.depth for size in sizes))
    along = {
        "width": [size for size in sizes if size.depth == smallest.depth],
        "depth": [size for size in sizes if size.width == smallest.width],
    }
    return [_along(axis, chosen, found) for axis, chosen in along.items() if len(chosen) > 1]


def _along(axis: str, sizes: Sequence[Size], found: Sequence[Coordinate]) -> Table:
    last = max(one.step for one in found)
    table = _table(f"RMS of outputs at the start, and of their change in {last} steps", "module")
    for size in sizes:
        table.add_column(f"{axis} {getattr(size, axis)}", justify="right")
    table.add_column("change", justify="right")
    for pattern, modules in together(dict.fromkeys(one.module for one in found)).items():
        mine = [one for one in found if one.module in set(modules)]
        starts = [_mean(one.rms for one in mine if one.size == size and one.step == 0) for size in sizes]
        changes = [_mean(one.change for one in mine if one.size == size and one.step == last) for size in sizes]
        cells = [f"{start:.2g} {change:.2g}" for start, change in zip(starts, changes, strict=True)]
        times = spread(changes)
        table.add_row(pattern or "(the model)", *cells, "level" if times <= LEVEL else f"×{times:.2g}")
    return table


def prediction_table(found: Sequence[Prediction]) -> Table:
    """For every kind of leaf and every size the measured over the predicted change of the output, and the norm of the
    step over its target; medians over leaves and seeds."""
    sizes = sorted({one.size for one in found})
    table = _table("relative change of the model's output by one leaf's first step: measured over predicted", "leaf")
    for size in sizes:
        table.add_column(f"{size.width}×{size.depth}", justify="right")
    table.add_column("norm / target", justify="right")
    for pattern, leaves in together(dict.fromkeys(one.leaf for one in found)).items():
        mine = [one for one in found if one.leaf in set(leaves)]
        cells = []
        for size in sizes:
            ratios = [one.measured / one.predicted for one in mine if one.size == size and one.predicted > 0]
            cells.append(f"{statistics.median(ratios):.2g}" if ratios else "")
        table.add_row(pattern, *cells, f"{statistics.median(one.ratio for one in mine):.3f}")
    return table


def _table(title: str, first: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column(first, no_wrap=True)
    return table


def _mean(values: Iterable[float]) -> float:
    """Root mean square; NaN of none."""
    listed = list(values)
    return math.sqrt(statistics.fmean(value * value for value in listed)) if listed else math.nan

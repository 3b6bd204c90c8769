"""What a sweep over learning rates and sizes found: tables, a picture for each recipe, one page that holds all.

Regret of a size: its loss at the learning rate that was best for the smallest model, minus its best loss; in nats,
both means over seeds of the final training loss. Drift: octaves between the best rates of a size and of the smallest
model, each the lowest point of a parabola through the best point of the grid and its neighbours.
"""

from __future__ import annotations

import base64
import html
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .recipes import RECIPES
from .transfer import Run, Size, chosen_lr, mean_losses

__all__ = ["Row", "rows", "summary", "write"]

COLOURS = ("#1b6ca8", "#d1495b", "#3a9d5d", "#8d5fb5", "#c98a1b", "#4a4a4a", "#16a3a3", "#b0578d")


@dataclass(frozen=True)
class Row:
    """One recipe at one size.

    Attributes:
        recipe, size: which. parameters: of the model.
        best_lr, best_loss: of the grid, by mean over seeds. seed_lrs: the lowest and the highest best rate of a seed.
        optimum: log2 of the learning rate at the lowest point of the parabola.
        small_lr: the best of the smallest model. loss: here, at that rate; val_loss likewise.
        regret: loss - best_loss. drift: octaves from the smallest model's optimum.
        edge: the best rate lies at an end of the rates tried.
    """

    recipe: str
    size: Size
    parameters: int
    best_lr: float
    best_loss: float
    seed_lrs: tuple[float, float]
    optimum: float
    small_lr: float
    loss: float
    val_loss: float
    regret: float
    drift: float
    edge: bool


def rows(runs: Sequence[Run]) -> list[Row]:
    """One row per recipe and size, the smallest size of each recipe first. Sizes without a finite loss are left out."""
    out: list[Row] = []
    for recipe in dict.fromkeys(run.trial.recipe for run in runs):
        ours = [run for run in runs if run.trial.recipe == recipe]
        sizes = sorted({run.trial.size for run in ours}, key=lambda s: (s.width * s.depth, s))
        small = min(sizes, key=lambda s: (s.width, s.depth))
        start = mean_losses(ours, recipe, small)
        small_lr, small_optimum = chosen_lr(start), _optimum(start)
        for size in [small, *(s for s in sizes if s != small)]:
            losses = mean_losses(ours, recipe, size)
            best = chosen_lr(losses)
            if not math.isfinite(losses[best]):
                continue
            here = [run for run in ours if run.trial.size == size]
            at_small = [run for run in here if run.trial.lr == small_lr]
            loss = losses.get(small_lr, math.nan)
            own = [_best_of_seed(here, seed) for seed in sorted({run.trial.seed for run in here})]
            out.append(
                Row(
                    recipe,
                    size,
                    here[0].parameters,
                    best,
                    losses[best],
                    (min(own), max(own)),
                    _optimum(losses),
                    small_lr,
                    loss,
                    statistics.fmean(run.val_loss for run in at_small) if at_small else math.nan,
                    loss - losses[best],
                    _optimum(losses) - small_optimum,
                    best in (min(losses), max(losses)),
                )
            )
    return out


def _best_of_seed(runs: Sequence[Run], seed: int) -> float:
    return min((run.train_loss, run.trial.lr) for run in runs if run.trial.seed == seed)[1]


def _optimum(losses: dict[float, float]) -> float:
    """log2 of the learning rate at the lowest point of the parabola through the best point and its neighbours."""
    points = [(math.log2(lr), loss) for lr, loss in losses.items() if math.isfinite(loss)]
    if not points:
        return math.nan
    i = min(range(len(points)), key=lambda j: points[j][1])
    if i in (0, len(points) - 1):
        return points[i][0]
    (x0, y0), (x1, y1), (x2, y2) = points[i - 1 : i + 2]
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (right - left) / ((x2 - x0) / 2)
    middle = (x1 + x2) / 2 - right / bend if bend > 0 else x1
    return min(max(middle, x0), x2)


# Pages ----------------------------------------------------------------------------------------------------------------


def write(runs: Sequence[Run], out: Path, command: str) -> list[Path]:
    """Writes `transfer.md`, one PNG per recipe and `transfer.html`, which holds everything; returns the paths."""
    out.mkdir(parents=True, exist_ok=True)
    found = rows(runs)
    pictures = {recipe: _picture(runs, recipe) for recipe in dict.fromkeys(row.recipe for row in found)}
    paths = []
    for recipe, picture in pictures.items():
        paths.append(out / f"{recipe}.png")
        paths[-1].write_bytes(picture)
    caption = _caption(runs, command)
    page = [f"# {_title(runs)}\n\n{caption}\n"]
    page += [_markdown(*_summary(found))]
    for recipe in pictures:
        page += [f"\n## {RECIPES[recipe].title}\n\n![loss against learning rate]({recipe}.png)\n"]
        page += ["\n" + _markdown(*_table([row for row in found if row.recipe == recipe]))]
    text = out / "transfer.md"
    text.write_text("\n".join(page), encoding="utf-8")
    whole = out / "transfer.html"
    whole.write_text(_html(runs, found, pictures, caption), encoding="utf-8")
    return [whole, text, *paths]


def summary(runs: Sequence[Run]) -> str:
    """One line a recipe, for the terminal."""
    header, lines = _summary(rows(runs))
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    shown = ("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in [header, *lines])
    return "\n".join(line.rstrip() for line in shown)


def _title(runs: Sequence[Run]) -> str:
    return f"Learning rates across sizes: {runs[0].trial.spec}"


def _caption(runs: Sequence[Run], command: str) -> str:
    trial = runs[0].trial
    seeds = len({run.trial.seed for run in runs})
    heads = f"heads of {trial.head_size} features, " if trial.head_size else ""
    warmup = f"rises for {trial.warmup} steps, then " if trial.warmup else ""
    return (
        f"`{command}`, torch {runs[0].torch}: {len(runs)} runs of {trial.steps} steps of {trial.batch}, {heads}"
        f"{seeds} seed{'s' if seeds > 1 else ''}, weight decay {trial.weight_decay:g}, data: "
        f"{trial.data or 'built in'}. The learning rate {warmup}falls linearly to 0. Losses are training losses in "
        "nats, means over the last tenth of the steps and over seeds. Regret: the loss at the smallest model's best "
        "learning rate, minus the best loss at that size. Drift: octaves between the best learning rates (parabola "
        "through the grid)."
    )


Table = tuple[list[str], list[list[str]]]


def _summary(found: Sequence[Row]) -> Table:
    header = ["optimizer", "best lr, smallest", "largest regret", "largest drift (octaves)", "best loss, smallest",
              "best loss, largest", "loss there at the smallest's lr"]  # fmt: skip
    lines = []
    for recipe in dict.fromkeys(row.recipe for row in found):
        ours = [row for row in found if row.recipe == recipe]
        largest = max(ours, key=lambda row: row.parameters)
        lines.append(
            [
                RECIPES[recipe].title,
                f"{ours[0].small_lr:g}",
                f"{max(row.regret for row in ours):.3f}",
                f"{max((row.drift for row in ours), key=abs):+.1f}",
                f"{ours[0].best_loss:.3f}",
                f"{largest.best_loss:.3f}",
                f"{largest.loss:.3f}",
            ]
        )
    return header, lines


def _table(found: Sequence[Row]) -> Table:
    header = ["size", "parameters", "best lr", "of seeds", "best loss", "loss at the smallest's lr", "regret",
              "drift", "val loss"]  # fmt: skip
    return header, [
        [
            str(row.size),
            f"{row.parameters:,}",
            f"{row.best_lr:g}" + (" (end of the grid)" if row.edge else ""),
            "-".join(dict.fromkeys(f"{lr:g}" for lr in row.seed_lrs)),
            f"{row.best_loss:.3f}",
            f"{row.loss:.3f}",
            f"{row.regret:.3f}",
            f"{row.drift:+.1f}",
            f"{row.val_loss:.3f}",
        ]
        for row in found
    ]


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *lines])


def _html(runs: Sequence[Run], found: Sequence[Row], pictures: dict[str, bytes], caption: str) -> str:
    def table(header: list[str], lines: list[list[str]]) -> str:
        cells = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
        return f"<table><tr>{cells}</tr>{body}</table>"

    parts = [f"<h1>{html.escape(_title(runs))}</h1><p>{html.escape(caption)}</p>", table(*_summary(found))]
    for recipe, picture in pictures.items():
        data = base64.b64encode(picture).decode()
        parts.append(f"<h2>{html.escape(RECIPES[recipe].title)}</h2><img src='data:image/png;base64,{data}'>")
        parts.append(table(*_table([row for row in found if row.recipe == recipe])))
    style = (
        "body{font:15px system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}img{max-width:100%}"
        "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #8884}"
        "td:first-child,th:first-child{text-align:left}"
    )
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(_title(runs))}</title>"
        f"<style>{style}</style><body>{''.join(parts)}</body></html>\n"
    )


def _picture(runs: Sequence[Run], recipe: str) -> bytes:
    """Loss against learning rate: one panel for widths at the smallest depth, one for depths at the smallest width."""
    from matplotlib.figure import Figure

    ours = [run for run in runs if run.trial.recipe == recipe]
    sizes = sorted({run.trial.size for run in ours})
    small = min(sizes)
    panels: dict[str, list[Size]] = {
        f"widths, depth {small.depth}": [size for size in sizes if size.depth == small.depth],
        f"depths, width {small.width}": [size for size in sizes if size.width == small.width],
    }
    panels = {title: chosen for title, chosen in panels.items() if len(chosen) > 1} or {"": [small]}
    figure = Figure(figsize=(5.5 * len(panels), 4), dpi=110)
    axes: Any = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    small_lr = chosen_lr(mean_losses(ours, recipe, small))
    for panel, (title, chosen) in zip(axes, panels.items(), strict=True):
        for i, size in enumerate(chosen):
            losses = {lr: loss for lr, loss in mean_losses(ours, recipe, size).items() if math.isfinite(loss)}
            colour = COLOURS[i % len(COLOURS)]
            name = f"{size.width}" if "widths" in title else f"{size.depth}"
            panel.plot(list(losses), list(losses.values()), "o-", color=colour, markersize=3, label=name)
            best = chosen_lr(losses)
            panel.plot([best], [losses[best]], "*", color=colour, markersize=11)
        panel.axvline(small_lr, color="#888", linewidth=0.8, linestyle="--")
        panel.set_xscale("log", base=2)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("learning rate")
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("final training loss (nats)")
    figure.suptitle(RECIPES[recipe].title)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Software": None})
    return buffer.getvalue()

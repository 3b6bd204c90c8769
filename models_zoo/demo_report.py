"""What the demo leaves: a picture of the loss curves, a table for people and the same numbers for programs."""

from __future__ import annotations

import json
import platform
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from modnorm_fx import __version__

from .demo_runs import BETAS, METHODS, Found, Plan, Result, mean_loss

__all__ = ["write"]

COLOURS = ("#1b6ca8", "#d1495b", "#3a9d5d", "#8d5fb5", "#c98a1b")
SMOOTH = 10  # steps in the running mean that is drawn


def write(
    out: Path,
    plan: Plan,
    source: str,
    trees: Sequence[dict[str, Any]],
    found: dict[str, Found],
    seconds: float,
    console: Console,
) -> list[Path]:
    """Prints the tables, writes the files, and returns their paths."""
    tables = (_table(plan, found), _grid(plan, found))
    caption = _caption(plan, source, found)
    for title, header, rows in tables:
        shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, name in enumerate(header):
            shown.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    console.print(caption)

    picture, numbers, page = out / "loss.png", out / "demo.json", out / "demo.md"
    _draw(picture, found, caption)
    numbers.write_text(
        json.dumps(_json(plan, source, trees, found, seconds, caption), indent=1) + "\n", encoding="utf-8"
    )
    page.write_text(
        f"# One learning rate for several sizes\n\n![loss curves]({picture.name})\n\n"
        + "".join(f"**{title}**\n\n{_markdown(header, rows)}\n" for title, header, rows in tables)
        + f"{caption}\n",
        encoding="utf-8",
    )
    return [picture, page, numbers]


# Words and numbers ----------------------------------------------------------------------------------------------------

Rows = tuple[str, list[str], list[list[str]]]


def _caption(plan: Plan, source: str, found: dict[str, Found]) -> str:
    tuned = []
    for method, one in found.items():
        edge = " (the edge of the grid)" if one.lr in (min(one.grid), max(one.grid)) else ""
        tuned.append(f"{METHODS[method]} {one.lr:g} of {', '.join(f'{lr:g}' for lr in one.grid)}{edge}")
    mean = f", mean of {len(plan.seeds)} seeds" if len(plan.seeds) > 1 else ""
    return (
        f"GPT-2 as transformers builds it, embedding and head tied, dropout off; {plan.steps} steps of {plan.batch} × "
        f"{plan.context} characters of {source}, the same batches for all runs of a seed. Each learning rate was tuned "
        f"in this very run, on {plan.sizes[0]} (layers × width) only, by the final training loss{mean}: "
        f"{'; '.join(tuned)}. It falls linearly to 0; no warm-up, no weight decay. In the modular norm weights start "
        "from norm.initialize_, in plain AdamW as transformers initialises them. Short runs, and curves of one seed "
        f"({plan.seeds[0]}): small differences mean nothing. Final training losses are means over the last tenth of "
        "the steps."
    )


def _table(plan: Plan, found: dict[str, Found]) -> Rows:
    header = ["layers\n× width", "parameters"]
    for method, one in found.items():
        header += [f"{method}\nlr {one.lr:g}\ntrain loss", "val\nloss", "CPU ms\na step"]
    rows = []
    for i, size in enumerate(plan.sizes):
        results = [one.runs[i] for one in found.values()]
        row = [str(size), f"{results[0].parameters:,}"]
        for result in results:
            row += [*_losses(result), f"{result.curve.cpu_seconds / len(result.curve.losses) * 1000:.0f}"]
        rows.append(row)
    return "One learning rate for all sizes", header, rows


def _grid(plan: Plan, found: dict[str, Found]) -> Rows:
    rows = []
    for method, one in found.items():
        for lr, results in one.grid.items():
            each = ", ".join(_losses(result)[0] for result in results)
            rows.append([method, f"{lr:g}", f"{mean_loss(results):.3f}", each, "chosen" if lr == one.lr else ""])
    each = f"of seed{'s' * (len(plan.seeds) > 1)} {', '.join(map(str, plan.seeds))}"
    return f"How the learning rates were tuned: {plan.sizes[0]}", ["", "lr", "train loss", each, ""], rows


def _losses(result: Result) -> list[str]:
    if result.curve.diverged is not None:
        return [f"diverged at {result.curve.diverged}", ""]
    return [f"{result.curve.final:.3f}", f"{result.val_loss:.3f}"]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [[name.replace("\n", " ") for name in header], ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _json(
    plan: Plan, source: str, trees: Sequence[dict[str, Any]], found: dict[str, Found], seconds: float, caption: str
) -> dict[str, Any]:
    return {
        "caption": caption,
        "settings": {
            "steps": plan.steps,
            "batch": plan.batch,
            "context": plan.context,
            "text": source,
            "grid_seeds": plan.seeds,
            "seed": plan.seeds[0],
            "betas": BETAS,
            "threads_per_run": 1,
            "runs_at_a_time": plan.workers,
        },
        "versions": {"modnorm_fx": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "seconds": round(seconds, 1),
        "trees": [{k: round(v, 2) if isinstance(v, float) else v for k, v in tree.items()} for tree in trees],
        "grid": [_run_json(result) for one in found.values() for results in one.grid.values() for result in results],
        "runs": [_run_json(result) for one in found.values() for result in one.runs],
    }


def _run_json(result: Result) -> dict[str, Any]:
    trial, curve = result.trial, result.curve
    finite = curve.diverged is None
    return {
        "method": trial.method,
        "layers": trial.size.layers,
        "width": trial.size.width,
        "parameters": result.parameters,
        "lr": trial.lr,
        "seed": trial.seed,
        "train_loss": round(curve.final, 5) if finite else None,
        "val_loss": round(result.val_loss, 5) if finite else None,
        "diverged_at_step": curve.diverged,
        "seconds": round(curve.seconds, 2),
        "cpu_seconds": round(curve.cpu_seconds, 2),
        "losses": [round(loss, 5) for loss in curve.losses[: None if finite else -1]],
    }


# Picture --------------------------------------------------------------------------------------------------------------


def _draw(path: Path, found: dict[str, Found], caption: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), dpi=130)
    panels = figure.subplots(1, len(found), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (method, one) in zip(panels, found.items(), strict=True):
        for colour, result in zip(COLOURS, one.runs, strict=False):
            losses = result.curve.losses
            steps = range(1, len(losses) + 1)
            end = ", ".join(_losses(result)[:1])
            panel.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
            panel.plot(steps, _smooth(losses), color=colour, linewidth=1.8, label=f"{result.trial.size}: {end}")
        panel.set_title(f"{METHODS[method]}, lr {one.lr:g}")
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
        panel.legend(title="layers × width: final training loss", frameon=False)
    panels[0].set_ylabel("training loss (nats per character)")
    figure.text(0.01, 0.01, textwrap.fill(caption, 190), fontsize=7.5, va="bottom")
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path)


def _smooth(losses: Sequence[float]) -> list[float]:
    """The mean over the last `SMOOTH` steps, or over all so far."""
    windows = (losses[max(0, i - SMOOTH + 1) : i + 1] for i in range(len(losses)))
    return [sum(window) / len(window) for window in windows]

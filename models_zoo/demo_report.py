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

from .demo_runs import BETAS, METHODS, SEED, Plan, Result

__all__ = ["write"]

Found = dict[str, tuple[list[Result], list[Result]]]
COLOURS = ("#1b6ca8", "#d1495b", "#3a9d5d", "#8d5fb5", "#c98a1b")
SMOOTH = 10  # steps in the running mean that is drawn


def write(
    out: Path, plan: Plan, source: str, trees: Sequence[dict[str, Any]], found: Found, seconds: float, console: Console
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
    numbers.write_text(json.dumps(_json(plan, source, trees, found, seconds, caption), indent=1) + "\n")
    page.write_text(
        f"# One learning rate for several sizes\n\n![loss curves]({picture.name})\n\n"
        + "".join(f"**{title}**\n\n{_markdown(header, rows)}\n" for title, header, rows in tables)
        + f"{caption}\n"
    )
    return [picture, page, numbers]


# Words and numbers ----------------------------------------------------------------------------------------------------

Rows = tuple[str, list[str], list[list[str]]]


def _caption(plan: Plan, source: str, found: Found) -> str:
    tuned = []
    for method, (grid, runs) in found.items():
        lrs = [result.trial.lr for result in grid]
        chosen = runs[0].trial.lr
        edge = " (the edge of the grid)" if chosen in (min(lrs), max(lrs)) else ""
        tuned.append(f"{METHODS[method]} {chosen:g} of {', '.join(f'{lr:g}' for lr in lrs)}{edge}")
    return (
        f"GPT-2 as transformers builds it, embedding and head tied, dropout off; {plan.steps} steps of {plan.batch} × "
        f"{plan.context} characters of {source}, the same batches for all. Each learning rate was tuned in this very "
        f"run, on {plan.sizes[0]} (layers × width) only, by the final training loss: {'; '.join(tuned)}. It falls "
        "linearly to 0; no warm-up, no weight decay. In the modular norm weights start from norm.initialize_, in plain "
        "AdamW as transformers initialises them. Short runs and one seed: small differences mean nothing."
    )


def _table(plan: Plan, found: Found) -> Rows:
    header = ["layers\n× width", "parameters"]
    for method, (_, runs) in found.items():
        header += [f"{method}\nlr {runs[0].trial.lr:g}\ntrain loss", "val\nloss", "ms per\nstep"]
    rows = []
    for i, size in enumerate(plan.sizes):
        results = [runs[i] for _, runs in found.values()]
        row = [str(size), f"{results[0].parameters:,}"]
        for result in results:
            row += [*_losses(result), f"{_step_seconds(result) * 1000:.0f}"]
        rows.append(row)
    return "One learning rate for all sizes", header, rows


def _grid(plan: Plan, found: Found) -> Rows:
    rows = [
        [method, f"{result.trial.lr:g}", *_losses(result), "chosen" if result is runs[0] else ""]
        for method, (grid, runs) in found.items()
        for result in grid
    ]
    return f"How it was tuned: {plan.sizes[0]}", ["", "lr", "train loss", "val loss", ""], rows


def _losses(result: Result) -> list[str]:
    if result.curve.diverged is not None:
        return [f"diverged at {result.curve.diverged}", ""]
    return [f"{result.curve.final:.3f}", f"{result.val_loss:.3f}"]


def _step_seconds(result: Result) -> float:
    return result.curve.seconds / len(result.curve.losses)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [[name.replace("\n", " ") for name in header], ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _json(
    plan: Plan, source: str, trees: Sequence[dict[str, Any]], found: Found, seconds: float, caption: str
) -> dict[str, Any]:
    return {
        "caption": caption,
        "settings": {
            "steps": plan.steps,
            "batch": plan.batch,
            "context": plan.context,
            "text": source,
            "seed": SEED,
            "betas": BETAS,
            "threads_per_run": 1,
            "runs_at_a_time": plan.workers,
        },
        "versions": {"modnorm_fx": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "seconds": round(seconds, 1),
        "trees": [{k: round(v, 2) if isinstance(v, float) else v for k, v in tree.items()} for tree in trees],
        "grid": [_run_json(result) for grid, _ in found.values() for result in grid],
        "runs": [_run_json(result) for _, runs in found.values() for result in runs],
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
        "train_loss": round(curve.final, 5) if finite else None,
        "val_loss": round(result.val_loss, 5) if finite else None,
        "diverged_at_step": curve.diverged,
        "seconds_per_step": round(_step_seconds(result), 5),
        "losses": [round(loss, 5) for loss in curve.losses[: None if finite else -1]],
    }


# Picture --------------------------------------------------------------------------------------------------------------


def _draw(path: Path, found: Found, caption: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), dpi=130)
    panels = figure.subplots(1, len(found), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (method, (_, runs)) in zip(panels, found.items(), strict=True):
        for colour, result in zip(COLOURS, runs, strict=False):
            losses = result.curve.losses
            steps = range(1, len(losses) + 1)
            end = ", ".join(_losses(result)[:1])
            panel.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
            panel.plot(steps, _smooth(losses), color=colour, linewidth=1.8, label=f"{result.trial.size}: {end}")
        panel.set_title(f"{METHODS[method]}, lr {runs[0].trial.lr:g}")
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
        panel.legend(title="layers × width: final training loss", frameon=False)
    panels[0].set_ylabel("training loss (nats per character)")
    figure.text(0.01, 0.01, textwrap.fill(caption, 165), fontsize=7.5, va="bottom")
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path)


def _smooth(losses: Sequence[float]) -> list[float]:
    """The mean over the last `SMOOTH` steps, or over all so far."""
    windows = (losses[max(0, i - SMOOTH + 1) : i + 1] for i in range(len(losses)))
    return [sum(window) / len(window) for window in windows]

"""`make demo`: the norms of three well-known models, and one learning rate for GPT-2s of several sizes.

Everything is measured here and now, on the CPU and without a network; what it finds is left under `runs/demo`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from modnorm_fx import report
from modnorm_fx.errors import ModnormError
from modnorm_fx.norm import ModularNorm
from modnorm_fx.pipeline import convert

from . import build
from .data import text
from .demo_report import write
from .demo_runs import Plan, Result, Size, Trial, run_all

__all__ = ["main"]

NEEDED = ("transformers", "timm", "matplotlib")
TREES = ("hf:gpt2", "timm:vit_small_patch16_224", "timm:resnet50")
QUICK_TREES = ("hf:gpt2-tiny",)
QUICK = Plan(
    sizes=(Size(1, 32), Size(2, 64)),
    lrs={"modnorm": (0.125, 0.25), "plain": (2e-3, 4e-3)},
    seeds=(0,),
    steps=30,
    batch=8,
    context=32,
)
SURE = 3.0  # seconds of training after which the time left is said
MOST_WORKERS = 4  # each holds a copy of torch and transformers


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    console = Console(highlight=False)
    try:
        _demo(args, console)
    except KeyboardInterrupt:
        return 130
    except ModnormError as error:
        print("demo: error: " + "\n".join([str(error), *getattr(error, "__notes__", ())]), file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m modnorm_fx.models_zoo.demo", description=__doc__)
    parser.add_argument("--steps", type=_count, metavar="N", help=f"steps of each run (default: {Plan().steps})")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--data", type=Path, metavar="FILE", help="text to train on (default: Python's own sources)")
    parser.add_argument("--workers", type=_count, metavar="N",
                        help="runs at a time, one core each; the losses do not depend on it (default: a run for each "
                        f"core, at most {MOST_WORKERS})")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="very small models and few steps, to see that it works")
    return parser


def _count(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is not a positive integer")
    return int(given)


def _demo(args: argparse.Namespace, console: Console) -> None:
    start = time.perf_counter()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ModnormError(
            f"The demo needs {' and '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed.",
            do="pip install 'modnorm-fx[all]'",
        )
    plan = QUICK if args.quick else Plan()
    plan = replace(plan, steps=args.steps or plan.steps, data=args.data, workers=args.workers or _cores())
    corpus = text(args.data)
    for split in ("train", "val"):
        corpus.batch(split, 1, plan.context)  # says so if the text is too short
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModnormError(f"Cannot write to {args.out}.", why=str(error), do="Pass another --out.") from error
    trees = [_show_norm(name, args.out, console) for name in (QUICK_TREES if args.quick else TREES)]
    console.rule("Training")
    shapes = ", ".join(map(str, plan.sizes))
    console.print(
        f"GPT-2 of {shapes} (layers × width), {plan.steps} steps each, by AdamW in the modular norm and by plain "
        f"AdamW. Each one's learning rate is tuned on {plan.sizes[0]} only, and kept for the others. "
        f"{plan.workers} run{'s' * (plan.workers > 1)} at a time.\n"
    )
    with _Display(plan, console) as display:
        found = run_all(plan, display.on_step, display.on_end)
    files = write(args.out, plan, corpus.source, trees, found, time.perf_counter() - start, console)
    console.print(f"\n{time.perf_counter() - start:.0f} s in all. Left behind:")
    for path in (*(args.out / tree["html"] for tree in trees), *files):
        console.print(f"  {path}", soft_wrap=True)


def _cores() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_WORKERS)


# Norms of well-known models -------------------------------------------------------------------------------------------


def _show_norm(name: str, out: Path, console: Console) -> dict[str, Any]:
    """Converts a model and prints its norm; what was measured, as JSON."""
    console.rule(name)
    with _quiet(), console.status(f"building {name}"):
        start = time.perf_counter()
        model = build(name, device="meta")
        built = time.perf_counter() - start
    with _quiet(), console.status(f"converting {name}"):
        start = time.perf_counter()
        norm = convert(model)
        converted = time.perf_counter() - start
    size = sum(p.numel() for p in model.parameters())
    console.print(
        f"{type(model).__name__}, {size:,} parameters on the meta device (no memory for weights): imported and built "
        f"in {built:.1f} s, converted in {converted:.1f} s\n"
    )
    _print_tree(norm, console)
    console.print()
    page = f"norm-{name.partition(':')[2]}.html"
    norm.to_html(out / page)
    return {"model": name, "parameters": size, "build_seconds": built, "convert_seconds": converted, "html": page}


def _print_tree(norm: ModularNorm, console: Console) -> None:
    """In colours, on a terminal that is wide enough."""
    if console.is_terminal:
        tree = report.rich_tree(norm)
        if console.measure(tree).maximum <= console.width:
            console.print(tree)
            return
    print(report.text(norm))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and the model libraries log and warn of."""
    for name in ("torch", "torch._subclasses.fake_tensor", "transformers", "timm"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Progress -------------------------------------------------------------------------------------------------------------


class _Display:
    """A bar for all runs with the time left, and one for each running; a line for each that is done.

    Where nobody watches, only the lines.
    """

    def __init__(self, plan: Plan, console: Console, clock: Callable[[], float] = time.monotonic):
        sizes = plan.all_sizes()
        self.total, self.runs, self.clock = plan.steps * sum(size.work for size in sizes), len(sizes), clock
        self.start: float | None = None  # of the first step: processes take seconds to start
        self.ended = 0
        self.done: dict[Trial, int] = {}
        self.bars: dict[Trial, TaskID] = {}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.all = self.progress.add_task("all runs", total=self.total, note="starting")

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def on_step(self, trial: Trial, step: int, loss: float) -> None:
        self.start = self.clock() if self.start is None else self.start
        self.done[trial] = step
        if trial not in self.bars:
            self.bars[trial] = self.progress.add_task(str(trial), total=trial.steps, note="")
        self.progress.update(self.bars[trial], completed=step, note=f"loss {loss:.3f}")
        self._update_all()

    def on_end(self, result: Result) -> None:
        trial, curve = result.trial, result.curve
        self.done[trial] = trial.steps
        self.ended += 1
        if trial in self.bars:
            self.progress.remove_task(self.bars.pop(trial))
        loss = f"train loss {curve.final:.3f}, val loss {result.val_loss:.3f}"
        outcome = loss if curve.diverged is None else f"diverged at step {curve.diverged}"
        left = "" if self.progress.console.is_terminal or not self._left() else f" · {self._left()}"
        self.progress.console.print(
            f"{self.ended:>2}/{self.runs}  {str(trial):54}  {outcome}, {curve.seconds:.1f} s{left}", soft_wrap=True
        )
        self._update_all()

    def _work(self) -> float:
        return sum(step * trial.size.work for trial, step in self.done.items())

    def _update_all(self) -> None:
        self.progress.update(self.all, completed=self._work(), note=self._left())

    def _left(self) -> str:
        work = self._work()
        if self.start is None or not work or (passed := self.clock() - self.start) < SURE:
            return ""
        left = passed * (self.total / work - 1)
        return f"about {left:.0f} s left" if left >= 1 else ""


if __name__ == "__main__":
    sys.exit(main())

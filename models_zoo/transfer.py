"""A sweep over learning rates and sizes of one model: does the rate that is best for the small model stay the best?

Every run is one line of JSON in a file, written when the run ends; a sweep that is started again with the same file
goes on where it stopped. `transfer_report` reads the file.

Sizes form a star by default: every width at the smallest depth, every depth at the smallest width. For each size and
recipe all learning rates of the grid are run, then, while the best one lies at an end of the grid, one octave more;
and in any case the rate that was best for the smallest model, which is what the regret is about.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import signal
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from modnorm_fx.errors import FormatError, ModnormError
from modnorm_fx.norm import ModularNorm
from modnorm_fx.pipeline import convert

from . import build
from .recipes import RECIPES, Setting
from .train import evaluate, schedule, train
from .training import Task, given_inputs, logits_loss, model_for, task_for

__all__ = [
    "Plan", "Run", "Size", "Trial", "begin", "check", "chosen_lr", "common_head_size", "forget_norms", "mean_losses",
    "read", "sweep",
]  # fmt: skip

POINTS = 50  # of the loss curve, kept in the file
SMALLEST_HEAD = 8  # features that a sweep gives an attention head
MOST_EXTRA = 4  # octaves beyond the grid, at either end

#: as `convert` takes them, in order of their names
Masses = tuple[tuple[str, float], ...]


@dataclass(frozen=True, order=True)
class Size:
    width: int
    depth: int

    def __str__(self) -> str:
        return f"width {self.width}, depth {self.depth}"


@dataclass(frozen=True)
class Trial:
    """One training run; everything that its result depends on."""

    spec: str
    recipe: str
    width: int
    depth: int
    lr: float
    seed: int
    steps: int
    batch: int
    context: int
    weight_decay: float = 0.0
    data: str | None = None
    narrowest: int = 0
    convention: str = "tracked"
    head_size: int | None = None
    warmup: int = 0
    masses: Masses = ()

    @property
    def size(self) -> Size:
        return Size(self.width, self.depth)

    def sizes(self, width: int | None = None) -> dict[str, int | None]:
        """As `build` takes them, at another width if one is given."""
        width = width or self.width
        heads = {"heads": width // self.head_size} if self.head_size else {}
        return {"width": width, "layers": self.depth, **heads}


@dataclass(frozen=True)
class Run:
    """What a trial gave: losses in nats, infinite where it diverged; `curve` is thinned to `POINTS` points."""

    trial: Trial
    train_loss: float
    val_loss: float
    curve: tuple[float, ...]
    parameters: int
    seconds: float
    torch: str

    def line(self) -> str:
        return json.dumps(asdict(self), allow_nan=True)

    @staticmethod
    def from_line(line: str) -> Run:
        """Raises FormatError for a line that no sweep of this version wrote."""
        try:
            row = json.loads(line)
            masses = tuple((name, mass) for name, mass in row["trial"].get("masses", ()))
            trial = Trial(**{**row["trial"], "masses": masses})
            return Run(**{**row, "trial": trial, "curve": tuple(row["curve"])})
        except (ValueError, TypeError, KeyError) as error:
            raise FormatError(
                "A line of the sweep's file is not a run.", why=f"{type(error).__name__}: {error}",
                do="Give another file with --out, or delete the line.",
            ) from error  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is swept.

    Attributes:
        spec: the model, as `models_zoo.build` takes it; it must have the sizes `width` and `layers`.
        widths, depths: ascending; the first of each is the smallest model.
        recipes: names in `RECIPES`. lrs: grid by recipe, where it is not the recipe's own.
        full: every width with every depth.
        seeds: how many, from 0.
        head_size: features of an attention head at every width; None leaves it to the model's builder. Larger heads are
            another axis than more heads: logits of learned queries and keys grow with √head_size (Yang et al.,
            arXiv 2203.03466, definition 4.1). A norm of typical values does not see that.
        warmup: over how many of the steps the learning rate first rises.
        masses: other than the defaults of `convert`, at every size.
    """

    spec: str
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    recipes: tuple[str, ...]
    lrs: dict[str, tuple[float, ...]] = field(default_factory=dict)
    steps: int = 200
    batch: int = 16
    context: int = 64
    seeds: int = 2
    weight_decay: float = 0.0
    data: str | None = None
    full: bool = False
    convention: str = "tracked"
    head_size: int | None = None
    warmup: int = 0
    masses: Masses = ()

    @property
    def smallest(self) -> Size:
        return Size(min(self.widths), min(self.depths))

    def sizes(self) -> list[Size]:
        """The smallest first, then by how much work they are."""
        found = {Size(w, d) for w in self.widths for d in self.depths}
        if not self.full:
            found = {s for s in found if s.width == self.smallest.width or s.depth == self.smallest.depth}
        return sorted(found, key=lambda s: (s != self.smallest, s.width**2 * s.depth, s))

    def trial(self, recipe: str, size: Size, lr: float, seed: int) -> Trial:
        return Trial(
            self.spec, recipe, size.width, size.depth, lr, seed, self.steps, self.batch, self.context,
            self.weight_decay, self.data, self.smallest.width, self.convention, self.head_size, self.warmup,
            self.masses,
        )  # fmt: skip

    def trials(self, recipe: str, size: Size, lrs: Iterable[float]) -> list[Trial]:
        return [self.trial(recipe, size, lr, seed) for lr in sorted(lrs) for seed in range(self.seeds)]

    def covers(self, trial: Trial) -> bool:
        """Whether a trial is one of this plan, at whichever learning rate."""
        own = self.trial(trial.recipe, trial.size, trial.lr, trial.seed)
        return trial == own and trial.size in self.sizes() and trial.seed < self.seeds

    def grid(self, recipe: str) -> tuple[float, ...]:
        return tuple(sorted(self.lrs.get(recipe, RECIPES[recipe].lrs)))


# One run --------------------------------------------------------------------------------------------------------------


def begin(trial: Trial) -> tuple[Task, nn.Module, Optimizer]:
    """What a trial trains on, its model as initialised, and the optimizer."""
    sizes = trial.sizes()
    task = task_for(trial.spec, sizes, data=trial.data, batch=trial.batch, context=trial.context)
    context: dict[str, int | None] = {"context": trial.context} if task.is_text else {}
    torch.manual_seed(trial.seed)
    model = model_for(trial.spec, sizes | context, task)
    narrowest = partial(model_for, trial.spec, trial.sizes(trial.narrowest) | context, task)
    setting = Setting(model, partial(_norm, model, trial), narrowest, trial.lr, trial.weight_decay, trial.seed)
    optimizer = RECIPES[trial.recipe].begin(setting)
    torch.manual_seed(trial.seed)  # dropout: the same in all recipes
    return task, model, optimizer


def run(trial: Trial) -> Run:
    """Trains one model; deterministic for one thread."""
    task, model, optimizer = begin(trial)
    curve = train(model, optimizer, task.batches(trial.seed), trial.steps, loss=logits_loss, warmup=trial.warmup)
    val = math.inf if curve.diverged is not None else evaluate(model, task.validation, loss=logits_loss)
    step = max(1, len(curve.losses) // POINTS)
    return Run(
        trial, curve.final, val if math.isfinite(val) else math.inf, curve.losses[::step],
        sum(p.numel() for p in model.parameters()), curve.seconds, torch.__version__,
    )  # fmt: skip


#: norms that this process has inferred, by what they depend on: a conversion takes as long as many small runs
_NORMS: dict[tuple[Any, ...], ModularNorm] = {}


def _norm(model: nn.Module, trial: Trial) -> ModularNorm:
    key = (trial.spec, trial.size, trial.context, trial.convention, trial.data, trial.head_size, trial.masses)
    if key not in _NORMS:
        _NORMS[key] = convert(model, *given_inputs(model), convention=trial.convention, masses=dict(trial.masses))
    return _NORMS[key].bind(model)


def forget_norms() -> None:
    """For who changes a constant that norms depend on."""
    _NORMS.clear()


# What the runs say ----------------------------------------------------------------------------------------------------


def mean_losses(runs: Iterable[Run], recipe: str, size: Size) -> dict[float, float]:
    """Learning rate -> mean final training loss over seeds, ascending."""
    found: dict[float, list[float]] = {}
    for one in runs:
        if one.trial.recipe == recipe and one.trial.size == size:
            found.setdefault(one.trial.lr, []).append(one.train_loss)
    return {lr: statistics.fmean(found[lr]) for lr in sorted(found)}


def chosen_lr(losses: dict[float, float]) -> float:
    """The learning rate of the lowest mean loss; the lower one of equals."""
    return min(losses, key=lambda lr: (losses[lr], lr))


def _wanted(plan: Plan, recipe: str, runs: dict[Trial, Run]) -> list[Trial]:
    """The trials of a recipe that are known to be needed and have not been run."""
    out: list[Trial] = []
    chosen: float | None = None
    ours = [one for one in runs.values() if plan.covers(one.trial)]  # the file may hold runs of other plans
    for size in plan.sizes():
        losses = mean_losses(ours, recipe, size)
        grid = plan.grid(recipe)
        missing = [t for t in plan.trials(recipe, size, grid) if t not in runs]
        if not missing:
            lrs = [chosen_lr(losses), *_extended(losses, grid)]  # the best may have fewer seeds, from an earlier plan
            missing = [t for t in plan.trials(recipe, size, lrs) if t not in runs]
        if size == plan.smallest and not missing:
            chosen = chosen_lr(losses)
        elif chosen is not None:
            missing += [t for t in plan.trials(recipe, size, [chosen]) if t not in runs and t not in missing]
        out += missing
    return out


def _extended(losses: dict[float, float], grid: tuple[float, ...]) -> list[float]:
    """One more octave where the best learning rate lies at an end of those tried; none else."""
    best, tried = chosen_lr(losses), list(losses)
    if best == tried[0] and best > grid[0] / 2.0**MOST_EXTRA:
        return [best / 2]
    if best == tried[-1] and best < grid[-1] * 2.0**MOST_EXTRA:
        return [best * 2]
    return []


# All of them ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Run]:
    """The runs in a sweep's file, none if there is no file; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [Run.from_line(line) for line in lines[:-1] if line.strip()]


def check(plan: Plan) -> None:
    """Builds the smallest and the largest model without weights, so that an error comes before the first run."""
    for recipe in plan.recipes:
        if recipe not in RECIPES:
            raise ModnormError(f"There is no optimizer {recipe!r}.", do=f"Use {', '.join(RECIPES)}.")
    if plan.masses and not any(recipe.startswith("modnorm-") for recipe in plan.recipes):
        raise ModnormError(
            f"Masses change nothing for {', '.join(plan.recipes)}.",
            why="they divide a step among the parts of a model in the modular norm alone",
            do="Leave --mass out, or name an optimizer in the modular norm, such as modnorm-adamw.",
        )
    schedule(0, plan.steps, plan.warmup)  # refuses a warm-up that leaves no step
    odd = [width for width in plan.widths if plan.head_size and width % plan.head_size]
    if odd:
        raise ModnormError(
            f"Heads of {plan.head_size} features do not split a width of {', '.join(map(str, odd))} evenly.",
            do="Give widths that are multiples of it, or another --head-size.",
        )
    for size in (plan.smallest, plan.sizes()[-1]):
        build(plan.spec, device="meta", **plan.trial(plan.recipes[0], size, 1.0, 0).sizes())


def common_head_size(spec: str, widths: Sequence[int], depth: int) -> int | None:
    """The size of attention heads in the narrowest model, or what of it divides every width.

    None where the model's configuration names no heads, or sizes them apart from its width. Raises ModnormError where
    only heads of fewer than `SMALLEST_HEAD` features divide every width.
    """
    width = min(widths)
    config = getattr(build(spec, device="meta", width=width, layers=depth), "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1 or getattr(config, "head_dim", None) not in (None, width / heads):
        return None
    size = math.gcd(width // heads, *widths)
    if size < min(SMALLEST_HEAD, width // heads):
        raise ModnormError(
            f"Widths of {', '.join(map(str, widths))} have no size of attention heads in common.",
            why=f"heads keep their size across widths, and {size} features are too few for one",
            do=f"Give widths with a common divisor of {SMALLEST_HEAD} or more.",
        )
    return size


def sweep(plan: Plan, path: Path, *, jobs: int, watch: Callable[[Run | None, int, int], object]) -> list[Run]:
    """Runs what is missing of `plan`, `jobs` at a time, and appends every run to `path`; returns the plan's runs, in
    the order of its recipes.

    Args:
        plan: what to run. path: file of JSON lines. jobs: processes, one thread each.
        watch: called with each new run (None at the start), and the units of work done and known so far.

    Raises:
        ModnormError: a recipe or the model's sizes are unknown, a run failed (the runs before it are in the file), or a
        process was killed.
    """
    check(plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    old = read(path)
    if path.exists():  # without a line that was cut off
        path.write_text("".join(one.line() + "\n" for one in old), encoding="utf-8")
    runs = {one.trial: one for one in old}
    pending: dict[Future[Run], Trial] = {}
    with path.open("a", encoding="utf-8") as file:
        processes = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(jobs, processes, _start_worker)
        try:
            finished = 0
            while True:
                for recipe in plan.recipes:
                    for trial in _wanted(plan, recipe, runs):
                        if trial not in pending.values():
                            pending[pool.submit(run, trial)] = trial
                known = finished + sum(_work(trial) for trial in pending.values())
                watch(None, finished, known)
                if not pending:
                    break
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    trial = pending.pop(future)
                    try:
                        result = future.result()
                    except BrokenProcessPool:
                        raise
                    except Exception as error:
                        error.add_note(f"  (in the run of {trial.recipe}, {trial.size}, lr {trial.lr:g}; runs that "
                                       f"ended are kept in {path})")  # fmt: skip
                        raise
                    runs[trial] = result
                    file.write(result.line() + "\n")
                    file.flush()
                    finished += _work(trial)
                    watch(result, finished, known)
        except BrokenProcessPool as error:
            raise ModnormError(
                "A process that trains was ended from outside.", why="often for want of memory", do="Pass --jobs 1."
            ) from error
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    ours = [one for one in runs.values() if plan.covers(one.trial)]
    return [one for recipe in plan.recipes for one in ours if one.trial.recipe == recipe]


def _work(trial: Trial) -> int:
    """What a run takes, roughly, in units of its own."""
    return trial.width * (trial.width + 200) * (trial.depth + 1) * trial.steps


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends its children
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("torch", "transformers", "timm"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

"""The training runs of the demo: GPT-2s of several sizes, each by AdamW in the modular norm and by AdamW alone.

Each learning rate is tuned on the smallest model only, over a few seeds (with one seed the choice is chance), and kept
for the others. A run has one thread, so its losses do not depend on how many run at the same time.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from modnorm_fx.errors import ModnormError
from modnorm_fx.optim import ModularOptimizer
from modnorm_fx.pipeline import convert

from .data import text
from .train import Curve, evaluate, train

__all__ = ["METHODS", "Found", "Plan", "Result", "Size", "Trial", "mean_loss", "run_all"]

#: method -> what it is called
METHODS = {"modnorm": "AdamW in the modular norm", "plain": "plain AdamW"}
BETAS = (0.9, 0.95)
HEAD_SIZE = 32
VALIDATION_BATCHES = 8


@dataclass(frozen=True, order=True)
class Size:
    layers: int
    width: int

    def __str__(self) -> str:
        return f"{self.layers} × {self.width}"

    @property
    def work(self) -> float:
        """What a step takes, roughly, in units of its own."""
        return (self.layers + 0.6) * self.width


@dataclass(frozen=True)
class Plan:
    """What the demo trains.

    `sizes`: the smallest first; `lrs`: the grid of each method, for that size; `seeds`: for the grid, and the first of
    them for everything else.
    """

    sizes: tuple[Size, ...] = (Size(2, 64), Size(8, 64), Size(2, 192))
    lrs: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {"modnorm": (0.0625, 0.125, 0.25), "plain": (1e-3, 2e-3, 4e-3)}
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 120
    batch: int = 16
    context: int = 64
    data: Path | None = None
    workers: int = 2

    def grid(self, method: str) -> list[Trial]:
        return [self._trial(method, self.sizes[0], lr, seed) for lr in self.lrs[method] for seed in self.seeds]

    def others(self, method: str, lr: float) -> list[Trial]:
        """The sizes above the smallest."""
        return [self._trial(method, size, lr, self.seeds[0]) for size in self.sizes[1:]]

    def _trial(self, method: str, size: Size, lr: float, seed: int) -> Trial:
        return Trial(method, size, lr, seed, self.steps, self.batch, self.context, self.data)

    def all_sizes(self) -> list[Size]:
        """Of all runs; which learning rates some of them have, only the first ones tell."""
        grids = sum(len(self.grid(method)) for method in METHODS)
        return [self.sizes[0]] * grids + [*self.sizes[1:]] * len(METHODS)


@dataclass(frozen=True)
class Trial:
    method: str
    size: Size
    lr: float
    seed: int
    steps: int
    batch: int
    context: int
    data: Path | None

    def __str__(self) -> str:
        return f"{METHODS[self.method]}, lr {self.lr:g}, {self.size}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    trial: Trial
    parameters: int
    curve: Curve
    val_loss: float


def gpt2(size: Size, vocab: int, context: int) -> nn.Module:
    """GPT-2 as transformers builds it, embedding and head tied, without dropout; random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt2",
        n_layer=size.layers,
        n_embd=size.width,
        n_head=max(1, size.width // HEAD_SIZE),
        n_positions=context,
        vocab_size=vocab,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config)


def run(trial: Trial, watch: Callable[[int, float], object] | None = None) -> Result:
    corpus = text(trial.data)
    torch.manual_seed(trial.seed)
    model = gpt2(trial.size, corpus.vocab, trial.context)
    optimizer: Optimizer = AdamW(model.parameters(), lr=trial.lr, betas=BETAS, weight_decay=0.0)
    if trial.method == "modnorm":
        norm = convert(model)
        norm.initialize_(model, torch.Generator().manual_seed(trial.seed))
        optimizer = ModularOptimizer(optimizer, norm, lr=trial.lr)
    batches = corpus.batches("train", trial.batch, trial.context, seed=trial.seed)
    curve = train(model, optimizer, batches, trial.steps, watch=watch)
    held_out = corpus.batches("val", trial.batch, trial.context, seed=trial.seed)
    val_loss = evaluate(model, list(islice(held_out, VALIDATION_BATCHES)))
    return Result(trial, sum(p.numel() for p in model.parameters()), curve, val_loss)


def mean_loss(results: list[Result]) -> float:
    """The mean final training loss; infinite if one of them diverged."""
    return sum(result.curve.final for result in results) / len(results)


# Several at a time ----------------------------------------------------------------------------------------------------

_channel: Any = None  # in a worker: where steps are reported


@dataclass(frozen=True)
class Found:
    """Of one method: the runs on the smallest model by learning rate, the lr chosen, and a run of each size with it."""

    grid: dict[float, list[Result]]
    lr: float
    runs: list[Result]


def run_all(
    plan: Plan, on_step: Callable[[Trial, int, float], object], on_end: Callable[[Result], object]
) -> dict[str, Found]:
    """Runs everything, `plan.workers` runs at a time; method -> what was found.

    Args:
        plan: what to run.
        on_step: called now and then with a running trial, the steps done and the last loss.
        on_end: called with every result.
    """
    processes = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    channel = processes.SimpleQueue()
    results: dict[Trial, Result] = {}
    waiting: set[Future[Result]] = set()
    pool = ProcessPoolExecutor(plan.workers, processes, _start_worker, (channel,))
    try:
        for method in METHODS:
            waiting |= {pool.submit(_work, trial) for trial in plan.grid(method)}
        while waiting:
            done, waiting = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
            while not channel.empty():
                on_step(*channel.get())
            for result in (future.result() for future in done):
                on_end(result)
                results[result.trial] = result
                grid = plan.grid(result.trial.method)
                if result.trial in grid and results.keys() >= set(grid):
                    others = plan.others(result.trial.method, _best_lr(plan, result.trial.method, results))
                    others.sort(key=lambda trial: -trial.size.work)
                    waiting |= {pool.submit(_work, trial) for trial in others}
    except BrokenProcessPool as error:
        raise ModnormError(
            "A process that trains was ended from outside.", why="often for want of memory", do="Pass --workers 1."
        ) from error
    except BaseException:  # of Ctrl-C too: nothing goes on in the background
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return {method: _found(plan, method, results) for method in METHODS}


def _grid(plan: Plan, method: str, results: dict[Trial, Result]) -> dict[float, list[Result]]:
    return {lr: [results[t] for t in plan.grid(method) if t.lr == lr] for lr in plan.lrs[method]}


def _best_lr(plan: Plan, method: str, results: dict[Trial, Result]) -> float:
    """That of the lowest mean final training loss; the lower learning rate of equals."""
    loss, lr = min((mean_loss(tried), lr) for lr, tried in _grid(plan, method, results).items())
    if math.isinf(loss):
        raise ModnormError(f"{METHODS[method]} diverged on the smallest model with every learning rate of the grid.")
    return lr


def _found(plan: Plan, method: str, results: dict[Trial, Result]) -> Found:
    grid, lr = _grid(plan, method, results), _best_lr(plan, method, results)
    return Found(grid, lr, [grid[lr][0], *(results[trial] for trial in plan.others(method, lr))])


def _start_worker(channel: Any) -> None:
    global _channel
    _channel = channel
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches everybody: end without a traceback each
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("torch", "transformers"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _work(trial: Trial) -> Result:
    last = 0.0

    def report(step: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() > last + 0.2:
            last = time.monotonic()
            _channel.put((trial, step, loss))

    return run(trial, report)

"""The training runs of the demo: GPT-2s of several sizes, each by AdamW in the modular norm and by AdamW alone.

Each optimizer's learning rate is tuned on the smallest model only (`Plan.lrs`) and kept for the others. A run has a
process and one thread to itself, so its losses do not depend on how many run at the same time.
"""

from __future__ import annotations

import logging
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

__all__ = ["METHODS", "Plan", "Result", "Size", "Trial", "best", "run_all"]

#: method -> what it is called
METHODS = {"modnorm": "AdamW in the modular norm", "plain": "plain AdamW"}
SEED = 0
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
    """What the demo trains. `sizes`: the smallest first; `lrs`: the grid of each method, for that size."""

    sizes: tuple[Size, ...] = (Size(2, 64), Size(8, 64), Size(2, 192))
    lrs: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {"modnorm": (0.0625, 0.125, 0.25), "plain": (1e-3, 2e-3, 4e-3)}
    )
    steps: int = 120
    batch: int = 16
    context: int = 64
    data: Path | None = None
    workers: int = 2

    def trials(self, method: str, sizes: tuple[Size, ...], lrs: tuple[float, ...]) -> list[Trial]:
        shape = (self.steps, self.batch, self.context, self.data)
        return [Trial(method, size, lr, *shape) for size in sizes for lr in lrs]

    def work(self) -> float:
        """Of all runs."""
        return self.steps * sum(
            len(self.lrs[method]) * self.sizes[0].work + sum(size.work for size in self.sizes[1:]) for method in METHODS
        )


@dataclass(frozen=True)
class Trial:
    method: str
    size: Size
    lr: float
    steps: int
    batch: int
    context: int
    data: Path | None

    def __str__(self) -> str:
        return f"{METHODS[self.method]}, lr {self.lr:g}, {self.size}"


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
    torch.manual_seed(SEED)
    model = gpt2(trial.size, corpus.vocab, trial.context)
    optimizer: Optimizer = AdamW(model.parameters(), lr=trial.lr, betas=BETAS, weight_decay=0.0)
    if trial.method == "modnorm":
        norm = convert(model)
        norm.initialize_(model, torch.Generator().manual_seed(SEED))
        optimizer = ModularOptimizer(optimizer, norm, lr=trial.lr)
    batches = corpus.batches("train", trial.batch, trial.context, seed=SEED)
    curve = train(model, optimizer, batches, trial.steps, watch=watch)
    held_out = corpus.batches("val", trial.batch, trial.context, seed=SEED)
    val_loss = evaluate(model, list(islice(held_out, VALIDATION_BATCHES)))
    return Result(trial, sum(p.numel() for p in model.parameters()), curve, val_loss)


def best(results: list[Result]) -> Result:
    """The lowest final training loss; the lower learning rate of equals."""
    return min(results, key=lambda result: (result.curve.final, result.trial.lr))


# Several at a time ----------------------------------------------------------------------------------------------------

_channel: Any = None  # in a worker: where steps are reported


def run_all(
    plan: Plan, on_step: Callable[[Trial, int, float], object], on_end: Callable[[Result], object]
) -> dict[str, tuple[list[Result], list[Result]]]:
    """Method -> the grid on the smallest model, and the runs of all sizes with the lr that was best there.

    Args:
        plan: what to run.
        on_step: called now and then with a running trial, the steps done and the last loss.
        on_end: called with every result.
    """
    processes = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    channel = processes.SimpleQueue()
    found: dict[str, list[Result]] = {method: [] for method in METHODS}
    waiting: set[Future[Result]] = set()
    pool = ProcessPoolExecutor(plan.workers, processes, _start_worker, (channel,))
    try:
        for method in METHODS:
            waiting |= {pool.submit(_work, t) for t in plan.trials(method, plan.sizes[:1], plan.lrs[method])}
        while waiting:
            done, waiting = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
            while not channel.empty():
                on_step(*channel.get())
            for result in (future.result() for future in done):
                on_end(result)
                method = result.trial.method
                found[method].append(result)
                if len(found[method]) == len(plan.lrs[method]):
                    chosen = _chosen(found[method])
                    larger = sorted(plan.sizes[1:], key=lambda size: -size.work)
                    waiting |= {pool.submit(_work, t) for t in plan.trials(method, tuple(larger), (chosen.trial.lr,))}
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
    return {method: _in_order(plan, results) for method, results in found.items()}


def _chosen(grid: list[Result]) -> Result:
    chosen = best(grid)
    if chosen.curve.diverged is not None:
        raise ModnormError(f"Every run by {METHODS[chosen.trial.method]} on the smallest model diverged.")
    return chosen


def _in_order(plan: Plan, results: list[Result]) -> tuple[list[Result], list[Result]]:
    grid = sorted((r for r in results if r.trial.size == plan.sizes[0]), key=lambda r: r.trial.lr)
    larger = sorted((r for r in results if r.trial.size != plan.sizes[0]), key=lambda r: plan.sizes.index(r.trial.size))
    return grid, [best(grid), *larger]


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

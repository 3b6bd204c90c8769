"""A small training loop, with no output of its own: a model, an optimizer and batches in, the losses out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from modnorm_fx.errors import ModnormError, NonFiniteError

__all__ = ["Curve", "Loss", "cross_entropy", "evaluate", "schedule", "train"]

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
TAIL = 0.1  # of the steps: over them the final training loss is averaged


@dataclass(frozen=True)
class Curve:
    """The training loss of every step, as it was before that step; `diverged` is the step (from 1) that was not finite.

    `seconds` is the time of all steps together, `cpu_seconds` what the processor spent on them (all threads): other
    work on the machine hardly changes it.
    """

    losses: tuple[float, ...]
    seconds: float
    diverged: int | None = None
    cpu_seconds: float = 0.0

    @property
    def final(self) -> float:
        """Mean over the last tenth of the steps; infinite for a run that diverged."""
        tail = self.losses[-max(1, round(TAIL * len(self.losses))) :]
        return math.inf if self.diverged is not None else math.fsum(tail) / len(tail)


def cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Of the model's logits, which it returns as they are (torch), or as `.logits` or first (transformers)."""
    output = model(inputs)
    logits = output if isinstance(output, Tensor) else output.logits if hasattr(output, "logits") else output[0]
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


def schedule(step: int, steps: int, warmup: int = 0, decay: bool = True) -> float:
    """Part of the learning rate that a step (from 0) has: up over `warmup` steps, then down to 0 after the last one.

    Raises ModnormError where the warm-up leaves no step.
    """
    if not 0 <= warmup < max(steps, 1):
        raise ModnormError(
            f"A warm-up of {warmup} steps does not fit into a training of {steps}.",
            do="Take fewer: a tenth of the steps is usual.",
        )
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (steps - step) / (steps - warmup) if decay else 1.0


def train(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    steps: int,
    *,
    loss: Loss = cross_entropy,
    decay: bool = True,
    warmup: int = 0,
    watch: Callable[[int, float], object] | None = None,
) -> Curve:
    """Trains for `steps` steps, or until the loss or an update is no longer finite.

    Args:
        model: it is set to train mode.
        optimizer: any; the learning rates it has now are the highest.
        batches: inputs and labels; at least `steps` of them, or the run is shorter.
        loss: scalar loss of (model, inputs, labels).
        decay: lower the learning rates linearly, so that they would be 0 after the last step; else keep them.
        warmup: over how many steps they first rise linearly; the next step has them whole.
        watch: called after every step with the number of steps done and the step's loss.
    """
    model.train()
    rates = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    start, cpu_start = time.perf_counter(), time.process_time()
    diverged = None
    for step, (inputs, labels) in enumerate(islice(batches, steps)):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step, steps, warmup, decay)
        value = loss(model, inputs, labels)
        losses.append(value.item())
        try:
            if not math.isfinite(losses[-1]):
                raise NonFiniteError("The loss is not finite.")
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        except NonFiniteError:
            diverged = step + 1
            break
        if watch is not None:
            watch(step + 1, losses[-1])
    return Curve(tuple(losses), time.perf_counter() - start, diverged, time.process_time() - cpu_start)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch], *, loss: Loss = cross_entropy) -> float:
    """Mean loss over batches, in eval mode; the mode is put back afterwards."""
    training = model.training
    model.eval()
    try:
        count = sum(len(labels) for _, labels in batches)
        return math.fsum(loss(model, *batch).item() * len(batch[1]) / count for batch in batches)
    finally:
        model.train(training)

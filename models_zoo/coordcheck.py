"""Does a step do the same at every size? The coordinate check of mup, and what the norm itself predicts.

Two questions, each answered by measurement, for models of several sizes at one learning rate:

* For each module with weights, the RMS of its output, and of the change of its output since the start, after some steps
  of training. A parametrisation transfers where these stay level as the model grows (arXiv 2203.03466, appendix D.1).
* For each leaf of a modular norm, how far the first step, taken by this leaf alone, moves the model's output relative
  to its size, against what its sensitivity predicts (``sensitivity · scale · ‖ΔW‖``), and the norm of that step over
  lr times the leaf's target.

Modules and leaves that differ in a number only (blocks of a stack) are taken together, so that depths compare.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from modnorm_fx.norm import ModularNorm
from modnorm_fx.optim import ModularOptimizer

from .training import logits, logits_loss
from .transfer import Plan, Size, begin, check

__all__ = ["LEVEL", "Coordinate", "Prediction", "coordinates", "measure", "predictions", "spread", "together"]

LEVEL = 2.0
"""A quantity counts as level if it differs by at most this factor over all sizes: one octave, as the sweep's drift."""


@dataclass(frozen=True)
class Coordinate:
    """One module at one size, `step` updates after the start: RMS of its output, and of its change since the start."""

    module: str
    size: Size
    step: int
    rms: float
    change: float


@dataclass(frozen=True)
class Prediction:
    """One leaf at one size: relative change of the model's output for the first step of this leaf alone.

    Attributes:
        leaf: the weight, or the part of it.
        predicted: sensitivity · scale · norm of the step. measured: RMS of the change over RMS of the output.
        ratio: norm of the step over lr times the target: 1 but for the error of the power iteration.
    """

    leaf: str
    size: Size
    predicted: float
    measured: float
    ratio: float


def measure(plan: Plan, lr: float, watch: Callable[[Size], object]) -> tuple[list[Coordinate], list[Prediction]]:
    """Trains every size of `plan` for its steps with each seed by its first recipe; predictions if it has a norm.

    Raises ModnormError: the recipe or the model's sizes are unknown, or the model cannot be trained.
    """
    check(plan)
    found: list[Coordinate] = []
    foreseen: list[Prediction] = []
    for size in plan.sizes():
        watch(size)
        for seed in range(plan.seeds):
            trial = plan.trial(plan.recipes[0], size, lr, seed)
            task, model, optimizer = begin(trial)
            batches = list(islice(task.batches(seed), plan.steps))
            if isinstance(optimizer, ModularOptimizer) and not plan.weight_decay:
                foreseen += predictions(model, optimizer, batches[0], lr, size)
                _, model, optimizer = begin(trial)
            found += coordinates(model, optimizer, batches, size)
    return found, foreseen


def coordinates(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[tuple[Tensor, Tensor]], size: Size
) -> list[Coordinate]:
    """Trains one step per batch (inputs, labels); measures every module on the first batch, before and after each."""
    probe = batches[0][0]
    start = _outputs(model, probe)
    found = [Coordinate(path, size, 0, _rms(x), 0.0) for path, x in start.items()]
    for step, batch in enumerate(batches, 1):
        _learn(model, optimizer, batch)
        now = _outputs(model, probe)
        found += [Coordinate(path, size, step, _rms(x), _rms(x - start[path])) for path, x in now.items()]
    return found


def predictions(
    model: nn.Module, optimizer: ModularOptimizer, batch: tuple[Tensor, Tensor], lr: float, size: Size
) -> list[Prediction]:
    """Takes one step of `optimizer` (without weight decay); what it does leaf by leaf, and what the norm says of it."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _learn(model, optimizer, batch)
    after = dict(model.named_parameters())
    names = _names(optimizer.norm)
    found = []
    with _as_measured(model):
        start = _logits(model, before, batch[0])
        for leaf in optimizer.norm.leaves:
            changed = before[leaf.weight].clone()
            leaf.write_(changed, leaf.read(after[leaf.weight].detach()))
            step = float(leaf.atom.norm(leaf.read(changed - before[leaf.weight])))
            if step > 0 and leaf.target > 0:
                moved = _rms(_logits(model, before | {leaf.weight: changed}, batch[0]) - start)
                predicted, ratio = leaf.sensitivity * leaf.scale * step, step / (lr * leaf.target)
                found.append(Prediction(names[leaf.key], size, predicted, moved / _rms(start), ratio))
    return found


def _names(norm: ModularNorm) -> dict[str, str]:
    """Leaf key -> its weight, and which of the weight's parts it is: the rows of a part depend on the width."""
    keys: dict[str, list[str]] = defaultdict(list)
    for leaf in norm.leaves:
        keys[leaf.weight].append(leaf.key)
    return {
        key: weight if len(some) == 1 else f"{weight}, part {place} of {len(some)}"
        for weight, some in keys.items()
        for place, key in enumerate(some, 1)
    }


def together(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ in numbers between dots only, by what they have in common: `h.3.attn` is one of `h.*.attn`."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)].append(name)
    return dict(found)


def spread(values: Sequence[float]) -> float:
    """The largest over the smallest; infinite if one is not finite or only some are zero."""
    if not all(map(math.isfinite, values)) or (min(values) <= 0 < max(values)):
        return math.inf
    return max(values) / min(values) if max(values) > 0 else 1.0


# Running the model ----------------------------------------------------------------------------------------------------


def _learn(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    logits_loss(model, *batch).backward()
    optimizer.step()


@contextmanager
def _as_measured(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; batch norms use the batch (running averages lag behind) and keep their own."""
    training, momenta = model.training, {m: m.momentum for m in model.modules() if isinstance(m, _BatchNorm)}
    model.eval()
    for module in momenta:
        module.training, module.momentum = True, 0.0
    try:
        with torch.no_grad():
            yield
    finally:
        for module, momentum in momenta.items():
            module.momentum = momentum
        model.train(training)


def _logits(model: nn.Module, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    prefixed = {f"model.{name}": weight for name, weight in weights.items()}
    return functional_call(_Logits(model), prefixed, (inputs,), tie_weights=True).float()


def _outputs(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The floating-point output of every module that holds weights of its own, by path."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.is_floating_point():
                found[path] = first.detach().float()

        return hook

    holders = [(path, m) for path, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
    handles = [module.register_forward_hook(keep(path)) for path, module in holders]
    try:
        with _as_measured(model):
            logits(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


class _Logits(nn.Module):
    """A model that returns its logits, for `functional_call`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return logits(self.model, inputs)

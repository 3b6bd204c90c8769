"""Does a step do the same at every size? The coordinate check of mup, and what the norm itself predicts.

Two questions, each answered by measurement:

* For each module, the RMS of its output and of the change of its output since the start, after some steps of training
  at one learning rate, for several sizes. A parametrisation transfers where these stay level as the model grows
  (arXiv 2203.03466, appendix D.1).
* For each weight, how far one normalised update of it alone moves the network's output, relative to the output's size,
  against what its sensitivity predicts: ``sensitivity · scale · ‖ΔW‖``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modnorm_fx.norm import ModularNorm

__all__ = ["Coordinate", "Prediction", "coordinates", "predictions", "slopes"]


@dataclass(frozen=True)
class Coordinate:
    """One module at one size, `step` updates after the start: RMS of its output, and of its change since the start."""

    module: str
    size: int
    step: int
    rms: float
    change: float


@dataclass(frozen=True)
class Prediction:
    """One leaf: relative change of the output for an update of this leaf alone, as predicted and as measured.

    `ratio` is the norm of the update that the optimizer made, over lr times the leaf's target: 1 but for the error of
    the power iteration.
    """

    key: str
    predicted: float
    measured: float
    ratio: float


@contextmanager
def _outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The floating-point outputs of every module that holds weights of its own, by path, as the model runs."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.is_floating_point():
                found[path] = first.detach().float()

        return hook

    handles = [
        module.register_forward_hook(keep(path))
        for path, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@torch.no_grad()
def _run(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    training = model.training
    model.eval()
    try:
        with _outputs(model) as found:
            model(inputs)
        return dict(found)
    finally:
        model.train(training)


def coordinates(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[tuple[Tensor, Tensor]], loss: Any, size: int
) -> list[Coordinate]:
    """Trains one step per batch and measures every module on the first batch, before and after each step.

    Args:
        model, optimizer: as they are trained. batches: (inputs, labels).
        loss: scalar loss of (model, inputs, labels).
        size: what the rows are filed under, e.g. the width.
    """
    probe = batches[0][0]
    start = _run(model, probe)
    out = [Coordinate(path, size, 0, _rms(x), 0.0) for path, x in start.items()]
    for step, (inputs, labels) in enumerate(batches, 1):
        optimizer.zero_grad()
        loss(model, inputs, labels).backward()
        optimizer.step()
        now = _run(model, probe)
        out += [Coordinate(path, size, step, _rms(x), _rms(x - start[path])) for path, x in now.items()]
    return out


def slopes(found: Sequence[Coordinate], what: str = "change") -> dict[str, float]:
    """Module -> exponent of growth with size (slope of log2 against log2 size) after the last step; 0 is level.

    Args:
        found: rows of several sizes. what: ``rms`` or ``change``.
    """
    last = max(one.step for one in found)
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for one in found:
        value = getattr(one, what)
        if one.step == last and value > 0 and math.isfinite(value):
            points[one.module].append((math.log2(one.size), math.log2(value)))
    return {module: _slope(pairs) for module, pairs in points.items() if len({x for x, _ in pairs}) > 1}


def _slope(pairs: Sequence[tuple[float, float]]) -> float:
    x_mean = math.fsum(x for x, _ in pairs) / len(pairs)
    y_mean = math.fsum(y for _, y in pairs) / len(pairs)
    return math.fsum((x - x_mean) * (y - y_mean) for x, y in pairs) / math.fsum((x - x_mean) ** 2 for x, _ in pairs)


def predictions(
    model: nn.Module, norm: ModularNorm, before: Mapping[str, Tensor], inputs: Tensor, lr: float
) -> list[Prediction]:
    """For each leaf, the effect of its last update alone on the model's first floating output.

    Args:
        model: after one step of a ModularOptimizer without weight decay.
        norm: its norm. before: the weights before that step, by name.
        inputs: a batch. lr: of the step.
    """
    training = model.training
    model.eval()
    after = {name: p.detach() for name, p in model.named_parameters()}
    base = _logits(functional_call(model, dict(before), (inputs,)))
    out = []
    for leaf in norm.leaves:
        if leaf.target <= 0:
            continue
        changed = before[leaf.weight].clone()
        part = leaf.read(changed)
        part.copy_(leaf.read(after[leaf.weight]))
        leaf.write_(changed, part)
        size = float(leaf.atom.norm(leaf.read(changed - before[leaf.weight])))
        if not size:
            continue
        moved = _logits(functional_call(model, dict(before) | {leaf.weight: changed}, (inputs,)))
        out.append(
            Prediction(
                leaf.key,
                leaf.sensitivity * leaf.scale * size,
                _rms(moved - base) / max(_rms(base), 1e-12),
                size / (lr * leaf.target),
            )
        )
    model.train(training)
    return out


@torch.no_grad()
def _logits(output: Any) -> Tensor:
    output = output if isinstance(output, Tensor) else output.logits if hasattr(output, "logits") else output[0]
    return output.detach().float()

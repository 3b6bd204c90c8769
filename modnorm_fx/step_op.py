"""A step of a `ModularOptimizer` as one op, so that `torch.compile` of a training step meets no graph break at it.

What happens inside is not traced: generated code, kernels and the base optimizer run as they do without compilation. To
the compiler it is an op that reads gradients and changes weights.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import OptimizerError

if TYPE_CHECKING:
    from .optim import ModularOptimizer

__all__ = ["enlist", "step"]

#: number -> optimizer, for as long as it lives; a number is never given twice
_LIVE: weakref.WeakValueDictionary[int, ModularOptimizer] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)


def enlist(optimizer: ModularOptimizer) -> int:
    """A number by which the op finds the optimizer."""
    number = next(_NUMBERS)
    _LIVE[number] = optimizer
    return number


@torch.library.custom_op("modnorm_fx::step", mutates_args=("weights",))
def step(weights: list[Tensor], gradients: list[Tensor], places: list[int], optimizer: int) -> None:
    """`optimizer.step()` with these gradients, for the parameters `weights`, which stand at `places` among its own."""
    opt = _LIVE.get(optimizer)
    if opt is None:
        raise OptimizerError(
            "A compiled step was called whose ModularOptimizer no longer exists.",
            do="keep the optimizer for as long as its compiled step is used",
        )
    params = [p for group in opt.param_groups for p in group["params"]]
    kept = [p.grad for p in params]
    try:
        for p in params:
            p.grad = None
        for place, gradient in zip(places, gradients, strict=True):
            params[place].grad = gradient
        opt._step()
    finally:
        for p, gradient in zip(params, kept, strict=True):
            p.grad = gradient
    for place, weight in zip(places, weights, strict=True):
        if weight.data_ptr() != params[place].data_ptr():  # the compiler works on a copy that it will write back
            weight.copy_(params[place])


@step.register_fake
def _(weights: list[Tensor], gradients: list[Tensor], places: list[int], optimizer: int) -> None:
    return None

"""A step of a `ModularOptimizer` as one op, so that `torch.compile` of a training step meets no graph break at it.

What happens inside is not traced: generated code, kernels and the base optimizer run as they do without compilation. To
the compiler it is an op that reads gradients and changes weights.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .optim import ModularOptimizer

__all__ = ["enlist", "step"]

#: number -> optimizer, for as long as it lives
_LIVE: weakref.WeakValueDictionary[int, ModularOptimizer] = weakref.WeakValueDictionary()


def enlist(optimizer: ModularOptimizer) -> int:
    """A number by which the op finds the optimizer."""
    number = max(_LIVE, default=0) + 1
    _LIVE[number] = optimizer
    return number


@torch.library.custom_op("modnorm_fx::step", mutates_args=("weights",))
def step(weights: list[Tensor], gradients: list[Tensor], optimizer: int) -> None:
    """`optimizer.step()` for the parameters `weights`, in its order, with these gradients."""
    opt = _LIVE[optimizer]
    params = [p for group in opt.param_groups for p in group["params"] if p.requires_grad and p.grad is not None]
    kept = [p.grad for p in params]
    try:
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        opt._step()
    finally:
        for p, gradient in zip(params, kept, strict=True):
            p.grad = gradient
    for p, weight in zip(params, weights, strict=True):
        if weight.data_ptr() != p.data_ptr():  # the compiler works on a copy that it will write back
            weight.copy_(p)


@step.register_fake
def _(weights: list[Tensor], gradients: list[Tensor], optimizer: int) -> None:
    return None

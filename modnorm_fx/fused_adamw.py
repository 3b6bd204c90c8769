"""AdamW's arithmetic written straight into the normaliser's buffers: six words of memory for each weight, not eight.

`torch.optim.AdamW` steps on zeros: they are written, then read and written again. The kernel reads gradient and
averages, and writes averages and update. It is used where it gives what the optimizer would (to rounding): see `takes`.
The first step of a parameter is always torch's own, which makes the averages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .kernels import cpu

__all__ = ["takes", "write_updates"]

KNOWN = (torch.optim.Adam, torch.optim.AdamW)


def takes(base: Optimizer, active: list[tuple[int, str, Tensor]]) -> bool:
    """Whether the kernel can stand in for `base.step()`: plain Adam or AdamW without hooks, float32 on the CPU,
    contiguous gradients and averages, no amsgrad, and every parameter has been stepped before."""
    if type(base) not in KNOWN or base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks or not active:
        return False
    for group in base.param_groups:
        if group["amsgrad"] or group["eps"] <= 0 or any(isinstance(b, Tensor) for b in group["betas"]):
            return False
    for _, _, p in active:  # a plain loop: this runs for every parameter in every step
        state, gradient = base.state.get(p), p.grad
        if not state or gradient is None:
            return False
        average, square = state["exp_avg"], state["exp_avg_sq"]
        if not (gradient.is_contiguous() and average.is_contiguous() and square.is_contiguous() and p.is_contiguous()):
            return False
        if not cpu.takes(p, gradient, average, square):
            return False
    return True


def write_updates(base: Optimizer, active: list[tuple[int, str, Tensor]], into: Mapping[str, Tensor]) -> None:
    """What `base.step()` with lr 1 would add to zeros, written `into`; its state moves on as if it had stepped."""
    alike: dict[tuple[int, torch.Size], list[tuple[str, Tensor]]] = defaultdict(list)
    for index, name, p in active:
        alike[index, p.shape].append((name, p))
    for (index, _), those in alike.items():
        group: dict[str, Any] = base.param_groups[index]
        states = [base.state[p] for _, p in those]
        torch._foreach_add_([state["step"] for state in states], 1)
        adam = cpu.AdamW(
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"].item() for state in states],
            betas=group["betas"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        gradients: list[Any] = [p.grad for _, p in those]
        cpu.adamw(gradients, adam, [into[name] for name, _ in those])

"""How the update of any torch optimizer is read off it, without its touching the weights.

* An optimizer whose update does not depend on the weights (`WEIGHT_INDEPENDENT`) steps on zeros with learning rate 1,
  so the update is exact in the weights' dtype, however small. Coupled (L2) weight decay is added to the gradients
  first, as the optimizer itself would do.
* Any other optimizer steps on a copy of the weights, and the update is new minus old. Rounding of the new weights
  limits its precision: relative to the update the error is about `eps·|weight|/|update|`. Its learning rate only scales
  the difference, so it starts at 1, whatever the user set, and is multiplied by powers of two while updates stay below
  `VISIBLE` of their weights (float32: 2^-6, so 18 of 24 bits are left; bfloat16: 1, all 8 bits). Optimizers that bound
  their own step (Adafactor) escape this, and lose no more than they would alone. A closure may look at weights that
  the optimizer has moved (LBFGS), so with one the learning rate stays what the user set.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import fused_adamw, runtime

__all__ = ["Active", "BaseStep", "announce"]

WEIGHT_INDEPENDENT: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Rprop,
)
"""Apart from weight decay, their update ignores the weights. Exactly these classes: a subclass may do anything."""

ALWAYS_DECOUPLED = (torch.optim.Adafactor, torch.optim.Muon)
"""Their weight decay acts on the weights directly; others say so by `decoupled_weight_decay` in their groups."""

LR_IS_STATE = (torch.optim.Rprop,)
"""Here lr is the first size of steps that then adapt, not a factor: it is left as the user set it."""

VERSION = 1
VISIBLE = {torch.float64: 2.0**-30, torch.float32: 2.0**-6, torch.bfloat16: 1.0}
LARGEST_LR = 2.0**24

NOT_SHARED = ("params", "param_names", "lr", "weight_decay", "initial_lr")
"""Entries of a parameter group that are not kept equal between the wrapper and the base."""

logger = logging.getLogger("modnorm_fx")

Active = list[tuple[int, str, Tensor]]
"""(index of the group, name of the weight, parameter) of everything that a step changes."""

Groups = list[dict[str, Any]]


class BaseStep:
    """Steps a base optimizer on behalf of a wrapper with the same parameter groups, and returns its updates.

    Args:
        base: any torch optimizer.
        weight_dependent: whether its update depends on the weights; None looks its class up.
    """

    def __init__(self, base: Optimizer, weight_dependent: bool | None):
        self.base = base
        self.weight_dependent = type(base) not in WEIGHT_INDEPENDENT if weight_dependent is None else weight_dependent
        self.lr = [1.0] * len(base.param_groups)  # of each group, while its updates are read

    def update_type(self, parameter: Tensor) -> torch.dtype:
        """The dtype of the update of a parameter: its own, or what differences of weights are taken in."""
        return runtime.working(parameter).dtype if self.weight_dependent else parameter.dtype

    def write_updates(
        self, groups: Groups, active: Active, into: Mapping[str, Tensor], closure: Callable[[], Any] | None = None
    ) -> None:
        """Writes the base's update of each active parameter, sign included; the weights are put back whatever happens.

        Args:
            groups: the wrapper's parameter groups, whose settings (but lr and weight decay) the base uses.
            active: parameters with a gradient. With a closure, filled by the closure.
            into: where updates go, by name: shaped like the parameters, of dtype `update_type`, whatever they hold.
            closure: passed to the base.
        """
        if closure is None and not self.weight_dependent and fused_adamw.takes(self.base, groups, active):
            with self._gradients_for_base(groups, active), self._settings_for_base(groups, keep_lr=False):
                fused_adamw.write_updates(self.base, groups, active, into)
            return
        params = [p for _, _, p in active]
        if closure is not None:  # which of them will have gradients is not known yet
            params = [p for group in groups for p in group["params"] if p.requires_grad]
        weights = [p.data for p in params]
        spaces = {p: into[name] for _, name, p in active}  # none yet with a closure, which a weight dependent base gets
        if not self.weight_dependent and spaces:
            torch._foreach_zero_(list(spaces.values()))
        keep_lr = closure is not None or isinstance(self.base, LR_IS_STATE)
        with self._gradients_for_base(groups, active), self._settings_for_base(groups, keep_lr):
            try:
                for p, weight in zip(params, weights, strict=True):
                    direct = p in spaces and weight.is_contiguous()
                    zeros = spaces[p] if direct else torch.zeros_like(weight)
                    p.data = weight.clone() if self.weight_dependent else zeros
                self.base.step() if closure is None else self.base.step(closure)
                stepped = {p: p.data for p in params}
            finally:
                for p, weight in zip(params, weights, strict=True):
                    p.data = weight
        for _, name, p in active:
            if not self.weight_dependent and stepped[p] is not into[name]:
                into[name].copy_(stepped[p])
            elif self.weight_dependent:
                torch.sub(runtime.working(stepped[p]), runtime.working(p.data), out=into[name])
        if self.weight_dependent and not keep_lr:
            self._raise_lr(active, [into[name] for _, name, _ in active])

    @contextmanager
    def _gradients_for_base(self, groups: Groups, active: Active) -> Iterator[None]:
        """Without stale gradients of frozen parameters and those of parameters without entries (of which bases take
        means), and with the coupled weight decay that the base cannot add."""
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        resting = [p for p in params if not (p.requires_grad and p.numel())]
        replaced = [(p, p.grad) for p in resting]
        for p in resting:
            p.grad = None
        if not self.weight_dependent and isinstance(self.base, WEIGHT_INDEPENDENT):
            for index, _, p in active:
                group = self.base.param_groups[index]
                decay = 0.0 if decoupled(self.base, group) else group.get("weight_decay", 0.0)
                if decay and p.grad is not None:
                    replaced.append((p, p.grad))
                    p.grad = p.grad.add(p, alpha=-decay if group.get("maximize") else decay)
        try:
            yield
        finally:
            for p, gradient in replaced:
                p.grad = gradient

    @contextmanager
    def _settings_for_base(self, groups: Groups, keep_lr: bool) -> Iterator[None]:
        """The base with the wrapper's settings, learning rates `self.lr` (unless `keep_lr`), and no weight decay but
        what stays part of the update. Afterwards its own are back, and what it changed is in the wrapper's groups."""
        kept: list[dict[str, Any]] = []
        for ours, theirs, lr in zip(groups, self.base.param_groups, self.lr, strict=True):
            theirs.update({key: value for key, value in ours.items() if key in theirs and key not in NOT_SHARED})
            kept.append({key: theirs[key] for key in ("lr", "weight_decay") if key in theirs})
            if theirs.get("lr") is not None and not keep_lr:
                theirs["lr"] = lr
            if "weight_decay" in theirs and (not self.weight_dependent or decoupled(self.base, theirs)):
                theirs["weight_decay"] = 0.0
        try:
            yield
        finally:
            for ours, theirs, own in zip(groups, self.base.param_groups, kept, strict=True):
                theirs.update(own)
                ours.update({key: value for key, value in theirs.items() if key not in NOT_SHARED})

    def _raise_lr(self, active: Active, updates: list[Tensor]) -> None:
        """Raise learning rates where updates are so small beside their weights that rounding shows in them."""
        ratios = []
        for (_, _, p), update in zip(active, updates, strict=True):
            size, moves = torch.linalg.vector_norm(runtime.working(p)), p.grad.any()  # type: ignore[union-attr]
            ratio = torch.linalg.vector_norm(update) / size
            ratios.append(torch.where((size > 0) & moves, ratio, torch.inf).double().cpu())
        doublings: dict[int, int] = {}
        for (index, _, p), ratio in zip(active, torch.stack(ratios).tolist() if ratios else [], strict=True):
            visible = VISIBLE.get(p.dtype, 0.0)
            if ratio < visible:
                missing = math.ceil(math.log2(2.0 * visible / max(ratio, visible * 2.0**-12)))
                doublings[index] = max(doublings.get(index, 0), missing)
        for index, count in doublings.items():
            self.lr[index] = min(self.lr[index] * 2.0**count, LARGEST_LR)


def decoupled(base: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the weight decay of this group of the base acts on the weights directly rather than through gradients."""
    return isinstance(base, ALWAYS_DECOUPLED) or bool(group.get("decoupled_weight_decay", False))


def announce(base: Optimizer, weight_dependent: bool, weight_decay: float) -> None:
    """Say once what the wrapper takes over from the base: a log line, and warnings where a setting loses its effect."""
    name, groups = type(base).__name__, base.param_groups
    logger.info("ModularOptimizer takes over the learning rate and decoupled weight decay of %s.", name)
    if any("initial_lr" in group for group in groups):
        _warn(f"A learning rate scheduler seems to be attached to {name}; attach it to the ModularOptimizer instead.")
    if len({float(group.get("lr") or 0.0) for group in groups}) > 1:
        _warn(f"The groups of {name} have different learning rates, which are not used: set param_groups[i]['lr'].")
    decays = {float(group.get("weight_decay") or 0.0) for group in groups if decoupled(base, group)}
    if decays - {0.0} and (not weight_decay or len(decays) > 1):
        shown = ", ".join(f"{decay:g}" for decay in sorted(decays))
        _warn(
            f"The weight decay of {name} ({shown}) is not used: pass weight_decay to ModularOptimizer, or set "
            "param_groups[i]['weight_decay']; pass 0 to the base to say that none is meant."
        )
    known = isinstance(base, WEIGHT_INDEPENDENT + ALWAYS_DECOUPLED)
    if not known and any(group.get("weight_decay") for group in groups):
        fate = "stays part of its update and is scaled with it" if weight_dependent else "has no effect"
        _warn(f"The weight decay of {name} {fate}; to decay in the modular norm, set it on ModularOptimizer instead.")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)

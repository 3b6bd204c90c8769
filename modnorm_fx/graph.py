"""The optimizer's whole step as a CUDA graph: base optimizer, normaliser and application in one launch.

A graph repeats the same kernels on the same addresses. So everything that changes from step to step lies in tensors
that the graph reads: gradients (copied to where they were at capture if they have moved), learning rates and weight
decay. Whatever else is changed (betas, parameters, whether there is decay) makes the optimizer capture again. Nothing
in the step waits for the device: an update that is not finite is found there, changes no weight, and is reported after
the replay (which then waits), as it is without a graph. `nonfinite="unchecked"` leaves all that out. A step with Triton
kernels is done once as it is before it is captured, which compiles and loads them. A leaf whose first update that is
not zero comes in a replay takes one step of power iteration like the others, from vectors that have not converged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .base_step import Active
from .errors import OptimizerError
from .normalizer import Normalizer

if TYPE_CHECKING:
    from .optim import ModularOptimizer

__all__ = ["GraphedStep", "check_capturable", "step_key"]


def check_capturable(base: Optimizer, weight_dependent: bool) -> None:
    """Raises OptimizerError, saying what to do, where a step of this base cannot be captured."""
    name = type(base).__name__
    if weight_dependent:
        raise OptimizerError(
            f"A CUDA graph cannot hold a step of {name}.",
            why="its update depends on the weights, and is read off a copy of them with the help of the host",
            do="use another base, or backend='eager' or 'compile'",
        )
    params = [p for group in base.param_groups for p in group["params"]]
    elsewhere = [p for p in params if p.device.type != "cuda"]
    if elsewhere:
        raise OptimizerError(
            f"backend='cudagraph' needs all parameters on a GPU; {len(elsewhere)} are on {elsewhere[0].device}.",
            do="move the model first, or use backend='eager' or 'compile'",
        )
    if any("capturable" in group and not group["capturable"] for group in base.param_groups):
        raise OptimizerError(
            f"backend='cudagraph' needs {name} to keep its step counts on the GPU.",
            do=f"build it with {name}(..., capturable=True)",
        )


def record(run: Callable[[], None]) -> Callable[[], None]:
    """Captures what `run` does on the GPU, without doing it; returns what does it."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class GraphedStep:
    """A captured step of one optimizer.

    Raises:
        OptimizerError: at capture, when a parameter that could train has no gradient.
    """

    def __init__(self, opt: ModularOptimizer, normalizer: Normalizer, active: Active):
        held = {p for _, _, p in active}
        idle = [
            opt._names[p]
            for group in opt.param_groups
            for p in group["params"]
            if p not in held and p.requires_grad and opt._names[p] in opt._used
        ]
        if idle:
            raise OptimizerError(
                f"{idle[0]} has no gradient, so the step cannot be captured"
                + (f" (nor have {len(idle) - 1} other parameters)." if len(idle) > 1 else "."),
                why="a CUDA graph repeats the same work every step, for the same parameters",
                do="freeze it (requires_grad_(False)), or use backend='eager' or 'compile'",
            )
        self._key = step_key(opt, normalizer, active)
        self._gradients: list[Any] = [p.grad for _, _, p in active]
        self._rates = normalizer.rates(opt._settings(active))
        self._bad = torch.zeros((), dtype=torch.bool, device=active[0][2].device)
        self.marks: list[Tensor] = []  # of each bucket, which updates were finite
        self._checks = opt.nonfinite != "unchecked"
        weights = {name: p for _, name, p in active}
        self._normalizer = normalizer
        self._vectors = list(normalizer.vectors)  # which the graph writes to
        fused = opt._triton_step(normalizer, active)
        part = normalizer if fused is None else fused

        def run() -> None:
            for (_, _, p), gradient in zip(active, self._gradients, strict=True):
                p.grad = gradient
            steps, rates = opt._factors(normalizer, active, None, fused, learn=False), self._rates
            if self._checks:
                self.marks = normalizer.marks(steps)
                fine = torch.stack([marks.all() for marks in self.marks]).all()
                self._bad.copy_(~fine)
                steps = part.withhold(steps, fine)
                rates = [None if rate is None else rate.withhold(fine) for rate in rates]
            part.keep(in_place=True)
            part.apply_(steps, weights, rates)

        self._run = record(run)

    def fits(self, opt: ModularOptimizer, normalizer: Normalizer, active: Active) -> bool:
        """Whether a replay would do what a step now should."""
        same = all(held is now for held, now in zip(self._vectors, normalizer.vectors, strict=True))
        return same and self._key == step_key(opt, normalizer, active)

    def replay(self, settings: Mapping[str, tuple[float | Tensor, float]], active: Active) -> bool:
        """Does the step; returns whether it was refused because an update was not finite."""
        moved: list[tuple[Any, Any]] = [
            (there, p.grad) for there, (_, _, p) in zip(self._gradients, active, strict=True) if p.grad is not there
        ]
        if moved:
            torch._foreach_copy_([there for there, _ in moved], [new for _, new in moved])
        for held, now in zip(self._rates, self._normalizer.rates(settings), strict=True):
            if held is not None and now is not None:
                held.lrs.copy_(now.lrs)
                if held.decays is not None and now.decays is not None:
                    held.decays.copy_(now.decays)
        self._run()
        return self._checks and bool(self._bad)


def step_key(opt: ModularOptimizer, normalizer: Normalizer, active: Active) -> tuple[Any, ...]:
    """Everything that a captured step takes for granted."""
    live = ("params", "param_names", "lr", "weight_decay", "initial_lr")
    groups = [repr(sorted((k, v) for k, v in group.items() if k not in live)) for group in opt.param_groups]
    decays = [bool(group["weight_decay"]) for group in opt.param_groups]
    addresses = [(i, name, p.data_ptr()) for i, name, p in active]
    return id(normalizer), tuple(groups), tuple(decays), tuple(addresses)

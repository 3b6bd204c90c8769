"""`ModularOptimizer`: any torch optimizer, with every step measured in the modular norm (paper, section 3).

A step takes the base optimizer's update (see base_step.py), scales every leaf of it to that leaf's target, or replaces
it by its dual, and adds `lr` times the result to the weights. The weights themselves never pass through the base:
whatever it raises, they are as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import fused_adamw, optim_state, step_op
from .base_step import Active, BaseStep, announce, logger
from .buckets import Placement
from .codegen import make
from .errors import FormatError, ModelMismatchError, NonFiniteError, OptimizerError
from .fused_adamw import FusedStep
from .graph import GraphedStep, check_capturable, step_key
from .kernels import cpu
from .normalizer import BACKENDS, Normalizer

if TYPE_CHECKING:
    from .fused_triton import TritonMatrices, TritonStep
    from .norm import ModularNorm

__all__ = ["ModularOptimizer"]

Backend = Literal["auto", "eager", "compile", "triton", "cudagraph", "cudagraph-triton"]


class _Refused(Exception):
    """Carries a NonFiniteError out of a step, through the base's own step if a closure is being evaluated there."""

    def __init__(self, error: NonFiniteError):
        super().__init__(error)
        self.error = error


class ModularOptimizer(Optimizer):
    """A `torch.optim.Optimizer` around another one; `lr` is the modular norm of each step.

    Args:
        base: any torch optimizer, already holding the model's parameters. Step only the wrapper from now on. Its lr is
            not used, nor is decoupled weight decay; its other settings are, and can be changed in `param_groups`.
        norm: what `convert` returned for the same model.
        lr: modular norm of a step; per group in `param_groups[i]["lr"]`, where learning rate schedulers find it.
        weight_decay: decoupled decay in proportion to the targets (the paper's `regularize`): a matrix leaf is
            multiplied by `1 - lr·weight_decay·target/declared`, where `declared` is the norm that `initialize_` gives
            it, mostly 1. So updates that all agree end at `declared / weight_decay`. Vectors (gains, biases) do not
            decay.
        mode: "normalize" scales the base's update (the paper); "dualize" replaces it by its dual, the steepest step.
        backend: of the generated normaliser: "auto", "eager", "compile" or "triton" (see `Normalizer`), or "cudagraph"
            or "cudagraph-triton" (on a GPU, the whole step is captured once its power vectors are warm: see `graph`).
            With a plain Adam or AdamW in float32, "auto" on a CPU and those with Triton on a GPU never store the update
            of matrices once they are warm (see `FusedStep` and `fused_triton`).
        nonfinite: "raise" NonFiniteError when a gradient or update holds NaN or infinity, "skip" that step, or leave it
            "unchecked" (no synchronisation, one reading of the gradients less).
        weight_dependent: whether the base's update depends on the weights; None looks its class up.

    Gradients are checked before the base is stepped, updates afterwards: weights and power vectors never change in a
    refused step, and the base's state does not if a gradient is the cause. Parameters that are frozen or have no
    gradient in a step are left alone, including their decay.

    Raises:
        OptimizerError: the arguments are invalid, the base holds parameters that the norm does not know or that are
            sharded (DTensor), a gradient is sparse, or a parameter that the norm lists as unused has a gradient.
        ModelMismatchError: a parameter has another shape than the norm was inferred for.
        NonFiniteError: see `nonfinite`.
    """

    def __init__(
        self,
        base: Optimizer,
        norm: ModularNorm,
        *,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        mode: Literal["normalize", "dualize"] = "normalize",
        backend: Backend = "auto",
        nonfinite: Literal["raise", "skip", "unchecked"] = "raise",
        weight_dependent: bool | None = None,
    ):
        if not isinstance(base, Optimizer) or isinstance(base, ModularOptimizer):
            raise OptimizerError(
                f"The base of a ModularOptimizer must be another torch.optim.Optimizer, not {type(base).__name__}.",
                do="pass, for example, torch.optim.AdamW(model.parameters())",
            )
        if not callable(getattr(norm, "parameter_name", None)):
            raise OptimizerError(
                f"The norm of a ModularOptimizer must be a ModularNorm, not {type(norm).__name__}.",
                do="pass what modnorm_fx.convert(model) returned, for the model whose parameters the base holds",
            )
        _check_choice("mode", mode, ("normalize", "dualize"))
        _check_choice("backend", backend, BACKENDS)
        _check_choice("nonfinite", nonfinite, ("raise", "skip", "unchecked"))
        if base.defaults.get("differentiable"):
            raise OptimizerError("The base was built with differentiable=True, which a ModularOptimizer cannot keep.")
        _check_number("lr", lr)
        _check_number("weight_decay", weight_decay)

        self.base, self.norm, self.mode, self.backend, self.nonfinite = base, norm, mode, backend, nonfinite
        self._base_step = BaseStep(base, weight_dependent)
        self._used = {leaf.weight for leaf in norm.leaves}
        self._names: dict[Tensor, str] = {}
        self._listed: Active = []
        self._seen: Any = None  # what `_listed` was made from
        self._normalizer: Normalizer | None = None
        self._saved: dict[str, Any] = {}  # state of leaves that it does not hold
        self._placements: dict[str, Placement] = {}
        self._graph: GraphedStep | None = None
        self._fused: FusedStep | TritonMatrices | None = None
        self._largest = math.inf  # gradient of this step, where it is known
        self._number = step_op.enlist(self)
        self._check_known([(i, p) for i, group in enumerate(base.param_groups) for p in group["params"]])

        if backend.startswith("cudagraph"):
            check_capturable(base, self._base_step.weight_dependent)

        own = {"lr": lr, "weight_decay": weight_decay}
        groups = [_without_names(group) | own for group in base.param_groups]
        super().__init__(groups, base.defaults | own)
        announce(base, self._base_step.weight_dependent, weight_decay)

    # Groups and state ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """The base optimizer's state, shared."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        pass  # torch's constructor sets an empty one

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base and to the wrapper; `lr` and `weight_decay` in it are the wrapper's.

        Raises:
            OptimizerError: the norm does not know one of the parameters, or `lr` or `weight_decay` is no number.
        """
        index = len(self.param_groups)
        if index == len(self.base.param_groups):
            if not isinstance(param_group, dict) or "params" not in param_group:
                raise OptimizerError("A parameter group is a dict with the entry 'params'.", why=f"got {param_group!r}")
            for name in ("lr", "weight_decay"):
                if name in param_group:
                    _check_number(name, param_group[name])
            params = param_group["params"]
            listed = [params] if isinstance(params, Tensor) else list(params)
            self._check_known([(index, p[1] if isinstance(p, tuple) else p) for p in listed])
            theirs = {key: value for key, value in param_group.items() if key not in ("lr", "weight_decay")}
            self.base.add_param_group(theirs | {"params": listed})
            self._base_step.lr.append(1.0)
            ours = {key: param_group[key] for key in ("lr", "weight_decay") if key in param_group}
            defaults = {key: self.defaults[key] for key in ("lr", "weight_decay")}
            param_group = _without_names(self.base.param_groups[-1]) | defaults | ours
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs; plain data that `torch.load(weights_only=True)` reads.

        `state` and `param_groups` as in every torch optimizer, `base_param_groups`, and `modnorm` with the norm's
        digest and targets, the mode and the power vectors. The groups carry them too, for tools that keep nothing else
        (torch.distributed.checkpoint). As in torch, tensors are not copied.
        """
        return optim_state.pack(
            super().state_dict(),
            self.base.state_dict(),
            self.norm,
            mode=self.mode,
            base=type(self.base).__name__,
            leaves=self._remembered(),
            base_lr=list(self._base_step.lr),
        )

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict()`, bit for bit.

        All is checked before anything is changed. Targets that differ in their last digits are those of one norm.

        Raises:
            FormatError: it is not a checkpoint of a ModularOptimizer, is of another version, or is damaged.
            OptimizerError: it was saved with another norm (also one of other masses or another convention), another
                `mode`, a base of another class or other parameter groups.
        """
        if not isinstance(state_dict, dict):
            raise FormatError(
                f"A {type(state_dict).__name__} is no optimizer state.", do="pass what state_dict() returned"
            )
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        saved = optim_state.unpack(state_dict, self)
        optim_state.load_base(self, saved)
        for group, loaded in zip(self.param_groups, saved.groups, strict=True):
            group.update(loaded)
        self._saved, self._normalizer, self._graph, self._fused = saved.leaves, None, None, None
        self._base_step.lr = saved.base_lr
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        skipped = ("_zero_grad_profile_name", "_warned_capturable_if_run_uncaptured", "step")
        kept = {k: v for k, v in self.__dict__.items() if k not in skipped and not k.startswith("_optimizer_")}
        kept["_seen"] = None
        if self._normalizer is not None:  # generated again by the copy's first step
            kept |= {"_normalizer": None, "_graph": None, "_fused": None, "_saved": self._remembered()}
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = step_op.enlist(self)  # a copy is another optimizer

    # The step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of modular norm `lr`; returns the closure's loss, if there is a closure.

        A closure is passed on to a base that depends on the weights, which may call it several times; otherwise it is
        called once.
        """
        if torch.compiler.is_compiling() and closure is None:
            params = [p for group in self.param_groups for p in group["params"]]
            places = [i for i, p in enumerate(params) if p.requires_grad and p.grad is not None]
            gradients: list[Any] = [params[i].grad for i in places]
            step_op.step([params[i] for i in places], gradients, places, self._number)
            return None
        return self._step(closure)

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        losses = []
        active: Active = []

        def evaluate() -> Any:
            with torch.enable_grad():
                losses.append(closure())  # type: ignore[misc]
            if not active:
                active.extend(self._active())
            return losses[-1]

        try:
            if closure is None:
                active.extend(self._active())
            elif not self._base_step.weight_dependent:
                evaluate()
            passed_on = evaluate if closure is not None and self._base_step.weight_dependent else None
            normalizer = self._ready()
            if self.backend.startswith("cudagraph") and normalizer.is_warm:
                self._replay(normalizer, active)
            else:
                self._run(normalizer, active, passed_on)
        except _Refused as refused:
            if self.nonfinite == "raise":
                raise refused.error from None
            logger.info("step skipped: %s", refused.error.what)
        return losses[0] if losses else None

    def _run(self, normalizer: Normalizer, active: Active, closure: Callable[[], Any] | None) -> None:
        """The step, operation by operation, or that of the matrices in one or two (see FusedStep and TritonStep)."""
        checked = self.nonfinite != "unchecked"
        if closure is None and (whole := self._fused_step(normalizer, active)) is not None:
            self._run_fused(whole, active, checked)
            return
        fused = None if closure is not None else self._triton_step(normalizer, active)
        part = normalizer if fused is None else fused
        factors = self._factors(normalizer, active, closure, fused)
        if checked and (bad := normalizer.refused(factors)):
            self._refuse("update", bad)
        part.keep()
        part.apply_(factors, {name: p for _, name, p in active}, normalizer.rates(self._settings(active)))

    def _run_fused(self, fused: FusedStep, active: Active, checked: bool) -> None:
        others, part = fused.others(active), fused.share()
        factors = self._factors(part, others, None) if others else []
        if checked and (bad := part.refused(factors)):
            self._refuse("update", bad)
        if bad := fused.step(self.param_groups, guarded=checked):
            self._refuse("update", bad)
        if others:
            fused.keep()
            part.apply_(factors, {name: p for _, name, p in others}, part.rates(self._settings(others)))

    def _fused_step(self, normalizer: Normalizer, active: Active) -> FusedStep | None:
        """The C++ kernel of whole steps, if it can do this one."""
        if self.backend != "auto" or not self._can_fuse(normalizer) or not cpu.available():
            return None
        if not isinstance(self._fused, FusedStep) or self._fused.whole is not normalizer:
            self._fused = FusedStep(self.norm, self._placements, normalizer)
        fits = self._fused.ready(self.base, self.param_groups, active, self.nonfinite, self._largest)
        return self._fused if fits else None

    def _triton_step(self, normalizer: Normalizer, active: Active) -> TritonStep | None:
        """The step of matrices by Triton kernels that store no update, if they can do this one."""
        if "triton" not in self.backend or not self._can_fuse(normalizer):
            return None
        from .fused_triton import TritonMatrices  # which imports triton

        if not isinstance(self._fused, TritonMatrices) or self._fused.whole is not normalizer:
            self._fused = TritonMatrices(self.norm, self._placements, normalizer)
        return self._fused.step(self.base, self.param_groups, active)

    def _can_fuse(self, normalizer: Normalizer) -> bool:
        plain = self.mode == "normalize" and type(self.base) in fused_adamw.KNOWN
        return plain and not self._base_step.weight_dependent and all(v is not None for v in normalizer.vectors)

    def _factors(
        self,
        normalizer: Normalizer,
        active: Active,
        closure: Callable[[], Any] | None,
        fused: TritonStep | None = None,
        learn: bool = True,
    ) -> list[Tensor]:
        """Of all buckets, for the updates of the base, which are written to them but for those that `fused` makes."""
        if fused is not None:
            if fused.rest.names:
                with fused.hidden():
                    self._write_updates(fused.rest, fused.others(active), None)
            return fused.factors(learn=learn)
        self._write_updates(normalizer, active, closure)
        return normalizer.factors(learn=learn)

    def _write_updates(self, normalizer: Normalizer, active: Active, closure: Callable[[], Any] | None) -> None:
        self._base_step.write_updates(self.param_groups, active, normalizer.updates, closure)
        moving = {name for _, name, _ in active}
        still = [update for name, update in normalizer.updates.items() if name not in moving]
        if still:
            torch._foreach_zero_(still)

    def _settings(self, active: Active) -> dict[str, tuple[float | Tensor, float]]:
        """Learning rate and weight decay of every parameter that steps."""
        groups = self.param_groups
        return {name: (groups[i]["lr"], groups[i]["weight_decay"]) for i, name, _ in active}

    def _replay(self, normalizer: Normalizer, active: Active) -> None:
        """The step as a CUDA graph, captured when there is none for these parameters and settings."""
        if self._graph is None or not self._graph.fits(self, normalizer, active):
            self._graph = None  # its memory is free before the next one is captured
            if "triton" in self.backend and normalizer.rehearsed != (key := step_key(self, normalizer, active)):
                self._run(normalizer, active, None)  # compiles and loads kernels, which cannot be done in a capture
                normalizer.rehearsed = key
                return
            self._graph = GraphedStep(self, normalizer, active)
        if self._graph.replay(self._settings(active), active):
            self._refuse("update", normalizer.named(self._graph.marks))

    def release(self) -> None:
        """Frees the CUDA graph and the normaliser's buffers; the next step makes them again, with the same state."""
        self._saved = self._remembered()
        self._graph = self._normalizer = self._fused = None

    def _active(self) -> Active:
        """Everything with a gradient, after all checks; nothing is changed."""
        if len(self.base.param_groups) != len(self.param_groups):
            raise OptimizerError(
                f"The base has {len(self.base.param_groups)} parameter groups, the wrapper {len(self.param_groups)}.",
                do="add groups with ModularOptimizer.add_param_group only",
            )
        active, gradients = [], []
        for entry in self._all():
            if entry[2].requires_grad and (gradient := entry[2].grad) is not None:
                active.append(entry)
                gradients.append(gradient)
        for (_, name, _), gradient in zip(active, gradients, strict=True):
            if gradient.layout is not torch.strided:
                raise OptimizerError(
                    f"The gradient of {name} is sparse.",
                    why="the norm of an update is taken over the whole weight",
                    do="build the embedding with sparse=False",
                )
            if name not in self._used:
                raise OptimizerError(
                    f"{name} has a gradient, but the norm lists it as unused.",
                    why="the graph that convert() captured does not use it",
                    do="convert the model with inputs (args, kwargs) that use it, or freeze it",
                )
        if self.nonfinite != "unchecked" and gradients:
            self._refuse_nonfinite(active, gradients)
        return active

    def _all(self) -> Active:
        """Every parameter that the optimizer holds, but for those without entries, after a check that the norm knows it
        with its shape."""
        params = [p for group in self.param_groups for p in group["params"]]
        seen = [len(group["params"]) for group in self.param_groups], [*map(id, params)], [p.shape for p in params]
        if seen != self._seen:  # quick, as every step needs; ids are safe, since `_listed` keeps what they name alive
            places = [(index, p) for index, group in enumerate(self.param_groups) for p in group["params"]]
            self._check_known(places)
            self._listed = [(index, self._names[p], p) for index, p in places if p.numel()]
            self._seen = seen
        return self._listed

    def _check_known(self, params: list[tuple[int, Tensor]]) -> None:
        """The norm knows these (group index, parameter) by name and shape; remembers the names."""
        unknown = []
        for index, p in params:
            if hasattr(p, "to_local"):  # a DTensor
                raise OptimizerError(
                    f"A parameter of shape {list(p.shape)} in group {index} is sharded (it is a {type(p).__name__}).",
                    why="the norm of a shard is not that of the weight, and other processes are not asked for theirs",
                    do="train with DistributedDataParallel, which keeps weights whole, or use the base optimizer alone",
                )
            name = self._names.get(p) or self.norm.parameter_name(p)
            if name is None:
                unknown.append(f"shape {list(p.shape)} in group {index}")
            elif tuple(p.shape) != tuple(self.norm.shapes[name]):
                raise ModelMismatchError(
                    f"{name} has shape {list(p.shape)}; the norm was inferred for {list(self.norm.shapes[name])}.",
                    do="convert the model again after changing it",
                )
            else:
                self._names[p] = name
        if unknown:
            shown = "; ".join(unknown[:5]) + ("; …" if len(unknown) > 5 else "")
            raise OptimizerError(
                f"The norm does not know {len(unknown)} of the optimizer's parameters: {shown}.",
                why="they are not parameters of the model that was converted",
                do="convert the model after the last change to it, and give the optimizer that model's parameters; if "
                "both were copied or loaded, opt.norm = opt.norm.bind(model)",
            )

    def _refuse_nonfinite(self, active: Active, gradients: list[Tensor]) -> None:
        """Raise _Refused, naming the weight, if a gradient holds NaN or infinity. One synchronisation if none does."""
        self._largest = math.inf
        if cpu.takes(*gradients) and all(gradient.is_contiguous() for gradient in gradients):
            self._largest = cpu.largest_entry(gradients[::-1])  # the step starts with what was read last
            if math.isfinite(self._largest):
                return
        elif torch.nn.utils.get_total_norm(gradients).isfinite():
            return  # a sum of squares is the quickest look at all entries; large ones can overflow it
        pairs = zip(active, gradients, strict=True)
        if bad := [name for (_, name, _), gradient in pairs if not gradient.isfinite().all()]:
            self._refuse("gradient", bad)

    def _refuse(self, what: str, bad: list[str]) -> None:
        others = f" (and of {len(bad) - 1} other weights)" if len(bad) > 1 else ""
        untouched = "nothing was" if what == "gradient" else "the weights were not"
        error = NonFiniteError(
            f"The {what} of {bad[0]}{others} holds NaN or infinity; the step was refused and {untouched} changed.",
            do="find where it comes from, or pass nonfinite='skip' to leave such steps out",
        )
        raise _Refused(error)

    def _remembered(self) -> dict[str, Any]:
        """Power vectors and steps of all leaves, also of those that are frozen now."""
        return self._saved | ({} if self._normalizer is None else self._normalizer.state())

    def _ready(self) -> Normalizer:
        """The normaliser for the parameters that train now: made again, with its state, when they have changed."""
        placements = {
            name: (self._base_step.update_type(p), p.device)
            for _, name, p in self._all()
            if p.requires_grad and name in self._used
        }
        if self._normalizer is None or placements != self._placements:
            self._saved = self._remembered()  # also for leaves that rest now, for when they move again
            self._graph = self._fused = None
            self._normalizer = make(self.norm, placements, self.mode, self.backend)
            self._normalizer.load_state(self._saved)
            self._placements = placements
        return self._normalizer


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptimizerError(f"{name}={value!r} is not a choice.", do=f"pass one of {', '.join(map(repr, allowed))}")


def _check_number(name: str, value: Any) -> None:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise OptimizerError(
            f"{name}={value!r} must be a number, finite and not negative.", do=f"pass, for example, {name}=0.1"
        )


def _without_names(group: dict[str, Any]) -> dict[str, Any]:
    """A base's group for the wrapper: parameter names stay with the base."""
    return {key: value for key, value in group.items() if key not in ("param_names", "initial_lr")}

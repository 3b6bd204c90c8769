"""Copies of a model to trace: the user's own model is never run, changed or handed to a tracer.

A *fake* copy has no values: every parameter and buffer is a FakeTensor on the CPU, whatever device the original lives on (plain
`meta` changes some models' branches), so that a 70B model costs a few megabytes. A *real* copy has values, drawn at random where
the original has none. Both keep identities: what is one tensor in the original is one tensor in the copy.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .errors import CaptureError

__all__ = ["MAX_REAL_BYTES", "dry_run", "fake_copy", "fake_inputs", "fake_tensors", "real_bytes", "real_copy", "real_inputs", "undisturbed"]

MAX_REAL_BYTES = 4 << 30
"""Models above this size are not given a real copy: a laptop has about four times as much memory, and others use it too."""

NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException, UnsupportedOperatorException)
"""Errors of fake tensors that say nothing against the model that was run on them."""

WEIGHT_STD = 0.02
"""Standard deviation of made-up weights in a real copy of a model without values (what most model libraries initialise with)."""


def fake_copy(model: nn.Module, *, training: bool = False) -> tuple[nn.Module, FakeTensorMode]:
    """A copy of `model` without values, in the given mode, and the FakeTensorMode that its tensors belong to."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def plain(tensor: Tensor) -> Tensor:
        return _fake(tensor, mode) if _has_no_values(tensor) else tensor.detach().cpu().clone()

    return _copy(model, lambda tensor: _fake(tensor, mode), plain, training), mode


def real_copy(model: nn.Module, *, training: bool = False) -> nn.Module:
    """A copy of `model` on the CPU with its values; those that it has not (meta, fake) are made up."""
    generator = torch.Generator().manual_seed(0)

    def real(tensor: Tensor) -> Tensor:
        return _made_up(tensor, generator) if _has_no_values(tensor) else tensor.detach().cpu().clone()

    return _copy(model, real, real, training)


def real_bytes(model: nn.Module) -> int:
    """Memory that the parameters and buffers of a real copy take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])


def dry_run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, method: str = "__call__") -> Any:
    """Calls a copy of `model`; with values only if the call fails without. Raises what the model raises.

    Returns the outputs; None for a model that cannot be called without values and is too large for a copy with them.
    """
    try:
        copied, mode = fake_copy(model)
        fake_args, fake_kwargs = fake_inputs((args, kwargs), mode)
        with mode:
            return getattr(copied, method)(*fake_args, **fake_kwargs)
    except CaptureError:
        raise
    except Exception as error:
        if real_bytes(model) > MAX_REAL_BYTES:
            if isinstance(error, NEEDS_VALUES):
                return None
            raise
    real_args, real_kwargs = real_inputs((args, kwargs))
    return getattr(real_copy(model), method)(*real_args, **real_kwargs)


def fake_inputs(inputs: Any, mode: FakeTensorMode) -> Any:
    """`inputs` on the CPU; tensors without values become fake ones of `mode`."""
    return pytree.tree_map_only(Tensor, lambda t: _fake(t, mode) if _has_no_values(t) else t.detach().cpu(), inputs)


def real_inputs(inputs: Any) -> Any:
    """`inputs` copied to the CPU; tensors without values become normal noise, zeros (integers) or ones (masks)."""
    generator = torch.Generator().manual_seed(0)

    def real(tensor: Tensor) -> Tensor:
        if not _has_no_values(tensor):
            return tensor.detach().cpu().clone()
        if tensor.is_floating_point() or tensor.is_complex():
            return torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
        return torch.full(tensor.shape, tensor.dtype is torch.bool, dtype=tensor.dtype)

    return pytree.tree_map_only(Tensor, real, inputs)


def fake_tensors(model: nn.Module) -> dict[int, str]:
    """Every fake tensor that hangs on the modules of `model`, by identity, with the attribute that holds it."""
    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, FakeTensor):
                    found[id(leaf)] = f"{path}.{name}" if path else name
    return found


@contextmanager
def undisturbed() -> Iterator[None]:
    """No gradients, no inference mode, tensors on the CPU, silence; every random state is put back at the end."""
    with ExitStack() as stack:
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.callback(random.setstate, random.getstate())
        if (numpy := sys.modules.get("numpy")) is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


class _PlainTensors(TorchFunctionMode):
    """Copies tensors that are neither parameters nor buffers: a cache that carries a gradient would refuse deepcopy."""

    def __init__(self, convert: Callable[[Tensor], Tensor]):
        super().__init__()
        self.convert = convert

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            with torch._C.DisableTorchFunction():
                memo[id(tensor)] = self.convert(tensor)
        return memo[id(tensor)]


def _copy(model: nn.Module, convert: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], training: bool) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if nn.parameter.is_lazy(parameter):
            raise CaptureError(
                "The model has parameters without a shape.",
                why="its lazy modules get their shapes from the first batch that they see",
                do="run one batch through the model, then convert it",
            )
        memo[id(parameter)] = nn.Parameter(convert(parameter), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = convert(buffer)
    with _PlainTensors(plain):
        try:
            result = copy.deepcopy(model, memo)
        except Exception as error:
            raise CaptureError(
                "The model cannot be copied, and only a copy of it may be traced.",
                where=_uncopyable(model, memo),
                why=f"{type(error).__name__}: {error}",
                do="remove that attribute or give its class a __deepcopy__; for a wrapped model (DistributedDataParallel) convert model.module",
            ) from error
    result.train()  # a change of mode is what empties the caches of evaluation that some models keep
    result.train(training)
    for module in result.modules():
        _without_extras(module)
    return result


def _without_extras(module: nn.Module) -> None:
    """Switches off what has no place in the graph: key-value caches, checkpointing, attention kernels without a CPU version."""
    if getattr(module, "gradient_checkpointing", False) is True:
        module.gradient_checkpointing = False
    configs, seen = [getattr(module, "config", None)], set()
    while configs:
        config = configs.pop()
        if config is None or id(config) in seen or not hasattr(config, "to_dict"):
            continue
        seen.add(id(config))
        if getattr(config, "use_cache", False):
            config.use_cache = False
        if str(getattr(config, "_attn_implementation", "")).startswith(("flash", "flex", "paged", "kernels")):
            config._attn_implementation = "sdpa"
        configs.extend(vars(config).values())


def _uncopyable(model: nn.Module, memo: dict[int, Any]) -> str | None:
    """The first attribute of a module that deepcopy refuses."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                return f"{path}.{name}" if path else name
    return None


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        if tensor.layout is not torch.strided:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", layout=tensor.layout)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _made_up(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Values for a tensor without any: noise for weights, ones for buffers of floats (variances), zeros for indices."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        return torch.empty(tensor.shape, dtype=tensor.dtype).normal_(std=WEIGHT_STD, generator=generator)
    return torch.ones(tensor.shape, dtype=tensor.dtype)

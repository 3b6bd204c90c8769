"""Copies of a model to trace: the user's own model is never run, changed or handed to a tracer.

A *fake* copy has no values: every parameter and buffer is a FakeTensor on the CPU, whatever device the original lives
on (plain `meta` changes some models' branches), so that a 70B model costs a few megabytes. A *real* copy has values,
made up where the original has none. Both keep identities: one tensor in the original is one tensor in the copy.
"""

from __future__ import annotations

import copy
import gc
import io
import logging
import random
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.library import CustomOpDef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .errors import CaptureError

__all__ = [
    "MAX_REAL_BYTES",
    "dry_run",
    "fake_copy",
    "fake_inputs",
    "keep_layers",
    "forget_fake_tensors",
    "real_bytes",
    "real_copy",
    "real_inputs",
    "seed",
    "undisturbed",
]

#: models above this size get no real copy: a laptop has about four times as much memory, and not for this alone
MAX_REAL_BYTES = 4 << 30
#: standard deviation of made-up weights; most libraries initialise with it
WEIGHT_STD = 0.02
#: ends of the names of rates at which whole layers are left out
LAYER_DROP = ("layerdrop", "layer_drop")
#: registered operators, which modules may hold as attributes
OPERATORS = (OpOverload, OpOverloadPacket, CustomOpDef)
#: errors of fake tensors that say nothing against the model that was run on them
NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
#: errors about shapes and arguments, which are the same with values
MISFIT = re.compile(
    r"shapes cannot be multiplied|must match the size of tensor|is invalid for input of size|values to unpack|"
    r"input to conv|to have \d+ channels|unexpected keyword argument|missing \d+ required|[Yy]ou have to specify"
)


def fake_copy(model: nn.Module, *, training: bool = False) -> tuple[nn.Module, FakeTensorMode]:
    """A copy of `model` without values, in the given mode, and the FakeTensorMode that its tensors belong to."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return _copy(model, lambda tensor: _fake(tensor, mode), training), mode


def real_copy(model: nn.Module, *, training: bool = False) -> nn.Module:
    """A copy of `model` on the CPU with its values; those that it has not (meta, fake) are made up."""
    generator = torch.Generator().manual_seed(0)
    return _copy(model, lambda tensor: _real(tensor, generator), training)


def real_bytes(model: nn.Module) -> int:
    """Memory that the parameters and buffers of a real copy take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])


def dry_run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    method: str = "__call__",
    training: bool = False,
    touched: set[str] | None = None,
) -> Any:
    """Calls a copy of `model`; with values only if the call fails without. Raises what the model raises.

    Args:
        method: name of a method, or path to that of a part.
        touched: is given the names of the parameters that are read.

    Returns the outputs; None for a model that cannot be called without values and is too large for a copy with them.
    """
    try:
        copied, mode = fake_copy(model, training=training)
        fake_args, fake_kwargs = fake_inputs((args, kwargs), mode)
        with mode:
            return _call(copied, method, fake_args, fake_kwargs, touched)
    except CaptureError:
        raise
    except Exception as error:
        if MISFIT.search(str(error)):
            raise
        if real_bytes(model) > MAX_REAL_BYTES:
            if isinstance(error, NEEDS_VALUES) or "no fake impl" in str(error):
                return None
            raise
    finally:
        forget_fake_tensors()
    real_args, real_kwargs = real_inputs((args, kwargs))
    return _call(real_copy(model, training=training), method, real_args, real_kwargs, touched)


def _call(
    model: nn.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], touched: set[str] | None
) -> Any:
    with _Touched(model, set() if touched is None else touched):
        return attrgetter(method)(model)(*args, **kwargs)


class _Touched(TorchFunctionMode):
    """Notes the names of the parameters that are passed to functions."""

    def __init__(self, model: nn.Module, found: set[str]) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.found = found

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # a look at its shape or dtype
            leaves = pytree.tree_leaves((args, kwargs))
            self.found.update(self.names[id(leaf)] for leaf in leaves if id(leaf) in self.names)
        return func(*args, **(kwargs or {}))


def fake_inputs(inputs: Any, mode: FakeTensorMode) -> Any:
    """`inputs` on the CPU; tensors without values become fake ones of `mode`."""
    return pytree.tree_map_only(Tensor, lambda t: _fake(t, mode) if _has_no_values(t) else t.detach().cpu(), inputs)


def real_inputs(inputs: Any) -> Any:
    """`inputs` copied to the CPU; tensors without values become normal noise, zeros (integers) or ones (masks)."""
    generator = torch.Generator().manual_seed(0)

    def real(tensor: Tensor) -> Tensor:
        if not _has_no_values(tensor):
            return tensor.detach().cpu().clone()
        if tensor.is_floating_point():
            return torch.empty(tensor.shape, dtype=tensor.dtype).normal_(generator=generator)
        return torch.full(tensor.shape, tensor.dtype is torch.bool, dtype=tensor.dtype)

    return pytree.tree_map_only(Tensor, real, inputs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients, no inference mode, tensors on the CPU, silence.

    At the end random states, caches and the attributes of `model` are as before.
    """
    with ExitStack() as stack:
        stack.enter_context(_unchanged(model))
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.callback(random.setstate, random.getstate())
        if (numpy := sys.modules.get("numpy")) is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(redirect_stderr(io.StringIO()))  # export prints the graph of every failed attempt
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.ERROR)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.callback(forget_fake_tensors)
        yield


def seed() -> None:
    """The same random numbers from here on, whoever draws them: layers that are left out, spans that are masked."""
    torch.manual_seed(0)
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Puts the attributes of every module back at the end: a hook of a copy may still refer to the original."""
    places: list[Any] = [vars(module) for module in model.modules()]
    places += [v for place in places for v in place.values() if type(v) in (dict, OrderedDict, list, set)]
    before = [place.copy() for place in places]
    try:
        yield
    finally:
        for place, content in zip(places, before, strict=True):
            place.clear()
            (place.extend if isinstance(place, list) else place.update)(content)


def forget_fake_tensors() -> None:
    """Empties every functools cache that holds a fake tensor: a copy shares caches of functions with the original."""
    for cache in gc.get_referrers(_FunctionCache):
        if isinstance(cache, _FunctionCache) and _holds_fake_tensor(cache):
            cache.cache_clear()


def _holds_fake_tensor(value: Any, depth: int = 4) -> bool:
    """Looks through containers; four levels are those of a tuple of tensors in a cache: cache, dict, link, tuple."""
    if isinstance(value, FakeTensor):
        return True
    inside = isinstance(value, _FunctionCache | dict | list | tuple) or type(value).__name__ == "_lru_list_elem"
    return depth > 0 and inside and any(_holds_fake_tensor(other, depth - 1) for other in gc.get_referents(value))


_FunctionCache = type(lru_cache(lambda: None))


class _PlainTensors(TorchFunctionMode):
    """Copies tensors that are neither parameters nor buffers, with values: tracing makes constants of them.

    Without it a cache that carries a gradient refuses deepcopy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            with torch._C.DisableTorchFunction():
                memo[id(tensor)] = _real(tensor, self.generator)
        return memo[id(tensor)]


def _copy(model: nn.Module, convert: Callable[[Tensor], Tensor], training: bool) -> nn.Module:
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
    for module in model.modules():  # operators are functions: there is nothing in them to copy, and they refuse it
        memo.update({id(value): value for value in vars(module).values() if isinstance(value, OPERATORS)})
    with _PlainTensors():
        try:
            result = copy.deepcopy(model, memo)
        except Exception as error:
            raise CaptureError(
                "The model cannot be copied, and only a copy of it may be traced.",
                where=_uncopyable(model, memo),
                why=f"{type(error).__name__}: {error}",
                do="remove it, or give its class a __deepcopy__; of a model that is wrapped or sharded convert the "
                ".module (DistributedDataParallel), or convert it before (fully_shard)",
            ) from error
    result.train()  # a change of mode is what empties the caches of evaluation that some models keep
    result.train(training)
    for module in result.modules():
        _without_extras(module)
    return result


def _without_extras(module: nn.Module) -> None:
    """Switches off what has no place in a graph: key-value caches, checkpointing, attention kernels that need a GPU,
    layers that training leaves out at random, loops over the experts that the inputs happen to hit (where the model
    has them all in one product, too)."""
    if getattr(module, "gradient_checkpointing", False) is True:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    _keep_layers(vars(module))
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
        if getattr(config, "_experts_implementation", "") == "eager":
            config._experts_implementation = "grouped_mm"
        _keep_layers(vars(config))
        configs.extend(vars(config).values())


def keep_layers(model: nn.Module) -> None:
    """Sets the rates at which training leaves out whole layers to 0."""
    for module in model.modules():
        _keep_layers(vars(module))
        config = getattr(module, "config", None)
        _keep_layers(vars(config) if hasattr(config, "to_dict") else {})


def _keep_layers(attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        if name.endswith(LAYER_DROP) and isinstance(value, float):
            attributes[name] = 0.0


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
    """Whether there are no values here: on meta, fake, or with other processes (a DTensor)."""
    return tensor.is_meta or isinstance(tensor, FakeTensor) or hasattr(tensor, "to_local")


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        if tensor.layout is not torch.strided:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", layout=tensor.layout)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _real(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A copy of a tensor. One without values gets noise (weights), ones (other floats, like variances) or zeros."""
    if not _has_no_values(tensor):
        return tensor.detach().cpu().clone()
    if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
        return torch.empty(tensor.shape, dtype=tensor.dtype).normal_(std=WEIGHT_STD, generator=generator)
    made_up = torch.full(tensor.shape, tensor.is_floating_point(), dtype=tensor.dtype)
    made_up.made_up = True  # type: ignore[attr-defined]
    return made_up

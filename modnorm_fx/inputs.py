"""Example inputs for models whose library says what they eat.

Transformers models say it by `config`, `main_input_name` and the signature of `forward`, timm models by
`pretrained_cfg`. They are recognised by those attributes; neither library is imported. Inputs are small, deterministic
and on the CPU. Of the inputs on which a model runs, those that touch most of its parameters are taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import tee
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from ._copies import dry_run, undisturbed
from ._failures import short
from .errors import CaptureError
from .inputs_hf import additions, candidates
from .inputs_hf_values import BATCH, noise, pair

__all__ = ["example_inputs", "input_names", "without_cache"]

#: failures that an error lists; later candidates fail in the same ways as the first
MOST_REASONS = 8

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def example_inputs(model: nn.Module) -> Inputs:
    """`(args, kwargs)` with which `model(*args, **kwargs)` runs.

    Raises:
        CaptureError: nothing says what the model takes, or it runs on nothing that was made up for it; the text shows
            the line of code that passes inputs.
    """
    if hasattr(getattr(model, "config", None), "to_dict") and hasattr(model, "main_input_name"):
        tried: Iterator[Inputs] = (((), kwargs) for kwargs in candidates(model))
    elif (size := _timm_input_size(model)) is not None:
        tried = _for_timm(model, size)
    else:
        raise CaptureError(
            f"No example inputs are known for {type(model).__name__}.",
            why="it is neither a transformers model (config, main_input_name) nor a timm model (pretrained_cfg)",
            do=_how_to_pass(model),
        )
    with undisturbed(model):
        return _most(model, tried)


def _most(model: nn.Module, tried: Iterator[Inputs]) -> Inputs:
    """The inputs that touch most parameters: of those tried, grown by further arguments."""
    failures: list[str] = []
    every = {name for name, _ in model.named_parameters()}
    tried, again = tee(tried)
    best, reached = _best(model, tried, every, failures)
    if best is None:  # the code of some models, like TVP, takes one example at a time
        best, reached = _best(model, map(_first_example, again), every, [])
    if best is None:
        raise CaptureError(
            f"{type(model).__name__} runs on none of the inputs that were made up for it.",
            why="".join(list(dict.fromkeys(failures))[:MOST_REASONS]) or "it requires arguments that no maker is for",
            do=_how_to_pass(model),
        )
    args, kwargs = best
    for more in additions(model, kwargs) if kwargs and reached != every else ():
        if more.keys() <= kwargs.keys():
            continue
        touched = _touched(model, args, kwargs | more, failures)
        if touched is not None and len(touched) > len(reached):
            kwargs, reached = kwargs | more, touched
    return args, kwargs


def _best(
    model: nn.Module, tried: Iterator[Inputs], every: set[str], failures: list[str]
) -> tuple[Inputs | None, set[str]]:
    """Of the inputs tried those that touch most parameters, and which; None if the model runs on none of them."""
    best: Inputs | None = None
    reached: set[str] = set()
    for args, kwargs in tried:
        if best is not None and set(kwargs) <= set(best[1]):
            continue
        touched = _touched(model, args, kwargs, failures)
        if touched is not None and (best is None or len(touched) > len(reached)):
            best, reached = (args, kwargs), touched
        if reached == every:
            break
    return best, reached


def _first_example(inputs: Inputs) -> Inputs:
    args, kwargs = inputs
    return tuple(value[:1] for value in args), {name: value[:1] for name, value in kwargs.items()}


def _touched(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], failures: list[str]) -> set[str] | None:
    """Names of the parameters that the model reads on these inputs; None, and why, if it does not run."""
    touched: set[str] = set()
    try:
        dry_run(model, args, kwargs, touched=touched)
    except CaptureError:
        raise
    except Exception as error:
        given = ", ".join(kwargs) or f"an image {tuple(args[0].shape)}"
        failures.append(f"\n    {given}: {short(error, 200)}")
        return None
    return touched


def input_names(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """A name for every leaf of `(args, kwargs)`: the argument of `forward`, then the path inside it."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    def name(path: Sequence[Any]) -> str:
        container, argument, *inside = path
        if container.idx == 1:
            base = str(argument.key)
        else:
            base = positional[argument.idx] if argument.idx < len(positional) else f"args[{argument.idx}]"
        return base + pytree.keystr(tuple(inside))

    return [name(path) for path, _ in pytree.tree_flatten_with_path((tuple(args), kwargs))[0]]


def without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` with the key-value cache of a transformers model switched off: it would only add outputs."""
    if (
        hasattr(getattr(model, "config", None), "to_dict")
        and "use_cache" in inspect.signature(model.forward).parameters
    ):
        kwargs["use_cache"] = False
    return kwargs


def _how_to_pass(model: nn.Module) -> str:
    parameters = inspect.signature(model.forward).parameters
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    items = ", ".join(f'"{name}": {name}' for name in required or list(parameters)[:1])
    return f"pass what the model takes: modnorm_fx.convert(model, kwargs={{{items}}})"


# --- timm -------------------------------------------------------------------------------------------------------------


def _timm_input_size(model: nn.Module) -> tuple[int, int, int] | None:
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
        if size is not None:
            channels, height, width = size
            return channels, height, width
    return None


def _for_timm(model: nn.Module, size: tuple[int, int, int]) -> Iterator[Inputs]:
    """An image of the published size, or of the size and channels that the model was built for."""
    channels, height, width = size
    height, width = pair(getattr(getattr(model, "patch_embed", None), "img_size", None) or (height, width))
    stem = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), channels)
    for count in dict.fromkeys([channels, stem]):
        yield (noise(model, BATCH, count, height, width),), {}

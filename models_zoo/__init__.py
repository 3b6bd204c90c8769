"""Models by name and size, always with random weights and never from a network, and small data sets.

`build("hf:gpt2", layers=24)`, `build("timm:resnet18")`, `build("zoo:gpt")`, `build("path/to/file.py:function")`.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modnorm_fx.errors import ModnormError

from . import from_hf, from_timm, paper

__all__ = ["SIZES", "ZOO", "build"]

SIZES = ("layers", "width", "heads", "vocab", "context", "image_size", "channels", "classes")
KINDS = "hf:NAME, timm:NAME, zoo:NAME or path/to/file.py:function"

Builder = Callable[..., nn.Module]


def build(spec: str, *, device: str | torch.device | None = None, **sizes: int | None) -> nn.Module:
    """The model that `spec` names, on `device` (`"meta"`: no memory for weights).

    Args:
        spec: `hf:NAME` (a transformers architecture, as `gpt2`; `gpt2-tiny` for a very small one), `timm:NAME`,
            `zoo:NAME` (the paper's nets: `gpt`, `resmlp`, `rescnn`) or `path/to/file.py:function`.
        device: where the weights live.
        **sizes: any of `SIZES`; None means the default. What depends on a size follows it: heads and hidden layers
            follow the width.
    """
    wanted = {flag: size for flag, size in sizes.items() if size is not None}
    for flag, size in wanted.items():
        if flag not in SIZES:
            matches = difflib.get_close_matches(flag, SIZES, n=1)
            do = f"Did you mean {matches[0]}?" if matches else f"Use {', '.join(SIZES)}."
            raise ModnormError(f"There is no size named {flag!r}.", do=do)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ModnormError(f"The size {flag}={size!r} is not a positive integer.")
    kind, _, name = spec.partition(":")
    if kind == "hf" and name:
        return from_hf.build(name, device, **wanted)
    if kind == "timm" and name:
        return from_timm.build(name, device, **wanted)
    if kind == "zoo" and name:
        return _call(_zoo(name), spec, device, wanted)
    path, _, function = spec.rpartition(":")
    if path.endswith(".py") and function:
        return _call(_from_file(Path(path), function), spec, device, wanted)
    raise ModnormError(f"{spec!r} does not name a model.", do=f"Write {KINDS}.")


def _gpt(
    layers: int = 3, width: int = 128, heads: int | None = None, vocab: int = 256, context: int = 128
) -> paper.GPT:
    heads = heads or next(count for count in range(-(-width // 32), width + 1) if width % count == 0)
    return paper.GPT(vocab=vocab, context=context, heads=heads, width=width, blocks=layers)


def _resmlp(
    layers: int = 3, width: int = 128, image_size: int = 32, channels: int = 3, classes: int = 10
) -> paper.ResMLP:
    return paper.ResMLP(width=width, blocks=layers, inputs=channels * image_size**2, classes=classes)


def _rescnn(
    layers: int = 3, width: int = 64, image_size: int = 32, channels: int = 3, classes: int = 10
) -> paper.ResCNN:
    return paper.ResCNN(width=width, blocks=layers, channels=channels, classes=classes, image_size=image_size)


ZOO: dict[str, Builder] = {"gpt": _gpt, "rescnn": _rescnn, "resmlp": _resmlp}


def _zoo(name: str) -> Builder:
    if name not in ZOO:
        matches = difflib.get_close_matches(name, ZOO, n=2, cutoff=0.4)
        do = (
            f"Did you mean {' or '.join(f'zoo:{match}' for match in matches)}?" if matches else f"Use {', '.join(ZOO)}."
        )
        raise ModnormError(f"The zoo has no model named {name!r}.", do=do)
    return ZOO[name]


def _from_file(path: Path, function: str) -> Builder:
    if not path.is_file():
        raise ModnormError(f"There is no file {path}.", do="Give the path from the current folder, or an absolute one.")
    name = f"modnorm_fx_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    previous = sys.modules.get(name)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name) if previous is None else sys.modules.update({name: previous})
        raise ModnormError(f"{path} cannot be imported.", why=f"{type(error).__name__}: {error}") from error
    builder = getattr(module, function, None)
    if not callable(builder):
        defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        matches = difflib.get_close_matches(function, defined, n=2)
        do = f"Did you mean {' or '.join(matches)}?" if matches else "Name a function that returns an nn.Module."
        raise ModnormError(f"{path} defines no function {function!r}.", do=do)
    return builder


def _call(builder: Builder, spec: str, device: str | torch.device | None, wanted: dict[str, Any]) -> nn.Module:
    """`builder(**wanted)` on `device`, after a look at which sizes it takes."""
    parameters = inspect.signature(builder).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if missing := [flag for flag in wanted if flag not in parameters and not open_ended]:
        raise ModnormError(
            f"{spec} cannot be given {' and '.join(missing)}.",
            why=f"It takes {', '.join(parameters) or 'no sizes'}.",
            do="Leave the flag out.",
        )
    try:
        with torch.device(device or "cpu"):
            model = builder(**wanted)
    except ModnormError:
        raise
    except Exception as error:
        given = ", ".join(f"{flag}={size}" for flag, size in wanted.items()) or "default sizes"
        raise ModnormError(
            f"{spec} could not be built with {given}.", why=f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModnormError(f"{spec} returned a {type(model).__name__}, not an nn.Module.")
    return model

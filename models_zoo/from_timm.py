"""timm models by name and size, with random weights: `pretrained=False` always, and no name that stands for a hub."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
from torch import nn

from modnorm_fx.errors import ModnormError

__all__ = ["build", "names"]

# What the model classes call a size; set only where the default is one number, not one a stage.
ARGUMENTS: dict[str, str] = {
    "layers": "depth",
    "width": "embed_dim",
    "heads": "num_heads",
}


def names() -> tuple[str, ...]:
    return tuple(_timm().list_models())


def build(name: str, device: str | torch.device | None = None, **sizes: int | None) -> nn.Module:
    """The timm model `name` in the given sizes: layers, width, heads where it has one number for them (ViT)."""
    timm = _timm()
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or not timm.is_model(name):
        raise _unknown(name, timm.list_models())
    wanted = {flag: size for flag, size in sizes.items() if size is not None}
    try:
        arguments = _arguments(timm, name, wanted)
        with torch.device(device or "cpu"):
            return timm.create_model(name, pretrained=False, **arguments)
    except ModnormError:
        raise
    except Exception as error:
        if "multiple values for keyword" in str(error):
            fixed = [flag for flag in wanted if ARGUMENTS.get(flag, "?") in str(error)]
            raise _refused(name, fixed or list(wanted), "timm fixes that number for this variant.") from error
        given = ", ".join(f"{flag}={size}" for flag, size in wanted.items()) or "default sizes"
        raise ModnormError(
            f"timm:{name} could not be built with {given}.",
            why=f"{type(error).__name__}: {error}",
            do="Choose sizes that divide evenly: width by heads, image_size by the patch and window sizes.",
        ) from error


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ModnormError(
            "Models named timm:NAME need timm, which is not installed.", do="pip install 'modnorm-fx[timm]'"
        ) from error
    return timm


def _arguments(timm: Any, name: str, wanted: dict[str, int]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if "classes" in wanted:
        arguments["num_classes"] = wanted["classes"]
    if "channels" in wanted:
        arguments["in_chans"] = wanted["channels"]
    if not wanted.keys() - {"classes", "channels"}:
        return arguments
    with torch.device("meta"):
        default = timm.create_model(name, pretrained=False)
    parameters = inspect.signature(type(default)).parameters
    refused = []
    for flag in wanted.keys() - {"classes", "channels", "image_size"}:
        argument = ARGUMENTS.get(flag, "")
        if argument in parameters and type(parameters[argument].default) is int:
            arguments[argument] = wanted[flag]
        else:
            refused.append(flag)
    if refused:
        raise _refused(name, refused, f"{type(default).__name__} has no single number for it.")
    if "embed_dim" in arguments and "num_heads" not in arguments and "num_heads" in parameters:
        arguments |= _heads(default, arguments["embed_dim"])
    if "image_size" in wanted:
        size = wanted["image_size"]
        if "img_size" in parameters:
            arguments["img_size"] = size
        channels = wanted.get("channels", default.default_cfg["input_size"][0])
        # the entry that example inputs are made from
        arguments["pretrained_cfg_overlay"] = {"input_size": (channels, size, size)}
    return arguments


def _heads(default: nn.Module, width: int) -> dict[str, int]:
    """The fewest heads, none larger than by default, that split the width evenly; none for staged models."""
    heads = {count for module in default.modules() if isinstance(count := getattr(module, "num_heads", None), int)}
    default_width = getattr(default, "embed_dim", None)
    if len(heads) != 1 or not isinstance(default_width, int):
        return {}
    size = max(1, default_width // heads.pop())
    return {"num_heads": next(count for count in range(-(-width // size), width + 1) if width % count == 0)}


def _refused(name: str, flags: list[str], why: str) -> ModnormError:
    return ModnormError(
        f"timm:{name} cannot be given {' and '.join(sorted(flags))}.",
        why=why,
        do="Choose another variant of the family, or build the model in a function of your own.",
    )


def _unknown(name: str, known: list[str]) -> ModnormError:
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return ModnormError(
        f"timm has no model named {name!r}.",
        why="After timm: stands one of timm's model names, built with random weights; nothing is fetched from a hub.",
        do=f"Did you mean {' or '.join(f'timm:{match}' for match in matches)}?"
        if matches
        else "See timm.list_models().",
    )

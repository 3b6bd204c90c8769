"""Example inputs for models whose library says what they eat.

Transformers models say it by `config`, `main_input_name` and the signature of `forward`, timm models by `pretrained_cfg`. Both are
recognised by those attributes; neither library is imported. Inputs are small (batch 2, 16 tokens), deterministic and on the CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._copies import dry_run, undisturbed
from .errors import CaptureError

__all__ = ["BATCH", "DECODER_TOKENS", "TOKENS", "example_inputs"]

BATCH = 2
TOKENS = 16
DECODER_TOKENS = 8
"""Differs from `TOKENS`, so that no pass can mistake the axis of one sequence for that of the other."""

SAMPLES = 4000
"""Length of a waveform: a quarter of a second at 16 kHz, more than the receptive field of the usual stems."""

FRAMES = 64
"""Length of a spectrogram, where the model does not fix it."""

MODALITIES = ("input_ids", "pixel_values", "input_features", "input_values")
"""Arguments of `forward` that carry data; a model that takes several gets all of them."""

# Sub-configurations where the numbers of a modality are, by parts of their names.
TEXT = ("text", "language", "llm", "decoder")
VISION = ("vision", "image", "visual", "vq", "backbone", "encoder")
AUDIO = ("audio", "speech", "encoder")


def example_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`(args, kwargs)` with which `model(*args, **kwargs)` runs.

    Raises:
        CaptureError: nothing says what the model takes, or it runs on nothing that was made up for it; the text shows the line of
            code that passes inputs.
    """
    if hasattr(getattr(model, "config", None), "to_dict") and hasattr(model, "main_input_name"):
        candidates: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), kwargs) for kwargs in _for_transformers(model)]
    elif (size := _timm_input_size(model)) is not None:
        candidates = [((image,), {}) for image in _for_timm(model, size)]
    else:
        raise CaptureError(
            f"No example inputs are known for {type(model).__name__}.",
            why="it is neither a transformers model (config, main_input_name) nor a timm model (pretrained_cfg)",
            do=_how_to_pass(model),
        )
    if len(candidates) == 1:
        return candidates[0]  # not tried here: capture is about to
    failures = []
    with undisturbed():
        for args, kwargs in candidates:
            try:
                dry_run(model, args, kwargs)
                return args, kwargs
            except CaptureError:
                raise
            except Exception as error:
                given = ", ".join(kwargs) or f"an image {tuple(args[0].shape)}"
                failures.append(f"\n    {given}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    raise CaptureError(
        f"{type(model).__name__} runs on none of the inputs that were made up for it.",
        why="".join(failures) or "it requires arguments that are not known here",
        do=_how_to_pass(model),
    )


def _how_to_pass(model: nn.Module) -> str:
    required = [name for name, p in inspect.signature(model.forward).parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    line = ", ".join(f'"{name}": {name}' for name in required) or '"x": x'
    return f"pass inputs that the model runs on: modnorm_fx.convert(model, kwargs={{{line}}})"


# --- timm -------------------------------------------------------------------------------------------------------------


def _timm_input_size(model: nn.Module) -> tuple[int, int, int] | None:
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
        if size is not None:
            channels, height, width = size
            return channels, height, width
    return None


def _for_timm(model: nn.Module, size: tuple[int, int, int]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Images of the published size, or of the size and channels that the model was built for."""
    channels, height, width = size
    height, width = _pair(getattr(getattr(model, "patch_embed", None), "img_size", None) or (height, width))
    stem = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), channels)
    for count in dict.fromkeys([channels, stem]):
        yield (_noise(model, BATCH, count, height, width),), {}


# --- transformers -----------------------------------------------------------------------------------------------------


def _for_transformers(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Keyword arguments to try, those that reach most of the model first."""
    parameters = inspect.signature(model.forward).parameters
    known = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    core = [name for name in known if parameters[name].default is inspect.Parameter.empty]
    core = list(dict.fromkeys([*core, str(model.main_input_name)]))
    if _find(model.config, ["is_encoder_decoder"]):
        core = list(dict.fromkeys([*core, "attention_mask", "decoder_input_ids"]))
    everything = list(dict.fromkeys([*core, *MODALITIES]))
    if {"input_ids", "pixel_values"} <= known:
        yield from _with_image_tokens(model, known)
    seen: set[frozenset[str]] = set()
    for names in (
        [*everything, "bbox", "attention_mask"],
        [*everything, "bbox"],
        core,
        [*core, "attention_mask"],
        [*core, "pixel_mask"],
        [*core, "decoder_input_ids"],
    ):
        wanted = [name for name in dict.fromkeys(names) if name in known]
        if frozenset(wanted) not in seen and wanted and all(name in MAKERS for name in wanted):
            seen.add(frozenset(wanted))
            yield (), {name: MAKERS[name](model) for name in wanted}


def _with_image_tokens(model: nn.Module, known: set[str]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Text with as many placeholder tokens as the model makes features of an image, and that image."""
    token = _find(model.config, ["image_token_id", "image_token_index"], TEXT)
    if token is None or not hasattr(model, "get_image_features"):
        return
    accepted = inspect.signature(model.get_image_features).parameters
    for image in _images(model, known):
        try:
            features = dry_run(model, (), {name: value for name, value in image.items() if name in accepted}, method="get_image_features")
        except CaptureError:
            raise
        except Exception:
            continue
        count = _count_features(features, _find(model.config, ["hidden_size", "n_embd", "d_model"], TEXT))
        if count == 0:
            continue
        text = _ids(model, 1, count + 6)
        text[0, 3 : 3 + count] = int(token)
        inputs = {"input_ids": text, **image}
        if "attention_mask" in known:
            inputs["attention_mask"] = torch.ones_like(text)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in known:
                inputs[name] = (text == int(token)).long()
                break
        yield (), inputs


def _images(model: nn.Module, known: set[str]) -> Iterator[dict[str, Tensor]]:
    """One image in the forms that vision-language models take."""
    config = model.config
    if "image_grid_thw" in known:  # patches in rows, with their grid
        patch, merge = (int(_pair(_find(config, names, VISION) or 2)[0]) for names in (["patch_size"], ["spatial_merge_size"]))
        times = int(_find(config, ["temporal_patch_size"], VISION) or 1)
        side = 2 * merge
        pixels = _noise(model, side * side, _channels(model) * times * patch * patch)
        yield {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]])}
        return
    height, width = _image_size(model)
    sizes = {"image_sizes": torch.tensor([[height, width]])} if "image_sizes" in known else {}
    yield {"pixel_values": _noise(model, 1, _channels(model), height, width), **sizes}
    for tiles in (1, 2, 3):
        yield {"pixel_values": _noise(model, 1, tiles, _channels(model), height, width), **sizes}


def _count_features(features: Any, width: int | None) -> int:
    pooled = getattr(features, "pooler_output", None)
    leaves = [leaf for leaf in pytree.tree_leaves(features if pooled is None else pooled) if isinstance(leaf, Tensor)]
    if pooled is None:
        leaves = leaves[:1]
    return sum(leaf.numel() for leaf in leaves if leaf.shape[-1] == width) // width if width else 0


# --- one argument each ------------------------------------------------------------------------------------------------


def _find(config: Any, names: Sequence[str], sections: Sequence[str] = ()) -> Any:
    """The first of `names` that is set, in the sub-configurations of `sections`, then in `config`, then in the others."""
    if config is None:
        return None
    parts = {key: value for key, value in vars(config).items() if hasattr(value, "to_dict") and hasattr(value, "model_type")}
    preferred = [value for section in sections for key, value in parts.items() if section in key]
    others = [value for value in parts.values() if all(value is not other for other in preferred)]
    for place in [*(partial(_find, part, names, sections) for part in preferred), partial(_own, config, names), *(partial(_find, part, names, sections) for part in others)]:
        if (value := place()) is not None:
            return value
    return None


def _own(config: Any, names: Sequence[str]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        size = (size.get("height") or size.get("longest_edge") or 224, size.get("width") or size.get("longest_edge") or 224)
    return (int(size), int(size)) if isinstance(size, int) else (int(size[-2]), int(size[-1]))


def _noise(model: nn.Module, *shape: int) -> Tensor:
    """Normal noise of the dtype of the model's weights."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype if dtype.itemsize > 1 else torch.float32)


def _ids(model: nn.Module, batch: int, length: int) -> Tensor:
    """Token ids that no configuration calls special."""
    config = model.config
    vocabulary = _find(config, ["vocab_size", "src_vocab_size", "n_vocab", "text_vocab_size"]) or 100
    vocabulary = int(vocabulary[0] if isinstance(vocabulary, list | tuple) else vocabulary)
    longest = _find(config, ["max_position_embeddings", "n_positions", "max_seq_len"])
    special = {value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index")) and isinstance(value, int)}
    usable = [index for index in range(min(vocabulary, 256)) if index not in special] or [0]
    chosen = torch.randint(len(usable), (batch, length), generator=torch.Generator().manual_seed(0))
    return torch.tensor(usable)[chosen]

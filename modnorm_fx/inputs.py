"""Example inputs for models whose library says what they eat.

Transformers models say it by `config`, `main_input_name` and the signature of `forward`, timm models by
`pretrained_cfg`. They are recognised by those attributes; neither library is imported. Inputs are small, deterministic
and on the CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._copies import dry_run, short, undisturbed
from .errors import CaptureError

__all__ = ["BATCH", "DECODER_TOKENS", "TOKENS", "example_inputs", "input_names", "without_cache"]

BATCH = 2
TOKENS = 16
DECODER_TOKENS = 8
"""Differs from `TOKENS`, so that no pass can mistake the axis of one sequence for that of the other."""

SAMPLES = 3840
"""Length of a waveform: about a quarter of a second at 16 kHz, and a multiple of the usual hop lengths."""

FRAMES = 64
"""Length of a spectrogram, where the model does not fix it."""

#: arguments of `forward` that carry data, even if they may be left out: without them a part of a model is not reached
OPTIONAL_DATA = ("input_ids", "pixel_values", "input_features", "input_values", "bbox")

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def example_inputs(model: nn.Module) -> Inputs:
    """`(args, kwargs)` with which `model(*args, **kwargs)` runs.

    Raises:
        CaptureError: nothing says what the model takes, or it runs on nothing that was made up for it; the text shows
            the line of code that passes inputs.
    """
    if hasattr(getattr(model, "config", None), "to_dict") and hasattr(model, "main_input_name"):
        candidates = _for_transformers(model)
    elif (size := _timm_input_size(model)) is not None:
        candidates = _for_timm(model, size)
    else:
        raise CaptureError(
            f"No example inputs are known for {type(model).__name__}.",
            why="it is neither a transformers model (config, main_input_name) nor a timm model (pretrained_cfg)",
            do=_how_to_pass(model),
        )
    failures = []
    with undisturbed(model):
        for args, kwargs in candidates:
            try:
                dry_run(model, args, kwargs)
                return args, kwargs
            except CaptureError:
                raise
            except Exception as error:
                given = ", ".join(kwargs) or f"an image {tuple(args[0].shape)}"
                failures.append(f"\n    {given}: {short(error, 200)}")
    raise CaptureError(
        f"{type(model).__name__} runs on none of the inputs that were made up for it.",
        why="".join(failures) or "it requires arguments that are not known here",
        do=_how_to_pass(model),
    )


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
    height, width = _pair(getattr(getattr(model, "patch_embed", None), "img_size", None) or (height, width))
    stem = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), channels)
    for count in dict.fromkeys([channels, stem]):
        yield (_noise(model, BATCH, count, height, width),), {}


# --- transformers -----------------------------------------------------------------------------------------------------


def _for_transformers(model: nn.Module) -> Iterator[Inputs]:
    """Keyword arguments to try, those that reach most of the model first."""
    parameters = inspect.signature(model.forward).parameters
    known = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    core = [name for name in known if parameters[name].default is inspect.Parameter.empty]
    core += [str(model.main_input_name)]
    if _find(model.config, "is_encoder_decoder"):
        core += ["decoder_input_ids", *(["attention_mask"] if model.main_input_name == "input_ids" else [])]
    if "input_ids" in known and "pixel_values" in known:
        yield from _with_image_tokens(model, known)
    more = [name for name in OPTIONAL_DATA if name in known and name not in core]
    seen = set()
    for names in (
        [*core, *more, "attention_mask"] if more else core,
        [*core, *more],
        core,
        [*core, "attention_mask"],
        [*core, "pixel_mask"],
        [*core, "decoder_input_ids"],
    ):
        wanted = tuple(name for name in known if name in names)
        if wanted and wanted not in seen and all(name in MAKERS for name in wanted):
            seen.add(wanted)
            inputs = {name: MAKERS[name](model) for name in wanted}
            yield (), inputs
            for name in ("input_values", "input_features"):  # some models of sound want an axis of channels
                if name in inputs:
                    yield (), {**inputs, name: inputs[name].unsqueeze(1)}


def _with_image_tokens(model: nn.Module, known: list[str]) -> Iterator[Inputs]:
    """An image, and text with as many placeholder tokens as the model makes features of it."""
    token = _find(model.config, "image_token_id", "image_token_index")
    if token is None or not hasattr(model, "get_image_features"):
        return
    method: Any = model.get_image_features
    accepted = inspect.signature(method).parameters
    for image in _images(model, known):
        try:
            features = dry_run(
                model, (), {k: v for k, v in image.items() if k in accepted}, method="get_image_features"
            )
        except CaptureError:
            raise
        except Exception:
            continue
        count = _count(features, _find(model.config, "hidden_size", "n_embd", "d_model", sections=TEXT))
        text = _ids(model, 1, count + 6)
        text[0, 3 : 3 + count] = int(token)
        inputs = {"input_ids": text, **image}
        if "attention_mask" in known:
            inputs["attention_mask"] = torch.ones_like(text)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in known:
                inputs[name] = (text == int(token)).long()
        if count:
            yield (), inputs


def _images(model: nn.Module, known: list[str]) -> Iterator[dict[str, Tensor]]:
    """One image, in the forms that vision-language models take."""
    channels = _channels(model)
    if "image_grid_thw" in known:  # rows of flattened patches, and their grid
        side = 2 * int(_find(model.config, "spatial_merge_size", "merge_size", sections=VISION) or 2)
        patch = _pair(_find(model.config, "patch_size", sections=VISION) or 14)[0]
        frames = int(_find(model.config, "temporal_patch_size", sections=VISION) or 1)
        yield {
            "pixel_values": _noise(model, side * side, channels * frames * patch * patch),
            "image_grid_thw": torch.tensor([[1, side, side]]),
        }
        return
    height, width = _image_size(model)
    for tiles in ((), (1,), (2,), (3,)):
        image = {"pixel_values": _noise(model, 1, *tiles, channels, height, width)}
        yield image
        if "image_sizes" in known:
            yield {**image, "image_sizes": torch.tensor([[height, width]])}


def _count(features: Any, width: int | None) -> int:
    """How many feature vectors of the given width there are."""
    pooled = getattr(features, "pooler_output", None)
    leaves = [leaf for leaf in pytree.tree_leaves(features if pooled is None else pooled) if isinstance(leaf, Tensor)]
    leaves = [leaf for leaf in leaves if leaf.shape[-1] == width]
    return sum(leaf.numel() // leaf.shape[-1] for leaf in (leaves[:1] if pooled is None else leaves))


# --- one argument each ------------------------------------------------------------------------------------------------

#: sub-configurations that hold the numbers of a modality, by parts of their names
TEXT = ("text", "language", "llm", "decoder")
VISION = ("vision", "image", "visual", "vq", "backbone", "encoder")
AUDIO = ("audio", "speech", "encoder")


def _find(config: Any, *names: str, sections: tuple[str, ...] = ()) -> Any:
    """The first of `names` that is set: in sub-configurations of `sections`, then in `config`, then in the others."""
    parts = {
        key: part for key, part in vars(config).items() if hasattr(part, "to_dict") and hasattr(part, "model_type")
    }
    preferred = [key for section in sections for key in parts if section in key]
    places = [*(parts[key] for key in preferred), None, *(part for key, part in parts.items() if key not in preferred)]
    for part in places:
        if part is not None:
            found = _find(part, *names, sections=sections)
        else:
            found = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
        if found is not None:
            return found
    return None


def _pair(size: Any) -> tuple[int, int]:
    """(height, width) of what configurations write for a size."""
    if isinstance(size, Mapping):
        size = (size.get("height") or 224, size.get("width") or 224)
    return (size, size) if isinstance(size, int) else (int(size[-2]), int(size[-1]))


def _noise(model: nn.Module, *shape: int) -> Tensor:
    """Normal noise in the precision of the model's weights."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(next(dtypes, torch.float32))


def _ids(model: nn.Module, batch: int, length: int) -> Tensor:
    """Token ids that the configuration does not call special."""
    config: Any = model.config
    vocabulary = _find(config, "vocab_size", "src_vocab_size", "n_vocab", "text_vocab_size") or 100
    vocabulary = vocabulary[0] if isinstance(vocabulary, list | tuple) else vocabulary
    special = {
        leaf for path, leaf in pytree.tree_leaves_with_path(config.to_dict()) if "_token_i" in pytree.keystr(path)
    }
    usable = [index for index in range(min(int(vocabulary), 256)) if index not in special] or [0]
    return torch.tensor(usable)[torch.randint(len(usable), (batch, length), generator=torch.Generator().manual_seed(0))]


def _tokens(model: nn.Module) -> int:
    longest = _find(model.config, "max_position_embeddings", "n_positions")
    return min(TOKENS, longest) if isinstance(longest, int) and longest > 0 else TOKENS


def _image_size(model: nn.Module) -> tuple[int, int]:
    return _pair(_find(model.config, "image_size", "img_size", "input_size", sections=VISION) or 224)


def _channels(model: nn.Module) -> int:
    return int(_find(model.config, "num_channels", "in_channels", "in_chans", sections=VISION) or 3)


def _pixel_values(model: nn.Module) -> Tensor:
    frames = _find(model.config, "num_frames", "frames_per_clip", sections=VISION)
    return _noise(model, BATCH, *([int(frames)] if frames else []), _channels(model), *_image_size(model))


def _input_values(model: nn.Module) -> Tensor:
    """A waveform, or a spectrogram for models that say how many mel bins they take."""
    config = model.config
    if (bins := _find(config, "num_mel_bins")) and (length := _find(config, "max_length")):
        return _noise(model, BATCH, length, bins)
    return _noise(model, BATCH, SAMPLES)


def _input_features(model: nn.Module) -> Tensor:
    """A spectrogram: (mel bins, fixed length) for models that say both, else (length, features)."""
    config = model.config
    bins = _find(config, "num_mel_bins", sections=AUDIO)
    longest = _find(config, "max_source_positions", sections=AUDIO)
    if bins and longest and not _find(config, "input_feat_per_channel"):
        return _noise(model, BATCH, int(bins), 2 * int(longest))
    names = ("input_feat_per_channel", "feature_projection_input_dim", "input_dim", "n_mels", "feature_size")
    return _noise(model, BATCH, FRAMES, int(bins or _find(config, *names, sections=AUDIO) or 80))


def _boxes(model: nn.Module) -> Tensor:
    """Corners of the box of every token: left, top, right, bottom, within the model's page."""
    corners = torch.randint(1, 40, (BATCH, _tokens(model), 4), generator=torch.Generator().manual_seed(0))
    return torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:]], dim=-1)


def _past_values(model: nn.Module) -> Tensor:
    length = int(_find(model.config, "context_length") or 32)
    return _noise(model, BATCH, length, int(_find(model.config, "num_input_channels", "input_size") or 1))


MAKERS: dict[str, Callable[[nn.Module], Tensor]] = {
    "input_ids": lambda model: _ids(model, BATCH, _tokens(model)),
    "decoder_input_ids": lambda model: _ids(model, BATCH, min(DECODER_TOKENS, _tokens(model))),
    "attention_mask": lambda model: torch.ones(BATCH, _tokens(model), dtype=torch.long),
    "token_type_ids": lambda model: torch.zeros(BATCH, _tokens(model), dtype=torch.long),
    "pixel_values": _pixel_values,
    "pixel_values_videos": _pixel_values,
    "pixel_mask": lambda model: torch.ones(BATCH, *_image_size(model), dtype=torch.long),
    "input_values": _input_values,
    "input_features": _input_features,
    "bbox": _boxes,
    "past_values": _past_values,
    "inputs": lambda model: _ids(model, BATCH, _tokens(model)),
}
"""Arguments of `forward` that can be made up."""

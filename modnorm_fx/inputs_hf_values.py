"""Values for the arguments of transformers models: one maker each, from the numbers of the configuration.

All of them are small, deterministic and on the CPU. A maker may offer several forms, the likeliest first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = [
    "BATCH",
    "DECODER_TOKENS",
    "MAKERS",
    "TEXT",
    "TOKENS",
    "VISION",
    "find",
    "forms",
    "image_channels",
    "image_size",
    "noise",
    "pair",
    "token_ids",
]

BATCH = 2
TOKENS = 16
DECODER_TOKENS = 8
"""Differs from `TOKENS`, so that no pass can mistake the axis of one sequence for that of the other."""

SAMPLES = 3840
"""Length of a waveform: about a quarter of a second at 16 kHz, and a multiple of the usual hop lengths."""

FRAMES = 64
"""Length of a spectrogram, where the model does not fix it."""

PLACES = 6
"""Number of regions, entities, or other items beside a text."""

# --- numbers of a configuration ---------------------------------------------------------------------------------------

#: sub-configurations that hold the numbers of a modality, by parts of their names
TEXT = ("text", "language", "llm", "decoder")
VISION = ("vision", "image", "visual", "vq", "backbone", "encoder")
AUDIO = ("audio", "speech", "encoder")


def find(config: Any, *names: str, sections: tuple[str, ...] = ()) -> Any:
    """The first of `names` that is set: in sub-configurations of `sections`, then in `config`, then in the others."""
    parts = {
        key: part for key, part in vars(config).items() if hasattr(part, "to_dict") and hasattr(part, "model_type")
    }
    preferred = [key for section in sections for key in parts if section in key]
    places = [*(parts[key] for key in preferred), None, *(part for key, part in parts.items() if key not in preferred)]
    for part in places:
        if part is not None:
            found = find(part, *names, sections=sections)
        else:
            found = next((value for name in names if (value := _number(config, name)) is not None), None)
        if found is not None:
            return found
    return None


def _number(config: Any, name: str) -> Any:
    """An entry of a configuration; where it differs between layers that of the first."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        return getattr(config.per_layer_config[0], name, None)


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of what configurations write for a size."""
    if isinstance(size, Mapping):
        size = (size.get("height") or 224, size.get("width") or 224)
    return (size, size) if isinstance(size, int) else (int(size[-2]), int(size[-1]))


def noise(model: nn.Module, *shape: int) -> Tensor:
    """Normal noise in the precision of the model's weights."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(next(dtypes, torch.float32))


def token_ids(model: nn.Module, batch: int, *length: int) -> Tensor:
    """Token ids that the configuration does not call special."""
    config: Any = model.config
    vocabulary = find(config, "vocab_size", "src_vocab_size", "n_vocab", "text_vocab_size") or 100
    vocabulary = vocabulary[0] if isinstance(vocabulary, list | tuple) else vocabulary
    special = {
        leaf for path, leaf in pytree.tree_leaves_with_path(config.to_dict()) if "_token_i" in pytree.keystr(path)
    }
    usable = [index for index in range(min(int(vocabulary), 256)) if index not in special] or [0]
    draws = torch.randint(len(usable), (batch, *length), generator=torch.Generator().manual_seed(0))
    return torch.tensor(usable)[draws]


def _tokens(model: nn.Module) -> int:
    """Length of a text: `TOKENS`, unless the model takes fewer or an image stands in for more of them."""
    longest = find(model.config, "max_position_embeddings", "n_positions")
    wanted = max(TOKENS, int(find(model.config, "latent_query_num") or 0) + 4)
    return min(wanted, longest) if isinstance(longest, int) and longest > 0 else wanted


def image_size(model: nn.Module) -> tuple[int, int]:
    names = ("image_size", "img_size", "max_img_size", "input_size")
    height, width = pair(find(model.config, *names, sections=VISION) or 224)
    share = min(find(model.config, "scaled_images_ratios") or [1])  # Depth Pro cuts patches from smaller copies too
    return round(height / share), round(width / share)


def image_channels(model: nn.Module) -> int:
    return int(find(model.config, "num_channels", "in_channels", "in_chans", sections=VISION) or 3)


def _width(model: nn.Module) -> int:
    return int(find(model.config, "hidden_size", "d_model", "n_embd", sections=TEXT) or 64)


# --- one argument each ------------------------------------------------------------------------------------------------


def _pixel_values(model: nn.Module) -> list[Tensor]:
    """Images (first a video or tiles, where the configuration counts them); a pair of images; rows of patches."""
    size, channels = image_size(model), image_channels(model)
    if find(model.config, "merge_index") is not None:  # SegGPT lays the image under its prompt, in one input
        size = (size[0] // 2, size[1])
    frames = find(model.config, "num_frames", "frames_per_clip", sections=VISION)
    shapes: list[tuple[int, ...]] = [(BATCH, int(frames), channels, *size)] if frames else []
    if find(model.config, "max_num_tiles", sections=VISION):
        shapes = [(BATCH, 1, _tiles(model), channels, *size)]
    shapes += [(BATCH, channels, *size), (BATCH, 2, channels, *size)]
    if patch := find(model.config, "patch_size", sections=VISION):
        shapes.append((BATCH, 16, channels * pair(patch)[0] ** 2))
    return [noise(model, *shape) for shape in shapes]


def _input_values(model: nn.Module) -> list[Tensor]:
    """A waveform, without and with an axis of channels; a spectrogram first, where the configuration gives its size."""
    config = model.config
    channels = int(find(config, "audio_channels", sections=AUDIO) or 1)
    shapes: list[tuple[int, ...]] = [(BATCH, SAMPLES), (BATCH, channels, SAMPLES)]
    if (bins := find(config, "num_mel_bins")) and (length := find(config, "max_length")):
        shapes = [(BATCH, length, bins), *shapes]
    return [noise(model, *shape) for shape in shapes]


def _input_features(model: nn.Module) -> list[Tensor]:
    """A spectrogram: (mel bins, fixed length) for models that say both, else (length, features), or four in one."""
    config = model.config
    bins = find(config, "num_mel_bins", sections=AUDIO)
    longest = find(config, "max_source_positions", sections=AUDIO)
    names = (
        "input_feat_size",
        "input_feat_per_channel",
        "feature_projection_input_dim",
        "input_dim",
        "n_mels",
        "feature_size",
    )
    shapes: list[tuple[int, ...]] = []
    if bins and longest and not find(config, "input_feat_per_channel"):
        shapes.append((BATCH, int(bins), 2 * int(longest)))
    stacked = find(config, "num_stacked_frames", sections=AUDIO) or 1
    wide = int(bins or find(config, *names, sections=AUDIO) or 80) * int(stacked)
    length = _frames(model)
    shapes += [(BATCH, length, wide), (BATCH, 1, length, wide), (BATCH, wide, length), (BATCH, length, 4 * wide)]
    if chroma := find(config, "num_chroma"):
        shapes = [(BATCH, FRAMES, int(chroma)), *shapes]
    if side := find(config, "spec_size", sections=AUDIO):  # folded to a square: as long as its bins go into the side
        shapes = [(BATCH, 1, int(side) * int(side) // wide, wide), *shapes]
    return [noise(model, *shape) for shape in shapes]


def _frames(model: nn.Module) -> int:
    """Length of a spectrogram: whole windows, or as long as the text or the waveform beside it."""
    config = model.config
    if each := find(config, "audio_length_per_tok"):
        return int(each) * _tokens(model)
    if window := find(config, "n_window", sections=AUDIO):
        return 2 * int(window)
    if ratios := find(config, "downsampling_ratios"):
        return SAMPLES // math.prod(ratios)
    return FRAMES


def _lengths(model: nn.Module) -> list[Tensor]:
    """A mask for a spectrogram in its first form: along the axis that is not that of the bins, or along the other."""
    shape = forms(model, "input_features")[0].shape
    along = -1 if shape[-2] == find(model.config, "num_mel_bins", sections=AUDIO) else -2
    return [_ones(BATCH, shape[along]), _ones(BATCH, shape[-3 - along])]


def _hidden_states(model: nn.Module) -> list[Tensor]:
    """What a half of a codec takes, (channels, length): latents of the width, or a waveform."""
    latents = noise(model, BATCH, _width(model), FRAMES)
    return [latents, noise(model, BATCH, int(find(model.config, "channels") or 1), SAMPLES)]


def _context(model: nn.Module) -> Tensor:
    """States of several layers of another model, side by side."""
    return noise(model, BATCH, _tokens(model), _width(model) * len(find(model.config, "target_layer_ids") or [0]))


def _block(model: nn.Module) -> int:
    """Length of what is drafted after the states of another model; 0 for models that draft nothing."""
    return int(find(model.config, "block_size") or 1) if find(model.config, "target_layer_ids") else 0


def _boxes(model: nn.Module) -> Tensor:
    """Corners of the box of every token: left, top, right, bottom, within the model's page."""
    corners = torch.randint(1, 40, (BATCH, _tokens(model), 4), generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:]], dim=-1)
    return boxes


def _past(model: nn.Module) -> int:
    """Length of a series before the forecast: the context, and what its lags reach back to."""
    lags = find(model.config, "lags_sequence")
    return int(find(model.config, "context_length") or 32) + max(lags if isinstance(lags, list | tuple) else [0])


def _series(model: nn.Module, length: int) -> list[Tensor]:
    """One series, or several as features."""
    several = int(find(model.config, "num_input_channels", "input_size") or 1)
    flat, wide = noise(model, BATCH, length), noise(model, BATCH, length, several)
    return [wide, flat] if several > 1 or find(model.config, "num_input_channels") else [flat, wide]


def _time_features(model: nn.Module) -> int:

    return int(find(model.config, "num_time_features") or 0)


def _future(model: nn.Module) -> int:
    return int(find(model.config, "prediction_length") or 1)


def _decoder_ids(model: nn.Module) -> list[Tensor]:
    """Ids for the decoder: plain; with an axis of channels; or with the codebooks in the batch."""
    length = min(DECODER_TOKENS, _tokens(model))
    books = find(model.config, "num_codebooks", "num_channels", sections=("decoder",))
    shapes: list[tuple[int, ...]] = [(BATCH, length)]
    if isinstance(books, int) and books > 1:
        shapes += [(BATCH, length, books), (BATCH * books, length)]
    return [token_ids(model, *shape) for shape in shapes]


def _input_ids(model: nn.Module) -> list[Tensor]:
    """Token ids: plain, or with an axis of codebooks, with and without one for the text."""
    length = _tokens(model)
    books = find(model.config, "num_codebooks")
    shapes: list[tuple[int, ...]] = [(BATCH, length)]
    if isinstance(books, int) and books > 1:
        shapes += [(BATCH, length, books + 1), (BATCH, length, books)]
    return [token_ids(model, *shape) for shape in shapes]


def _patches(model: nn.Module) -> Tensor:
    """Flattened patches, headed by their row and column from 1."""
    width = int(find(model.config, "patch_embed_hidden_size", sections=VISION) or 768)
    places = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).expand(BATCH, -1, -1)
    values = noise(model, BATCH, places.shape[1], width)
    return torch.cat([places.to(values.dtype), values], dim=-1)


def _latent_places(model: nn.Module) -> Tensor:
    """Where an image's latent queries stand in the text."""
    queries = int(find(model.config, "latent_query_num") or 1)
    places = torch.zeros(BATCH, _tokens(model), dtype=torch.long)
    places[:, 2 : 2 + queries] = 1
    return places


def _ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.long)


def _tiles(model: nn.Module) -> int:
    return int(find(model.config, "max_num_tiles", sections=VISION) or 1)


def _regions(model: nn.Module, *names: str) -> Tensor:
    return noise(model, BATCH, PLACES, int(find(model.config, *names) or 64))


def _entity_positions(model: nn.Module) -> Tensor:
    """Two tokens for every entity; -1 fills up."""
    longest = int(find(model.config, "max_mention_length") or 30)
    places = torch.full((BATCH, PLACES, longest), -1)
    places[..., :2] = torch.arange(2 * PLACES).view(PLACES, 2) % _tokens(model)
    return places


MAKERS: dict[str, Callable[[nn.Module], Tensor | list[Tensor]]] = {
    "input_ids": _input_ids,
    "decoder_input_ids": _decoder_ids,
    "attention_mask": lambda model: _ones(BATCH, _tokens(model) + _block(model)),
    "token_type_ids": lambda model: torch.zeros(BATCH, _tokens(model), dtype=torch.long),
    "pixel_values": _pixel_values,
    "pixel_values_videos": _pixel_values,
    "prompt_pixel_values": _pixel_values,
    "prompt_masks": _pixel_values,
    "pixel_mask": lambda model: _ones(BATCH, *image_size(model)),
    "input_values": _input_values,
    "input_features": _input_features,
    "input_features_mask": _lengths,
    "bbox": _boxes,
    "inputs": _input_ids,
    "feature_attention_mask": _lengths,
    "image_attention_mask": lambda model: _ones(BATCH, _tokens(model), 2),
    # images in tiles, and rows of patches
    "aspect_ratio_ids": lambda model: _ones(BATCH, 1),
    "aspect_ratio_mask": lambda model: _ones(BATCH, 1, _tiles(model)),
    "cross_attention_mask": lambda model: _ones(BATCH, _tokens(model), 1, _tiles(model)),
    "spatial_shapes": lambda model: torch.tensor([[4, 4]] * BATCH),
    "pixel_attention_mask": lambda model: _ones(BATCH, 16),
    # names of the classes to find, and a question, as texts
    "classes_input_ids": lambda model: token_ids(model, 2 * BATCH, DECODER_TOKENS),
    "classes_attention_mask": lambda model: _ones(2 * BATCH, DECODER_TOKENS),
    "tasks_input_ids": lambda model: token_ids(model, BATCH, DECODER_TOKENS),
    "tasks_attention_mask": lambda model: _ones(BATCH, DECODER_TOKENS),
    "classes_structure": lambda model: torch.full((BATCH,), 2),
    "qformer_input_ids": lambda model: token_ids(model, BATCH, DECODER_TOKENS),
    "flattened_patches": _patches,
    "image_embeds_position_mask": _latent_places,
    "task_inputs": lambda model: token_ids(model, BATCH, int(find(model.config, "task_seq_len") or 77)),
    "encoder_hidden_states": lambda model: noise(
        model,
        BATCH,
        TOKENS,
        int(find(model.config, "cross_attention_hidden_size", "encoder_hidden_size") or _width(model)),
    ),
    # signals inside a model, which its parts take: (length, width), or of codecs (width, length)
    "inputs_embeds": lambda model: noise(model, BATCH, _tokens(model), _width(model)),
    "query_embeds": lambda model: noise(model, BATCH, DECODER_TOKENS, _width(model)),
    "noise_embeds": lambda model: noise(model, BATCH, _block(model), _width(model)),
    "context_hidden_states": _context,
    "latents": lambda model: noise(model, BATCH, _width(model), FRAMES),
    "hidden_states": _hidden_states,
    # time series
    "past_values": lambda model: _series(model, _past(model)),
    "past_observed_mask": lambda model: [torch.ones_like(form) for form in _series(model, _past(model))],
    "past_time_features": lambda model: noise(model, BATCH, _past(model), _time_features(model)),
    "future_values": lambda model: _series(model, _future(model)),
    "future_time_features": lambda model: noise(model, BATCH, _future(model), _time_features(model)),
    "static_categorical_features": lambda model: torch.zeros(
        BATCH, int(find(model.config, "num_static_categorical_features") or 1), dtype=torch.long
    ),
    "static_real_features": lambda model: noise(model, BATCH, int(find(model.config, "num_static_real_features") or 1)),
    # decisions
    "states": lambda model: noise(model, BATCH, TOKENS, int(find(model.config, "state_dim") or 1)),
    "actions": lambda model: noise(model, BATCH, TOKENS, int(find(model.config, "act_dim") or 1)),
    "rewards": lambda model: noise(model, BATCH, TOKENS, 1),
    "returns_to_go": lambda model: noise(model, BATCH, TOKENS, 1),
    "timesteps": lambda model: torch.arange(TOKENS).expand(BATCH, -1).clone(),
    # the state of a robot, and its next moves before they are denoised
    "state": lambda model: noise(model, BATCH, int(find(model.config, "max_state_dim") or 1)),
    "noise": lambda model: noise(
        model, BATCH, int(find(model.config, "chunk_size") or 1), int(find(model.config, "max_action_dim") or 1)
    ),
    "timestep": lambda model: noise(model, BATCH).sigmoid(),
    # beside a text
    "visual_feats": lambda model: _regions(model, "visual_feat_dim"),
    "visual_pos": lambda model: _regions(model, "visual_pos_dim"),
    "visual_embeds": lambda model: _regions(model, "visual_embedding_dim"),
    "visual_attention_mask": lambda model: _ones(BATCH, PLACES),
    "visual_token_type_ids": lambda model: _ones(BATCH, PLACES),
    "entity_ids": lambda model: 1 + torch.arange(PLACES).expand(BATCH, -1).clone() % 4,
    "entity_position_ids": _entity_positions,
    # prompts of segmenters: two points and a box, in pixels
    "input_points": lambda model: torch.tensor([[[[4.0, 5.0], [20.0, 9.0]]]]).expand(BATCH, -1, -1, -1).clone(),
    "input_labels": lambda model: _ones(BATCH, 1, 2),
    "input_boxes": lambda model: torch.tensor([[[3.0, 4.0, 25.0, 28.0]]]).expand(BATCH, -1, -1).clone(),
}
"""Arguments of `forward` that can be made up: a tensor, or several forms of it, the likeliest first."""


def forms(model: nn.Module, name: str) -> list[Tensor]:
    """What may be passed as the argument `name`, the likeliest first."""
    made = MAKERS[name](model)
    return made if isinstance(made, list) else [made]

"""Example inputs for transformers models, made up from `config`, `main_input_name` and the signature of `forward`.

Every argument of `forward` that carries data has a maker, which may offer several forms. For models that put features
of images, videos or sound in place of tokens, the features are counted by the model's own `get_*_features`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._copies import dry_run
from .errors import CaptureError
from .inputs_hf_values import MAKERS, TEXT, VISION, find, forms, image_channels, image_size, noise, pair, token_ids

__all__ = ["additions", "candidates"]

#: arguments of `forward` that carry data, even if they may be left out: without them a part of a model is not reached
OPTIONAL_DATA = ("input_ids", "pixel_values", "input_features", "input_values", "bbox")

#: arguments that come together, and reach parts that nothing else reaches
ADDITIONS: tuple[tuple[str, ...], ...] = (
    ("entity_ids", "entity_position_ids"),
    ("visual_embeds", "visual_token_type_ids", "visual_attention_mask"),
    ("encoder_hidden_states",),
    ("future_values", "future_time_features"),
    ("decoder_input_ids",),
    ("token_type_ids",),
    ("pixel_values",),
    ("input_features",),
    ("input_values",),
    ("input_points", "input_labels", "input_boxes"),
    ("input_points", "input_labels"),
)

#: arguments that describe an image given as rows of patches
OF_PATCHES = ("spatial_shapes", "pixel_attention_mask")

#: arguments without which others mean nothing
TOGETHER: dict[str, tuple[str, ...]] = {
    "pixel_values": ("aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask", "spatial_shapes"),
    "spatial_shapes": ("pixel_attention_mask",),
    "past_time_features": ("future_values", "future_time_features"),  # a decoder's inputs; alone they are labels
    "state": ("noise", "timestep"),
    "states": ("actions", "rewards", "returns_to_go", "timesteps"),
}

#: arguments that a number of the configuration asks for
IF_CONFIGURED = {
    "static_categorical_features": "num_static_categorical_features",
    "static_real_features": "num_static_real_features",
    "visual_feats": "visual_feat_dim",
    "visual_pos": "visual_pos_dim",
    "image_embeds_position_mask": "latent_query_num",
    "task_inputs": "task_seq_len",
}

Arguments = dict[str, Any]


def candidates(model: nn.Module) -> Iterator[Arguments]:
    """Keyword arguments to try, those that reach most of the model first."""
    parameters = inspect.signature(model.forward).parameters
    known = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    main: Any = model.main_input_name
    mains = [main] if isinstance(main, str) else list(main)
    core = [name for name in known if parameters[name].default is inspect.Parameter.empty] + mains
    core += [name for name, needed in IF_CONFIGURED.items() if find(model.config, needed)]
    for first, others in TOGETHER.items():
        core += [name for name in others if first in core and name in known]
    if find(model.config, "is_encoder_decoder"):
        core += ["decoder_input_ids", *(["attention_mask"] if "input_ids" in mains else [])]
    if "input_ids" in known:
        yield from _with_placeholders(model, known, core)
    more = [name for name in OPTIONAL_DATA if name in known and name not in core]
    for first, others in TOGETHER.items():
        more += [name for name in others if first in more and name in known]
    seen = set()
    for names in (
        [*core, *more, "attention_mask"] if more else core,
        [*core, *more],
        core,
        [*core, "attention_mask"],
        [*core, "pixel_mask"],
        [*core, "input_features_mask"],
        [*core, "encoder_hidden_states"],
        [*core, *more, "attention_mask", "image_attention_mask"],
        [*core, "decoder_input_ids"],
        ["input_values", "decoder_input_ids"],
        ["input_features", "decoder_input_ids"],
    ):
        wanted = tuple(name for name in known if name in names)
        if wanted and wanted not in seen and all(name in MAKERS for name in wanted):
            seen.add(wanted)
            yield from _made(model, wanted)


def additions(model: nn.Module, given: Mapping[str, Any]) -> Iterator[Arguments]:
    """Further arguments, beside those given, that `forward` knows."""
    known = inspect.signature(model.forward).parameters
    batch = next(iter(given.values())).shape[0]
    for group in ADDITIONS:
        if all(name in known for name in group) and group[0] not in given:
            for made in _made(model, group):
                yield {name: value[:batch] for name, value in made.items()}


def _made(model: nn.Module, names: Sequence[str]) -> Iterator[Arguments]:
    """The first form of every argument, then the other forms of one of them."""
    every = {name: forms(model, name) for name in names}
    first = {name: made[0] for name, made in every.items()}
    yield first
    for name, made in every.items():
        for other in made[1:]:
            yield {**first, name: other}


# --- text with placeholders -------------------------------------------------------------------------------------------

#: what stands in a text: method that makes its features, names of the id of its token
MODALITIES = (
    ("get_image_features", ("image_token_id", "image_token_index")),
    ("get_video_features", ("video_token_id", "video_token_index")),
    ("get_audio_features", ("audio_token_id", "audio_token_index")),
)
#: where such a method may be: in the model itself, or in a part
OF_CAMERAS = "model.vlm."
OWNERS = ("", "model.", OF_CAMERAS)
#: id of a token, how many of them stand in the text, the arguments that their features are made of
Placed = tuple[int, int, Arguments]


def _with_placeholders(model: nn.Module, known: list[str], core: list[str]) -> Iterator[Arguments]:
    """One image, video or sound in a text; then all of them together; then each of the others alone."""
    found: list[Placed] = []
    for method, tokens in MODALITIES:
        token = find(model.config, *tokens)
        owner = next((owner for owner in OWNERS if _takes(model, owner + method, known)), None)
        if token is None or owner is None:
            continue
        for given in _forms_of(model, owner + method, known):
            if count := _features(model, owner + method, given):
                if owner == OF_CAMERAS:
                    given = _of_one_camera(given)
                found.append((int(token), count, given))
                if len(found) == 1:
                    yield _text_around(model, known, core, found)
                break
    if len(found) > 1:
        for chosen in (found, *([one] for one in found[1:])):
            yield _text_around(model, known, core, chosen)


def _of_one_camera(given: Arguments) -> Arguments:
    """Images for a model that acts (PI0): of several cameras, some of which may be missing."""
    images = {name: image[:, None] for name, image in given.items()}
    return {**images, "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}


def _text_around(model: nn.Module, known: list[str], core: list[str], placed: Sequence[Placed]) -> Arguments:
    """A text with as many placeholder tokens as the model makes features, and what they are made of."""
    parts = [token_ids(model, 1, 3)]
    data: Arguments = {}
    for token, count, given in placed:
        parts += [torch.full((1, count), token), token_ids(model, 1, 3)]
        data |= given
    text = torch.cat(parts, dim=1)
    inputs = {"input_ids": text, **data}
    rest = [name for name in core if name in known and name in MAKERS and name not in inputs]
    inputs |= {name: forms(model, name)[0][:1] for name in rest if name != "attention_mask"}
    if "attention_mask" in known:
        inputs["attention_mask"] = torch.ones_like(text)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in known:
            kinds = [kind * (text == token) for kind, (token, _, _) in enumerate(placed, 1)]
            inputs[name] = torch.stack(kinds).sum(0)
    return {name: inputs[name] for name in known if name in inputs}


def _forms_of(model: nn.Module, method: str, known: list[str]) -> Iterator[Arguments]:
    """One image, video or sound, in the forms that the method may take."""
    accepted = inspect.signature(attrgetter(method)(model)).parameters
    if method.endswith("audio_features"):
        names = [n for n in accepted if n in known and n in MAKERS]
        for made in _made(model, names):
            yield {name: value[:1] for name, value in made.items()}
        return
    data = "pixel_values_videos" if method.endswith("video_features") else "pixel_values"
    if data not in accepted:
        return
    extras = {
        n: forms(model, n)[0][:1] for n in accepted if n in known and n in MAKERS and n not in (data, *OF_PATCHES)
    }
    for image in _pictures(model, data, accepted):
        yield {**extras, **image}


def _pictures(model: nn.Module, data: str, accepted: Mapping[str, Any]) -> Iterator[Arguments]:
    """One image or video, in the forms that vision-language models take."""
    channels = image_channels(model)
    video = data == "pixel_values_videos"
    grid = "video_grid_thw" if video else "image_grid_thw"
    if grid in accepted:  # rows of flattened patches, and their grid
        side = 2 * int(find(model.config, "spatial_merge_size", "merge_size", sections=VISION) or 2)
        patch = pair(find(model.config, "patch_size", sections=VISION) or 14)[0]
        frames = int(find(model.config, "temporal_patch_size", sections=VISION) or 1)
        yield {
            data: noise(model, side * side, channels * frames * patch * patch),
            grid: torch.tensor([[1, side, side]]),
        }
        return
    height, width = image_size(model)
    if video:
        yield {
            data: noise(model, 1, int(find(model.config, "num_frames", sections=VISION) or 8), channels, height, width)
        }
        return
    if pinpoints := find(model.config, "image_grid_pinpoints"):  # a picture in tiles: the smallest grid there is
        sizes = [(h, w) for h, w in pinpoints if h % height == 0 and w % width == 0] or [(height, width)]
        h, w = min(sizes, key=lambda size: size[0] * size[1])
        tiles = 1 + (h // height) * (w // width)
        yield {data: noise(model, 1, tiles, channels, height, width), "image_sizes": torch.tensor([[h, w]])}
    for axis in ((), (1,), (2,), (3,)):  # without and with an axis of tiles
        image = {data: noise(model, 1, *axis, channels, height, width)}
        yield image
        if "image_sizes" in accepted:
            yield {**image, "image_sizes": torch.tensor([[height, width]])}
    if "spatial_shapes" in accepted:
        yield {name: forms(model, name)[-1][:1] for name in (data, *OF_PATCHES) if name in accepted}


def _features(model: nn.Module, method: str, given: Arguments) -> int:
    """How many feature vectors of the text's width the model makes of an image, video or sound."""
    accepted = inspect.signature(attrgetter(method)(model)).parameters
    try:
        features = dry_run(model, (), {k: v for k, v in given.items() if k in accepted}, method=method)
    except CaptureError:
        raise
    except Exception:
        return 0
    width = find(model.config, "hidden_size", "n_embd", "d_model", sections=TEXT)
    pooled = getattr(features, "pooler_output", None)
    leaves = [leaf for leaf in pytree.tree_leaves(features if pooled is None else pooled) if isinstance(leaf, Tensor)]
    leaves = [leaf for leaf in leaves if leaf.shape[-1] == width]
    return sum(leaf.numel() // leaf.shape[-1] for leaf in (leaves[:1] if pooled is None else leaves))


def _takes(model: nn.Module, path: str, known: Sequence[str]) -> bool:
    """Whether there is such a method, and it names what it takes (one that hands on its `kwargs` does not)."""
    try:
        return not inspect.signature(attrgetter(path)(model)).parameters.keys().isdisjoint(known)
    except (AttributeError, TypeError):
        return False

"""transformers models by architecture and size, with random weights: configurations are made here, not downloaded."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from modnorm_fx.errors import ModnormError

from . import tiny

__all__ = ["build", "configuration", "families", "names"]

Fields = dict[str, Any]

# Configuration fields that a size flag sets as they are, over all architectures; width and classes take more (below).
DIRECT: dict[str, frozenset[str]] = {
    "layers": tiny.LAYERS,
    "heads": tiny.HEADS,
    "vocab": tiny.VOCABULARIES,
    "context": frozenset("max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len".split()),
    "image_size": frozenset("image_size img_size".split()),
    "channels": frozenset("num_channels in_channels in_chans".split()),
}
MAIN_WIDTHS = ("hidden_size", "n_embd", "d_model", "embed_dim", "emb_dim", "embedding_dim", "hidden_dim", "dim")
CLASSIFIERS = {"ImageClassification", "VideoClassification", "AudioClassification"}

# The task whose model is built, by what the architecture is: the first that transformers has for it.
ENCODER_DECODER = ("Seq2SeqLM", "SpeechSeq2Seq", "ImageTextToText", "TextToWaveform")
TEXT_AND_VISION = ("ImageTextToText", "")
ANY = (
    *("MaskedLM", "CausalLM", "ImageClassification", "ImageTextToText", "CTC", "SpeechSeq2Seq", "AudioClassification"),
    *("VideoClassification", "ObjectDetection", "UniversalSegmentation", "SemanticSegmentation", "DepthEstimation"),
    *("KeypointDetection", "KeypointMatching", "PoseEstimation", "ImageMatting"),
    *("QuestionAnswering", "TimeSeriesPrediction", "", "PreTraining"),
)
# Architectures whose own class only chains parts, without a forward that could be trained: the part that stands for
# them, by its entry in the configuration and its class. Of Bark the first of three language models, from text to
# semantic tokens (the coarse one has the same code; the fine one is not causal). Of the Omni models the thinker, which
# reads text, images and sound, and writes text, without what turns that to speech. Of SAM 3 for videos the detector,
# without the tracker, which is an architecture of its own.
PARTS = {
    "bark": ("semantic_config", "BarkSemanticModel"),
    "qwen2_5_omni": ("thinker_config", "Qwen2_5OmniThinkerForConditionalGeneration"),
    "qwen3_omni_moe": ("thinker_config", "Qwen3OmniMoeThinkerForConditionalGeneration"),
    "sam3_video": ("detector_config", "Sam3Model"),
}
# Trackers, whose forward goes through a video without gradients, in a session that it changes: their forward of a
# single frame takes its place. Nothing is remembered from frame to frame, so that the weights for this are unused.
TRACKERS = {
    "edgetam_video": "EdgeTamVideoModel",
    "sam2_video": "Sam2VideoModel",
    "sam3_tracker_video": "Sam3TrackerVideoModel",
}


def names() -> tuple[str, ...]:
    return tuple(sorted(_transformers().CONFIG_MAPPING))


def families() -> tuple[str, ...]:
    """The names that have a model, without those that are only a part of another: `clip`, not `clip_vision_model`.

    A part that has a task of its own (the language model `gemma3_text` of `gemma3`) is a family too.
    """
    transformers = _transformers()
    parts = {
        kind
        for name in names()
        for part in (getattr(transformers.CONFIG_MAPPING[name], "sub_configs", None) or {}).values()
        if (kind := getattr(part, "model_type", "")).startswith(f"{name}_")
    }
    autos: dict[str, Any] = {
        task: getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel", None)
        for task in (*ENCODER_DECODER, *ANY)
    }

    def has(name: str, task: str) -> bool:
        return autos[task] is not None and transformers.CONFIG_MAPPING[name] in autos[task]._model_mapping

    return tuple(name for name in names() if any(has(name, task) for task in autos if task or name not in parts))


def build(name: str, device: str | torch.device | None = None, **sizes: int | None) -> nn.Module:
    """The model `name` (`config.model_type`, or that and `-tiny`) with its usual task's head, in the given sizes.

    Of an architecture without a forward that could be trained what stands for it: see `PARTS` and `TRACKERS`.
    """
    transformers = _transformers()
    config, task, kind, make = _class(transformers, configuration(name, **sizes))
    if sizes.get("classes") is not None and task not in CLASSIFIERS:
        raise _refused(f"hf:{name}", ["classes"], f"it is built as {kind.__name__}, which has no classifier")
    try:
        with torch.device(device or "cpu"), _NumbersStay():
            return make(config)
    except Exception as error:
        given = ", ".join(f"{flag}={size}" for flag, size in sizes.items() if size is not None) or "default sizes"
        raise ModnormError(
            f"hf:{name} could not be built with {given}.",
            why=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}",
            do="Try other sizes, or build the model in a function of your own and name it as path/to/file.py:function.",
        ) from error


class _NumbersStay(TorchFunctionMode):
    """A tensor made from one whole number keeps it: some codes pad by buffers, which would have no value on `meta`."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and args and isinstance(args[0], int) and "device" not in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def configuration(name: str, **sizes: int | None) -> Any:
    """The transformers configuration for `name`; what is not given keeps its default, or its ratio to what is."""
    transformers = _transformers()
    known = transformers.CONFIG_MAPPING
    base = name.removesuffix("-tiny") if name not in known else name
    if base not in known:
        raise _unknown(base, known)
    config_class = known[base]
    wanted = {flag: size for flag, size in sizes.items() if size is not None}
    try:
        fields: Fields = {"use_pretrained_backbone": False, **copy.deepcopy(tiny.MISSING.get(base, {}))}
        if base != name:
            fields |= tiny.shrink(config_class(**_accepted(config_class, fields)))
        default = config_class(**_accepted(config_class, fields))
        understood: set[str] = {"classes"}
        changes = _resize(default, wanted, understood, fields if base != name else {})
        if missing := [flag for flag in wanted if flag not in understood]:
            raise _refused(f"hf:{name}", missing, "its configuration has no such number")
        if "vocab" in wanted:
            _merge(changes, _token_ids(default, wanted["vocab"]))
        _merge(fields, changes)
        if "classes" in wanted:
            fields["num_labels"] = wanted["classes"]
        return config_class(**_accepted(config_class, fields))
    except ModnormError:
        raise
    except Exception as error:  # transformers validates with exceptions of many types
        raise ModnormError(
            f"transformers refuses the configuration for hf:{name} with {wanted or 'its default sizes'}.",
            why=f"{type(error).__name__}: {error}",
            do="Choose sizes that divide evenly: width by heads, image_size by the patch size.",
        ) from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModnormError(
            "Models named hf:NAME need transformers, which is not installed.", do="pip install 'modnorm-fx[hf]'"
        ) from error
    return transformers


def _class(transformers: Any, config: Any) -> tuple[Any, str, Any, Callable[[Any], nn.Module]]:
    """What is built: the configuration of it, its task, its class (or that of its task), and what makes it."""
    if part := PARTS.get(config.model_type):
        kind = getattr(transformers, part[1])
        return getattr(config, part[0]), "", kind, kind._from_config
    if tracker := TRACKERS.get(config.model_type):
        whole = getattr(transformers, tracker)
        methods = {"forward": whole._single_frame_forward, "__module__": whole.__module__}
        one_frame: Any = type(tracker, (whole,), methods)
        return config, "", one_frame, one_frame._from_config
    task, auto = _task(transformers, config)
    return config, task, auto, auto.from_config


def _task(transformers: Any, config: Any) -> tuple[str, Any]:
    tasks: tuple[str, ...] = ANY
    if getattr(config, "text_config", None) is not None and getattr(config, "vision_config", None) is not None:
        tasks = TEXT_AND_VISION + ANY
    elif getattr(config, "is_encoder_decoder", False):
        tasks = ENCODER_DECODER + ANY
    elif getattr(config, "is_decoder", False):
        tasks = ("CausalLM", *ANY)
    for task in tasks:
        auto = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel", None)
        if auto is not None and type(config) in auto._model_mapping:
            try:
                classes = auto._model_mapping[type(config)]
            except ValueError as error:  # named in its tables, but not given out
                raise ModnormError(
                    f"transformers has no model class for {config.model_type}, though it names one.",
                    why=str(error).partition(" neither ")[0],
                    do="Build the model in a function of your own and name it as path/to/file.py:function.",
                ) from error
            if isinstance(classes, tuple):  # several for one task (with and without a distillation head): the first
                config.architectures = [classes[0].__name__]
            return task, auto
    raise ModnormError(
        f"transformers has a configuration but no model class for {config.model_type}.",
        do="Build the model in a function of your own and name it as path/to/file.py:function.",
    )


def _resize(config: Any, wanted: dict[str, int], understood: set[str], given: Fields) -> Fields:
    """The fields of `config` (sub-configurations as dicts) that `wanted` changes; notes the flags that found one.

    What was `given` to the configuration is its own, even if its class could have derived it.
    """
    own = {**{name: value for name in given if (value := tiny.read(config, name)) is not None}, **tiny.fields(config)}
    changes: Fields = {}
    for name, value in own.items():
        if hasattr(value, "to_dict"):
            if inner := _resize(value, wanted, understood, given.get(name) or {}):
                changes[name] = {**tiny.as_fields(value), **inner}
            continue
        for flag in wanted.keys() & DIRECT.keys():
            if name in DIRECT[flag] and _settable(value):
                changes[name] = wanted[flag] if isinstance(value, int) else type(value)([wanted[flag]] * 2)
                understood.add(flag)
    old_width = next((own[name] for name in MAIN_WIDTHS if isinstance(own.get(name), int)), None)
    if "width" in wanted and old_width:
        _follow_width(own, changes, old_width, wanted["width"], heads_given="heads" in wanted)
        understood.add("width")
    _follow_heads(own, changes)
    old_layers = getattr(config, "num_hidden_layers", None)
    if "layers" in wanted and isinstance(old_layers, int) and old_layers > 1:
        for name, value in own.items():  # one entry a layer: repeat the pattern, or cut it
            if isinstance(value, (list, tuple)) and len(value) == old_layers and name not in changes:
                changes[name] = type(value)(value[i % old_layers] for i in range(wanted["layers"]))
        if single := given.get("per_layer_config"):
            changes["per_layer_config"] = {i: single[i % old_layers] for i in range(wanted["layers"])}
    return changes


def _settable(value: Any) -> bool:
    """A number, or a pair that stands for height and width; not a switch and not a list with one entry a stage."""
    if isinstance(value, (list, tuple)):
        return len(value) == 2 and all(isinstance(entry, int) for entry in value) and value[0] == value[1]
    return isinstance(value, int) and not isinstance(value, bool)


def _follow_width(own: Fields, changes: Fields, old: int, new: int, heads_given: bool) -> None:
    """What equals the width follows it; hidden layers keep their ratio to it, heads their size if that divides it."""
    own_size = any(isinstance(own.get(name), int) for name in ("head_dim", "d_kv", "kv_channels", "attention_head_dim"))
    for name, value in own.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if name in tiny.WIDTHS and value == old:
            changes[name] = new
        elif name in tiny.INNER and value > 8:
            changes[name] = new * value // old if new * value % old == 0 else max(8, round(new * value / old / 8) * 8)
        elif name in tiny.HEADS and not heads_given:
            changes[name] = max(1, round(value * new / old)) if own_size else _heads(max(1, old // value), new)


def _heads(size: int, width: int) -> int:
    """The fewest heads, none larger than `size`, that split the width evenly."""
    return next(count for count in range(-(-width // size), width + 1) if width % count == 0)


def _follow_heads(own: Fields, changes: Fields) -> None:
    """Key/value heads keep their ratio to the heads, and divide them."""
    heads = next((name for name in own if name in tiny.HEADS and name in changes), None)
    for name, value in own.items():
        if heads and name in tiny.KV_HEADS and _settable(value) and isinstance(value, int):
            most = max(1, round(value * changes[heads] / own[heads]))
            changes[name] = next(count for count in range(most, 0, -1) if changes[heads] % count == 0)


def _token_ids(config: Any, vocab: int, moved: dict[int, int] | None = None) -> Fields:
    """Special tokens beyond the vocabulary move to its end; different ones stay different."""
    moved = {} if moved is None else moved
    changes: Fields = {}
    for name, value in tiny.fields(config).items():
        if hasattr(value, "to_dict"):
            if inner := _token_ids(value, vocab, moved):
                changes[name] = inner
        elif name.endswith("token_id") and isinstance(value, int) and value >= vocab:
            changes[name] = moved.setdefault(value, max(0, vocab - 1 - len(moved)))
    return changes


def _merge(into: Fields, changes: Fields) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _accepted(config_class: type, fields: Fields) -> Fields:
    """Without the names that the class does not know: transformers would store them silently."""
    if dataclasses.is_dataclass(config_class):
        known = {field.name for field in dataclasses.fields(config_class)}
    else:
        known = set(inspect.signature(config_class).parameters)
    known |= {"num_labels", *tiny.MISSING.get(getattr(config_class, "model_type", ""), ())}
    known |= {name for name in ("out_indices", "per_layer_config") if hasattr(config_class, name)}
    return {name: value for name, value in fields.items() if name in known}


def _refused(model: str, flags: list[str], why: str) -> ModnormError:
    return ModnormError(
        f"{model} cannot be given {' and '.join(flags)}.",
        why=f"For {', '.join(flags)}: {why}.",
        do="Leave the flag out, or build the model in a function of your own and name it as path/to/file.py:function.",
    )


def _unknown(name: str, known: Iterable[str]) -> ModnormError:
    known = sorted(known)
    stem = name.split("/")[-1].lower()
    matches = difflib.get_close_matches(stem, known, n=3, cutoff=0.6)
    matches += [other for other in known if stem.startswith((f"{other}-", f"{other}_")) and other not in matches]
    why = "After hf: stands an architecture (config.model_type); weights are random and nothing is fetched from a hub."
    hint = f"Did you mean {' or '.join(f'hf:{match}' for match in matches)}?" if matches else "See CONFIG_MAPPING."
    return ModnormError(f"transformers has no architecture named {name!r}.", why=why, do=hint)

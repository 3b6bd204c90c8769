"""What a model is trained on, found from the model itself: text for language models, images for classifiers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modnorm_fx.errors import ModnormError
from modnorm_fx.inputs import example_inputs

from . import build
from .data import Corpus, Images, digits, text

__all__ = ["Task", "accuracy", "check_trainable", "given_inputs", "logits", "logits_loss", "model_for", "task_for"]

WINDOW = 64  # tokens a training example has, unless the caller says otherwise
EVALUATION_BATCHES = 8  # of text

Sizes = dict[str, int | None]
Given = tuple[tuple[Any, ...] | None, dict[str, Any] | None]


@dataclass(frozen=True)
class Task:
    """What a model is trained on: endless batches (inputs, labels) for a seed, and a validation set of some more."""

    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]]
    validation: Sequence[tuple[Tensor, Tensor]]
    classes: int
    source: str
    is_text: bool


def given_inputs(model: nn.Module) -> Given:
    """(args, kwargs) as the model's own `example_inputs()` gives them; (None, None) for models of a library that
    `convert` knows."""
    make: Any = getattr(model, "example_inputs", None)
    given = make() if callable(make) else None
    return (None, given) if isinstance(given, dict) else (given, None)


def task_for(
    spec: str, sizes: Sizes, *, data: str | Path | None = None, batch: int = 16, context: int | None = None
) -> Task:
    """Text or images, by what the model takes.

    Raises ModnormError for a model that takes neither, or if `data` (a text) is given for one that takes images.
    """
    model = build(spec, device="meta", **sizes)
    given, named = given_inputs(model)
    if given is None and named is None:
        given, named = example_inputs(model)
    floating = [x for x in (*(given or ()), *(named or {}).values()) if isinstance(x, Tensor) and x.is_floating_point()]
    if not floating:
        return _text_task(text(data), batch, context or WINDOW)
    shape = tuple(floating[0].shape[1:])
    if len(shape) == 1:  # flattened images
        squares = ((c, size, size) for c in (1, 3) for size in [math.isqrt(shape[0] // c)])
        shape = next((square for square in squares if math.prod(square) == shape[0]), shape)
    if len(shape) != 3:
        raise _untrainable(spec, f"it takes a tensor of shape {list(floating[0].shape)}")
    if data is not None:
        raise ModnormError("--data is a text, and this model takes images.", do="Leave it out: digits are built in.")
    return _image_task(digits(), batch, shape, flat=floating[0].dim() == 2)


def _text_task(corpus: Corpus, batch: int, window: int) -> Task:
    held_out = corpus.batches("val", batch, window, seed=1)
    validation = [next(held_out) for _ in range(EVALUATION_BATCHES)]

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return corpus.batches("train", batch, window, seed)

    return Task(batches, validation, corpus.vocab, corpus.source, is_text=True)


def _image_task(images: Images, batch: int, shape: tuple[int, ...], flat: bool) -> Task:
    channels, *size = shape

    def fit(image: Tensor) -> Tensor:
        image = F.interpolate(image, size=size, mode="bilinear").expand(-1, channels, -1, -1)
        return image.flatten(1) if flat else image

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((fit(image), label) for image, label in images.batches("train", batch, seed))

    parts = zip(*(part.split(batch) for part in images.val), strict=True)
    validation = [(fit(image), label) for image, label in parts]
    return Task(batches, validation, images.classes, "handwritten digits", is_text=False)


def model_for(spec: str, sizes: Sizes, task: Task, device: str = "cpu") -> nn.Module:
    """The model with as many outputs as the data needs, where it can be told; else as it is."""
    flag = "vocab" if task.is_text else "classes"
    given = sizes.get(flag)
    if given is None:
        try:
            return build(spec, device=device, **{**sizes, flag: task.classes})
        except ModnormError:
            pass
    elif given < task.classes:
        why = f"{task.source} has {task.classes} different {'tokens' if task.is_text else 'labels'}"
        raise ModnormError(f"--{flag} {given} is too small.", why=why, do="Leave it out.")
    return build(spec, device=device, **sizes)


@torch.no_grad()
def check_trainable(spec: str, model: nn.Module, task: Task) -> None:
    """Raises ModnormError, saying why, for a model whose output does not fit the task or that looks ahead in a text."""
    inputs, labels = next(task.batches(0))
    model.eval()
    try:
        found = logits(model, inputs)
        expected = (*labels.shape, found.shape[-1])
        if found.shape != expected or found.shape[-1] < task.classes:
            why = f"its output has shape {list(found.shape)}, for labels of shape {list(labels.shape)}"
            raise _untrainable(spec, f"{why} and {task.classes} classes")
        if task.is_text:
            changed = inputs.clone()
            changed[:, -1] = (changed[:, -1] + 1) % task.classes
            if not torch.allclose(logits(model, changed)[:, :-1], found[:, :-1], rtol=1e-3, atol=1e-5):
                raise _untrainable(spec, "its predictions look at later tokens")
    except ModnormError:
        raise
    except Exception as error:
        raise _untrainable(spec, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    finally:
        model.train()


def _untrainable(spec: str, why: str) -> ModnormError:
    return ModnormError(
        f"{spec} cannot be trained here.",
        why=why,
        do="Name a causal language model or an image classifier; for others, write the loop with ModularOptimizer.",
    )


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's logits. Called by name where the model has a name for its input (transformers), else by position."""
    inputs = inputs.to(next(model.parameters()).device)
    name = getattr(model, "main_input_name", None)
    output = model(**{name: inputs}) if isinstance(name, str) else model(inputs)
    return output if isinstance(output, Tensor) else output.logits if hasattr(output, "logits") else output[0]


def logits_loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy."""
    found = logits(model, inputs).flatten(0, -2).float()
    return F.cross_entropy(found, labels.flatten().to(found.device))


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Share of labels that are the most likely one."""
    found = logits(model, inputs)
    return (found.argmax(-1) == labels.to(found.device)).float().mean()

"""What a model returns, as a flat list of leaves with the names that people write for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from .errors import CaptureError

__all__ = ["Flatten", "matching", "named_leaves"]


def named_leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """(name, leaf) of everything in the outputs of a model, in the order of `torch.utils._pytree.tree_leaves`.

    A name is the path as it is written in Python: `logits`, `hidden_states[0]`, `aux_outputs[1].pred_boxes`, `[0]`; a
    model that returns nothing but one tensor has the output `output`. Dataclasses and distributions are opened too.
    """
    children = _children(value)
    if children is None:
        return [(name or "output", value)]
    return [leaf for key, child in children for leaf in named_leaves(child, _below(name, key))]


def matching(names: Sequence[str], wanted: str | Sequence[str]) -> list[int]:
    """Positions of the outputs that `wanted` names, by their own names or by that of a container around them.

    Raises:
        CaptureError: a name fits no output; the text lists those that there are.
    """
    found: set[int] = set()
    for choice in [wanted] if isinstance(wanted, str) else wanted:
        under = [i for i, name in enumerate(names) if name == choice or name.startswith((f"{choice}.", f"{choice}["))]
        if not under:
            raise CaptureError(
                f"The model returns no output named {choice!r} on these inputs.",
                why=f"its outputs are {', '.join(names) or 'none'}",
                do="pass names of these in outputs=, or the beginning of a path for everything below it",
            )
        found.update(under)
    return sorted(found)


class Flatten:
    """A forward hook that replaces what a module returns by the list of its leaves, and keeps their names.

    Attributes:
        names: a name for every leaf.
        other: type of every leaf that no graph can return; None stands in its place.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.other: list[str] = []

    def __call__(self, module: nn.Module, args: Any, value: Any) -> list[Any]:
        leaves = named_leaves(value)
        self.names = [name for name, _ in leaves]
        self.other = [type(leaf).__name__ for _, leaf in leaves if not _returnable(leaf)]
        return [leaf if _returnable(leaf) else None for _, leaf in leaves]


def _returnable(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, Tensor | bool | int | float)


def _below(name: str, key: Any) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f"{name}.{key}" if name else key
    return f"{name}[{key!r}]"


def _children(value: Any) -> Iterator[tuple[Any, Any]] | None:
    """(key, child) of a container; None for a leaf."""
    if isinstance(value, Mapping):
        return iter(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return zip(value._fields, value, strict=True)
    if isinstance(value, list | tuple):
        return enumerate(value)
    if type(value) in pytree.SUPPORTED_NODES:
        return enumerate(pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    if (parameters := getattr(value, "arg_constraints", None)) and isinstance(parameters, Mapping):
        return ((key, vars(value)[key]) for key in parameters if key in vars(value))
    if isinstance(value, Distribution):  # of distributions: mixtures, transformed ones
        return ((key, child) for key, child in vars(value).items() if isinstance(child, Tensor | Distribution))
    return None

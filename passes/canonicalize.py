"""Shared by the passes that recognise idioms: walking a graph back from a node, in the vocabulary of ATen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import fx

aten = torch.ops.aten

CASTS = frozenset(
    {aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.contiguous.default, aten.alias.default}
)


def is_call(node: Any, *targets: Any) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def strip(node: Any, *through: Any) -> Any:
    """Follows ``node`` back through casts and the given one-input ops."""
    while is_call(node, *CASTS, *through):
        node = node.args[0]
    return node


def cone(output: fx.Node, stop: Callable[[fx.Node], bool]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Everything ``output`` is computed from, down to the nodes where ``stop`` holds: (inside, frontier), in graph
    order."""
    inside: set[fx.Node] = set()
    frontier: set[fx.Node] = set()
    todo = [output]
    while todo:
        node = todo.pop()
        if node in inside or node in frontier:
            continue
        if node is not output and stop(node):
            frontier.add(node)
            continue
        inside.add(node)
        todo.extend(node.all_input_nodes)
    return sorted(inside), sorted(frontier)


def picked(node: Any, index: int, *of: Any) -> Any:
    """If ``node`` picks output ``index`` of one of the given ops, that op's call; anything else as it is."""
    if isinstance(node, fx.Node) and getattr(node.target, "__name__", "") == "getitem" and node.args[1] == index:
        return node.args[0] if is_call(node.args[0], *of) else node
    return node


def shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape)


def number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)

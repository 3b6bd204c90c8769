"""Pass: root mean square of constants that the graph itself computes (from ``arange``, ``full``, numbers, tensors that
``forward`` makes of numbers).

Buffers and inputs are not read, so that a model on the meta device gives the same norm as one with weights. Entries
that act as masks (-inf, or the most negative float; where a constant is added, large ones of either sign) are left
out: they select, they do not shift.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from modnorm_fx.capture import Input

from .canonicalize import aten
from .flow import ARITHMETIC, SHAPE_ONLY, Flow, is_float
from .masks import MASK, only_chooses

#: beyond this many entries a constant is not evaluated
LARGEST = 10_000_000
#: ops whose entries are whatever was in memory; they are written over later and count as zero
UNSET = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_permuted.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
#: how names that capture gives tensors made of numbers begin
MADE = "lifted_tensor"


def made_of_numbers(inputs: Iterable[Input], constants: Mapping[str, torch.Tensor]) -> dict[fx.Node, torch.Tensor]:
    """Values of the inputs that are tensors made of numbers while the model ran (``torch.tensor(0.5)``); a tensor that
    the model holds is like a buffer and not read."""
    made = {i.node: constants[i.name] for i in inputs if i.kind == "constant" and i.name.startswith(MADE)}
    return {node: value for node, value in made.items() if not value.is_meta}


def measure_constants(
    module: fx.GraphModule, flow: Flow, held: Mapping[fx.Node, torch.Tensor] = MappingProxyType({})
) -> dict[fx.Node, float]:
    """RMS per exogenous node that a signal or a weight reads (or adds, or is multiplied by) and that depends on nothing
    but the graph and the tensors that are ``held`` in it."""
    known: set[fx.Node] = set(held)
    wanted: list[fx.Node] = []
    for node in module.graph.nodes:
        if node.op == "call_function" and flow.exogenous(node) and all(s in known for s in _sources(node)):
            known.add(node)
        if node in known and any(
            not flow.exogenous(u) and (is_float(node) or u.target in ARITHMETIC) for u in node.users
        ):
            wanted.append(node)
    values: dict[fx.Node, Any] = dict(held)
    out: dict[fx.Node, float] = {}
    for node in wanted:
        value = _evaluate(node, values)
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_complex():
            value = value.double()
            kept = value[value.abs() < -MASK if only_chooses(module, node, flow) else value > MASK]
            out[node] = float(kept.square().mean().sqrt()) if kept.numel() else 0.0
    return out


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    todo = [node]
    while todo:
        top = todo[-1]
        if top in values:
            todo.pop()
            continue
        missing = [s for s in _sources(top) if s not in values]
        if missing:
            todo.extend(missing)
            continue
        values[top] = _run(top, values)
        todo.pop()
    return values[node]


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if any(values[s] is None for s in _sources(node)):
        return None
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.numel() > LARGEST:
        return None
    if node.target in UNSET and isinstance(value, torch.Tensor):
        return torch.zeros(tuple(value.shape), dtype=value.dtype)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n] if n in values else _like(n))
    kwargs = {k: (torch.device("cpu") if isinstance(v, torch.device) else v) for k, v in kwargs.items()}
    function: Any = node.target
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # noise that a model adds is the same noise every time
        torch.default_generator.manual_seed(0)
        return function(*args, **kwargs)


def _sources(node: fx.Node) -> list[fx.Node]:
    """What the value depends on: nothing for ops that only read a shape."""
    return [] if node.target in SHAPE_ONLY else node.all_input_nodes


def _like(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    return torch.empty(tuple(value.shape), dtype=value.dtype)

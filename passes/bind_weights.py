"""Pass: where each parameter meets a signal, and as which slice and arrangement of its entries.

Assumes a functional graph with its flow. Promises a :class:`WeightUse` for every operand of a signal node that is a
weight; ties need nothing special, because a tied parameter is one placeholder. A parameter whose view cannot be
followed is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from modnorm_fx.atoms import Slice
from modnorm_fx.capture import Input, where
from modnorm_fx.errors import WeightError
from modnorm_fx.rules import Operand, RuleTable, arguments, operands
from modnorm_fx.slices import take_slice

from .canonicalize import aten
from .flow import ARITHMETIC, Flow
from .layout import replay, sliced


@dataclass(frozen=True)
class WeightUse:
    """One operand that is a weight.

    Attributes:
        node: the signal node that uses it, and at which operand.
        parameter: qualified name; ``slices`` and ``shape`` say which part of it, in the parameter's own axes.
        view: the operand as a meta tensor over the contiguous part: its sizes and strides are the arrangement.
        through: names of reparametrisations on the way (``exp``, ``neg``, ``add``), in order.
    """

    node: fx.Node
    operand: Operand
    parameter: str
    slices: tuple[Slice, ...]
    shape: tuple[int, ...]
    view: torch.Tensor
    through: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """The operand is the part as it is stored."""
        return tuple(self.view.shape) == self.shape and self.view.is_contiguous()


@dataclass(frozen=True)
class _Value:
    slices: tuple[Slice, ...]
    shape: tuple[int, ...]
    view: Any  # a meta tensor; between a split and its getitem a tuple of them
    through: tuple[str, ...]


def bind_weights(
    module: fx.GraphModule, inputs: tuple[Input, ...], flow: Flow, *, rules: RuleTable
) -> tuple[WeightUse, ...]:
    """All uses, in graph order. Raises WeightError where a parameter's entries are rearranged beyond following."""
    names = {entry.node: entry.name for entry in inputs if entry.kind == "parameter"}
    values: dict[fx.Node, _Value | None] = {}
    uses: list[WeightUse] = []
    for node in module.graph.nodes:
        if node in names:
            shape = tuple(node.meta["val"].shape)
            values[node] = _Value((), shape, torch.empty(shape, device="meta"), ())
        elif flow.weight(node):
            values[node] = _follow(module, node, values, flow, rules)
        elif flow.signal(node):
            _, args = arguments(node, module)
            for operand, source in operands(args):
                if flow.weight(source):
                    value = values[source]
                    if value is None:
                        raise _lost(node, names[flow.parameters[source]], source)
                    uses.append(
                        WeightUse(
                            node,
                            operand,
                            names[flow.parameters[source]],
                            value.slices,
                            value.shape,
                            value.view,
                            value.through,
                        )
                    )
    return tuple(uses)


def _follow(
    module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, _Value | None], flow: Flow, rules: RuleTable
) -> _Value | None:
    (source,) = [s for s in node.all_input_nodes if flow.weight(s)]
    value = values[source]
    if value is None:
        return None
    if node.target is take_slice:
        place: Any = node.args[1:]
        return _take(value, Slice(*place))
    if node.target is aten.index.Tensor:  # rows looked up at fixed places: for the atom it is the table itself
        return _Value(value.slices, value.shape, value.view, value.through + ("index",))
    key, _ = arguments(node, module)
    row = rules.get(key)
    if (
        "index" in value.through and row is not None and row.view
    ):  # the arrangement of looked-up rows is no longer the table's
        return value
    view = replay(node, value.view, rules)
    if isinstance(view, torch.Tensor | tuple | list):
        return _Value(value.slices, value.shape, view, value.through)
    if key in ARITHMETIC or (row is not None and row.pointwise):
        return _Value(
            value.slices,
            value.shape,
            value.view,
            value.through + (str(node.target).split(".")[-2] if "." in str(node.target) else "map",),
        )
    return None


def _take(value: _Value, part: Slice) -> _Value | None:
    if "index" in value.through:
        return None
    block = _cut(value.shape, value.view)
    if block is None:
        return None
    slices, shape, view = block  # of a slice of a slice the first one
    value = _Value(_join(value.slices, slices), shape, view, value.through)
    whole = torch.empty(value.shape, device="meta")
    if tuple(value.view.shape) != value.shape or value.view.stride() != whole.stride():
        if (
            value.view.dim() == 2
            and tuple(value.view.t().shape) == value.shape
            and value.view.t().stride() == whole.stride()
        ):
            part = Slice(1 - part.axis, part.start, part.stop, part.period)  # a slice of the transpose
            taken = part.read(whole)
            view = torch.empty(taken.shape, device="meta").t()
            return _Value(_join(value.slices, (part,)), tuple(taken.shape), view, value.through)
        return None
    taken = part.read(whole)
    view = torch.empty(taken.shape, device="meta")
    return _Value(_join(value.slices, (part,)), tuple(taken.shape), view, value.through)


def resolve(use: WeightUse) -> WeightUse:
    """Turns a view that covers one block of the part into a slice of the parameter, so that two uses of two blocks
    are two weights."""
    block = _cut(use.shape, use.view)
    if block is None:
        raise _lost(use.node, use.parameter, use.node)
    slices, shape, view = block
    return WeightUse(use.node, use.operand, use.parameter, _join(use.slices, slices), shape, view, use.through)


def _join(slices: tuple[Slice, ...], more: tuple[Slice, ...]) -> tuple[Slice, ...]:
    """Slices of slices; one of all that the slice before it left is one slice: ``[16:48][0:16]`` is ``[16:32]``."""
    if not slices or not more:
        return slices + more
    last, part = slices[-1], more[0]
    if last.axis != part.axis or part.period != last.stop - last.start:
        return slices + more
    return (*slices[:-1], Slice(last.axis, last.start + part.start, last.start + part.stop, last.period))


def _cut(shape: tuple[int, ...], view: torch.Tensor) -> tuple[tuple[Slice, ...], tuple[int, ...], torch.Tensor] | None:
    """The block along one axis that a view covers: its slice (none for all), its shape, and the view over it. None
    where the view covers no such block."""
    whole = torch.empty(shape, device="meta")
    found = sliced(view, whole)
    if not found:
        return None if found is None else ((), shape, view)
    (part,) = found
    taken = torch.empty(part.read(whole).shape, device="meta")
    strides = _restride(view, whole, taken)
    moved = torch.empty(0, device="meta").set_(taken.untyped_storage(), 0, tuple(view.shape), strides)
    return found, tuple(taken.shape), moved


def _restride(view: torch.Tensor, whole: torch.Tensor, part: torch.Tensor) -> tuple[int, ...]:
    """Strides of the view over the part, given those over the whole: an axis' stride is replaced by the part's stride
    of that axis."""
    strides = []
    for s in view.stride():
        axis = next((a for a, w in enumerate(whole.stride()) if s >= w and whole.shape[a] > 1), None)
        strides.append(0 if s == 0 or axis is None else s // whole.stride(axis) * part.stride(axis))
    return tuple(strides)


def _lost(node: fx.Node, parameter: str, through: fx.Node) -> WeightError:
    return WeightError(
        f"The entries of parameter {parameter!r} are rearranged beyond following before {node.target} uses them.",
        where=where(node),
        why=f"the value passes through {through.target}, neither a view, a slice nor a known reparametrisation",
        do="Please report the model (no part of it was changed).",
    )

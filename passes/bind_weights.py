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
    if value.through:
        return None
    whole = torch.empty(value.shape, device="meta")
    if tuple(value.view.shape) != value.shape or value.view.stride() != whole.stride():
        if (
            value.view.dim() == 2
            and tuple(value.view.t().shape) == value.shape
            and value.view.t().stride() == whole.stride()
        ):
            part = Slice(1 - part.axis, part.start, part.stop, part.period)  # a slice of the transpose
            taken = part.read(whole)
            return _Value(value.slices + (part,), tuple(taken.shape), torch.empty(taken.shape, device="meta").t(), ())
        return None
    taken = part.read(whole)
    return _Value(value.slices + (part,), tuple(taken.shape), torch.empty(taken.shape, device="meta"), ())


def resolve(use: WeightUse) -> WeightUse:
    """Turns a view that covers one block of the part into a slice of the parameter, so that two uses of two blocks
    are two weights."""
    whole = torch.empty(use.shape, device="meta")
    found = sliced(use.view, whole)
    if found is None:
        raise _lost(use.node, use.parameter, use.node)
    if not found:
        return use
    (part,) = found
    taken = torch.empty(part.read(whole).shape, device="meta")
    strides = _restride(use.view, whole, taken)
    view = torch.empty(0, device="meta").set_(taken.untyped_storage(), 0, tuple(use.view.shape), strides)
    return WeightUse(use.node, use.operand, use.parameter, use.slices + (part,), tuple(taken.shape), view, use.through)


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

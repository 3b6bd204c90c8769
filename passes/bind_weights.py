"""Pass: where each parameter meets a signal, and as which slice and arrangement of its entries.

Assumes a functional graph with its flow. Promises a :class:`WeightUse` for every operand of a signal node that is a
weight; ties need nothing special, because a tied parameter is one placeholder. A parameter whose view cannot be
followed is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import fx

from modnorm_fx.atoms import Slice
from modnorm_fx.capture import Input, where
from modnorm_fx.errors import WeightError
from modnorm_fx.rules import Operand, RuleTable, arguments, operands
from modnorm_fx.slices import take_slice

from .canonicalize import aten
from .flow import ARITHMETIC, Flow
from .layout import TRANSPOSES, replay, sliced


class Affine(NamedTuple):
    """``shift + factor·w``."""

    factor: float
    shift: float

    def after(self, first: Affine) -> Affine:
        """The one map behind the other."""
        return Affine(self.factor * first.factor, self.factor * first.shift + self.shift)


IDENTITY = Affine(1.0, 0.0)


@dataclass(frozen=True)
class WeightUse:
    """One operand that is a weight.

    Attributes:
        node: the signal node that uses it, and at which operand.
        parameter: qualified name; ``slices`` and ``shape`` say which part of it, in the parameter's own axes.
        view: the operand as a meta tensor over the contiguous part: its sizes and strides are the arrangement.
        through: names of reparametrisations on the way (``exp``, ``neg``, ``add``), in order.
        affine: what the last of them that are affine amount to.
    """

    node: fx.Node
    operand: Operand
    parameter: str
    slices: tuple[Slice, ...]
    shape: tuple[int, ...]
    view: torch.Tensor
    through: tuple[str, ...]
    affine: Affine = IDENTITY

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
    affine: Affine = IDENTITY


def bind_weights(
    module: fx.GraphModule,
    inputs: tuple[Input, ...],
    flow: Flow,
    *,
    rules: RuleTable,
    constants: Mapping[fx.Node, float] = MappingProxyType({}),
) -> tuple[WeightUse, ...]:
    """All uses, in graph order; ``constants`` are sizes of tensors that multiply parameters (``measure_constants``).
    Raises WeightError where a parameter's entries are rearranged beyond following."""
    names = {entry.node: entry.name for entry in inputs if entry.kind == "parameter"}
    values: dict[fx.Node, _Value | None] = {}
    uses: list[WeightUse] = []
    for node in module.graph.nodes:
        if node in names:
            shape = tuple(node.meta["val"].shape)
            values[node] = _Value((), shape, torch.empty(shape, device="meta"), ())
        elif flow.weight(node):
            values[node] = _follow(module, node, values, flow, rules, constants)
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
                            value.affine,
                        )
                    )
    return tuple(uses)


def _follow(
    module: fx.GraphModule,
    node: fx.Node,
    values: dict[fx.Node, _Value | None],
    flow: Flow,
    rules: RuleTable,
    constants: Mapping[fx.Node, float],
) -> _Value | None:
    (source,) = [s for s in node.all_input_nodes if flow.weight(s)]
    value = values[source]
    if value is None:
        return None
    if node.target is take_slice:
        place: Any = node.args[1:]
        return _take(value, Slice(*place))
    if node.target is aten.index.Tensor:  # rows looked up at fixed places: for the atom it is the table itself
        return replace(value, through=value.through + ("index",))
    key, args = arguments(node, module)
    row = rules.get(key)
    if (
        "index" in value.through and row is not None and row.view
    ):  # the arrangement of looked-up rows is no longer the table's, but for which of its axes are outputs
        if node.target in TRANSPOSES and source.meta["val"].dim() == value.view.dim():
            return replace(value, view=replay(node, value.view, rules))
        return value
    view = replay(node, value.view, rules)
    if isinstance(view, torch.Tensor | tuple | list):
        return replace(value, view=view)
    affine = _affine(key, args, source, constants)
    if affine is not None:
        through, value = value.through + (_op_name(node),), _broadcast(value, node)
        return replace(value, through=through, affine=affine.after(value.affine))
    if key in ARITHMETIC or (row is not None and row.pointwise):
        name = "reciprocal" if key is aten.div.Tensor else _op_name(node)
        return replace(_broadcast(value, node), through=value.through + (name,), affine=IDENTITY)
    return None


def _broadcast(value: _Value, node: fx.Node) -> _Value:
    """`value` in the shape of ``node``, whose numbers may have more axes than the weight: ``w[:, None] / periods``."""
    size = node.meta["val"].shape
    if "index" in value.through or value.view.shape == size:
        return value
    return replace(value, view=value.view.expand(size))


def _op_name(node: fx.Node) -> str:
    return str(node.target).split(".")[-2] if "." in str(node.target) else "map"


def _affine(key: Any, args: Mapping[str, Any], source: fx.Node, constants: Mapping[fx.Node, float]) -> Affine | None:
    """The op as a function of the weight ``source``, if that is affine. A tensor of unknown value counts as 1 where it
    multiplies and as 0 where it is added."""
    if key is aten.neg.default:
        return Affine(-1.0, 0.0)
    if key not in ARITHMETIC:
        return None
    left = args["self"] is source
    other = args["other"] if left else args["self"]
    if key in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor):
        c = (constants.get(other) or 1.0) if isinstance(other, fx.Node) else float(other)
        if key is aten.div.Tensor:
            return Affine(1 / c, 0.0) if left and c else None
        return Affine(c, 0.0) if c else None
    c = constants.get(other, 0.0) if isinstance(other, fx.Node) else float(other)
    alpha = 1.0 if args.get("alpha") is None else float(args["alpha"])
    of_weight, of_other = (1.0, alpha) if left else (alpha, 1.0)
    if key is aten.sub.Tensor:
        of_weight, of_other = (1.0, -alpha) if left else (-alpha, 1.0)
    elif key is aten.rsub.Scalar:
        of_weight, of_other = -alpha, 1.0
    return Affine(of_weight, of_other * c)


def _take(value: _Value, part: Slice) -> _Value | None:
    if "index" in value.through:
        return None
    block = _cut(value.shape, value.view)
    if block is None:
        return None
    slices, shape, view = block  # of a slice of a slice the first one
    value = replace(value, slices=_join(value.slices, slices), shape=shape, view=view)
    whole = torch.empty(value.shape, device="meta")
    order = sorted(range(view.dim()), key=lambda d: (-view.stride()[d], -view.shape[d]))
    seen = view.permute(order)
    kept = list(range(len(shape)))  # one of several matrices may be picked: its axis is gone
    if view.dim() < len(shape):
        kept = [axis for axis in kept if shape[axis] > 1]
    if seen.shape != torch.Size(shape[a] for a in kept) or seen.stride() != tuple(whole.stride(a) for a in kept):
        return None
    part = Slice(kept[order.index(part.axis)], part.start, part.stop, part.period)  # of the stored arrangement
    taken = part.read(whole)
    stored = torch.empty([taken.shape[a] for a in kept], device="meta")
    view = stored.permute([order.index(d) for d in range(view.dim())])
    return replace(value, slices=_join(value.slices, (part,)), shape=tuple(taken.shape), view=view)


def resolve(use: WeightUse) -> WeightUse:
    """Turns a view that covers one block of the part into a slice of the parameter, so that two uses of two blocks
    are two weights."""
    block = _cut(use.shape, use.view)
    if block is None:
        raise _lost(use.node, use.parameter, use.node)
    slices, shape, view = block
    return replace(use, slices=_join(use.slices, slices), shape=shape, view=view)


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

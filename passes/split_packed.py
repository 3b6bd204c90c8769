"""Pass (rewrite): a layer whose output is cut into parts becomes one layer per part.

Fused QKV, the gate/up of a layer or of experts and the like are several weights in one tensor; which rows belong
together shows only in what happens to the output, so it is followed forward until it is cut (``cuts``). ``y = W x; q,
k, v = y.split(d, -1)`` becomes ``q = W[0:d] x``, ...; interleaved layouts give periodic slices. What lies between the
layer and the cut (a bias, an activation, a depthwise convolution) is cut with it. From there on every pass sees
ordinary layers whose weights are slices.

Assumes a functional graph and its flow. Promises the same outputs, up to the rounding of the smaller products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from modnorm_fx.atoms import Slice
from modnorm_fx.rules import RuleTable, arguments, shape_of
from modnorm_fx.slices import take_slice

from .canonicalize import aten, is_call
from .cuts import CONVOLUTIONS, Base, Cutter, Parts, Step, size
from .flow import SHAPE_ONLY, Flow

#: op -> (weight operand, axis of the features in the weight, axis of the features in the output)
LAYERS: dict[Any, tuple[str, int, int]] = {
    aten.linear.default: ("weight", 0, -1),
    aten.addmm.default: ("mat2", -1, -1),
    aten.mm.default: ("mat2", -1, -1),
    aten.matmul.default: ("other", -1, -1),
    aten.bmm.default: ("mat2", -1, -1),
    aten._grouped_mm.default: ("mat2", -1, -1),
    "transformers.grouped_mm_fallback.default": ("weight", -1, -1),
    aten.convolution.default: ("weight", 0, 1),
    aten.conv1d.default: ("weight", 0, 1),
    aten.conv2d.default: ("weight", 0, 1),
    aten.conv3d.default: ("weight", 0, 1),
}
#: where the bias stands, unless it is called so
BIASES: dict[Any, str] = {aten.addmm.default: "self"}
#: tensors in the type of their first argument, of which they take nothing else
NEW = frozenset({aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default})


@dataclass(frozen=True)
class _Layer:
    """A layer, and the sum with a bias that may follow it: experts have theirs looked up."""

    node: fx.Node
    weight: fx.Node
    weight_axis: int
    axis: int
    bias: fx.Node | None
    output: fx.Node


def split_packed(
    module: fx.GraphModule,
    flow: Flow,
    *,
    rules: RuleTable,
    constants: Mapping[fx.Node, torch.Tensor] = MappingProxyType({}),
) -> int:
    """Rewrites ``module`` in place and returns how many layers were split. ``flow`` may be stale afterwards.

    Args:
        constants: values of the placeholders of constants: an index such as ``[[-2]]`` is one.
    """

    cutter = Cutter(module, flow, rules, constants, frozenset(LAYERS))

    def cut(layer: _Layer | None) -> Parts | None:
        return cutter.parts(layer.output, layer.axis) if layer else None

    def alike(weight: fx.Node, parts: Parts) -> bool:
        """Whether all that read entries of the weight are layers that are cut the same way, or were."""
        users = [user for user in weight.users if user.target is not take_slice and user.target not in SHAPE_ONLY]
        return all((cut(_layer(user, module, flow)) or {}).keys() == parts.keys() for user in users)

    _release_types(module.graph)
    _pick_before_copies(module.graph)
    count = 0
    todo = list(module.graph.nodes)
    while todo:
        layer = _layer(todo.pop(), module, flow)
        parts = cut(layer)
        if layer and parts and alike(layer.weight, parts):
            todo.extend(_rewrite(layer, module, parts))
            count += 1
    return count


def _release_types(graph: fx.Graph) -> None:
    """Has new tensors take their type from an input of the graph: a layer is not used whole by lending its own."""
    inputs = list(graph.find_nodes(op="placeholder"))
    for node in graph.nodes:
        if node.target in NEW:
            source: Any = node.args[0]
            same = (i for i in inputs if getattr(i.meta.get("val"), "dtype", None) == source.meta["val"].dtype)
            node.replace_input_with(source, next(same, source))


def _pick_before_copies(graph: fx.Graph) -> None:
    """Where a copy is made only to merge other axes than the first, along which it is then taken apart (SAM's batch and
    heads), has each part copied by itself: what is behind a copy is no view of the layer's output."""
    for node in list(graph.nodes):
        if not is_call(node, aten._unsafe_view.default, aten.reshape.default):
            continue
        source: Any = node.args[0]
        shape = shape_of(node)
        picks = [_picks(user, len(shape)) for user in node.users]
        if shape_of(source)[:1] != shape[:1] or None in picks:
            continue
        for pick, index in chain.from_iterable(filter(None, picks)):
            with graph.inserting_before(pick):
                part = graph.call_function(aten.select.int, (source, 0, index))
                part.meta = dict(source.meta) | {"val": source.meta["val"].select(0, index)}
                merged = graph.call_function(aten.reshape.default, (part, list(shape[1:])))
                merged.meta = dict(pick.meta)
            pick.replace_all_uses_with(merged)
    graph.eliminate_dead_code()


def _picks(user: fx.Node, rank: int) -> list[tuple[fx.Node, int]] | None:
    """Nodes that hold one place along the first axis of what ``user`` reads, and which; None if it does other things
    with it."""
    args: Any = (*user.args, 0)
    if is_call(user, aten.unbind.int) and args[1] % rank == 0:
        return [(pick, int(pick.args[1])) for pick in user.users]  # type: ignore[arg-type]
    if is_call(user, aten.select.int) and args[1] % rank == 0 and isinstance(args[2], int):
        return [(user, args[2])]
    return None


def _layer(node: fx.Node, module: fx.GraphModule, flow: Flow) -> _Layer | None:
    if node.op != "call_function":
        return None
    name, weight_axis, axis = LAYERS.get(node.target) or LAYERS.get(str(node.target)) or ("", 0, 0)
    _, args = arguments(node, module) if name else (None, {})
    weight = args.get(name)
    if not isinstance(weight, fx.Node) or flow.exogenous(weight) or flow.signal(weight):
        return None
    rank = len(shape_of(weight))
    if rank < 2 or args.get("groups", 1) != 1 or args.get("transposed"):
        return None
    axis %= len(shape_of(node))
    bias = args.get(BIASES.get(node.target, "bias"))
    bias = bias if isinstance(bias, fx.Node) else None
    (user,) = node.users if len(node.users) == 1 else (None,)
    if bias is None and is_call(user, aten.add.Tensor) and user.args[0] is node and _is_bias(user, axis, flow):
        added: Any = user.args[1]
        return _Layer(node, weight, weight_axis % rank, axis, added, user)
    return _Layer(node, weight, weight_axis % rank, axis, bias, node)


def _is_bias(node: fx.Node, axis: int, flow: Flow) -> bool:
    """Whether the sum ``node`` adds a weight that has a number, or a row of numbers, for every feature."""
    added: Any = node.args[1]
    if not isinstance(added, fx.Node) or not flow.weight(added) or axis != len(shape_of(node)) - 1:
        return False
    if is_call(added, aten.index.Tensor):
        args: Any = added.args
        whole, places = args  # rows of it
        if len(places) >= len(shape_of(whole)):
            return False
    return shape_of(added)[-1:] == shape_of(node)[-1:]


def _rewrite(layer: _Layer, module: fx.GraphModule, parts: Parts) -> list[fx.Node]:
    """Returns the layers whose output may be cut now: the parts, and what is added to them."""
    graph = module.graph
    node, axis = layer.node, layer.axis
    base = Base(shape_of(node), axis)
    made = []
    for part, holders in parts.items():
        shape = [*base.shape[:axis], size(part, base.features), *base.shape[axis + 1 :]]
        with graph.inserting_before(layer.output):
            swapped = {layer.weight: _take(graph, layer.weight, layer.weight_axis, part)}
            if layer.bias is not None:
                swapped[layer.bias] = _take_bias(graph, layer.bias, part)
            smaller = _copy(graph, node, swapped, shape)
            made.append(smaller)
            if layer.output is not node:
                smaller = _copy(graph, layer.output, swapped | {node: smaller}, shape)
        values: dict[tuple[Step, ...], fx.Node] = {(): smaller}
        for holder in holders:
            value = _apply(graph, values, holder.steps, part, base)
            made.extend(step.layer for step in holder.steps if step.layer is not None)
            holder.node.replace_all_uses_with(_arrange(graph, value, holder.view, part, holder.base, holder.node.meta))
    graph.eliminate_dead_code()
    return made


def _apply(
    graph: fx.Graph, values: dict[tuple[Step, ...], fx.Node], steps: tuple[Step, ...], part: Slice, base: Base
) -> fx.Node:
    """The steps of a part, made once for all that hold it; ``values`` are those that have been."""
    if steps in values:
        return values[steps]
    value, step = _apply(graph, values, steps[:-1], part, base), steps[-1]
    base = next((s.base for s in reversed(steps[:-1]) if s.base is not None), base)
    shape, swapped = list(shape_of(value)), {}
    if step.view is not None and step.base is not None:
        axis, features = step.base.axis, step.base.features
        view = step.view.unflatten(axis, (-1, part.period)).narrow(axis + 1, part.start, part.stop - part.start)
        value = _arrange(graph, value, view, part, base, step.source.meta)
        shape = list(step.base.shape)
        shape[axis] = size(part, features)
        with graph.inserting_before(step.node):
            value = _reshape(graph, value, [*view.shape[:axis], shape[axis], *view.shape[axis + 2 :]])
            swapped = {
                operand: _take(graph, operand, along, part)
                if step.layer is None
                else _pick(graph, operand, along, part)
                for operand, along in step.slices.items()
            }
    with graph.inserting_before(step.node):
        values[steps] = _copy(graph, step.node, swapped | {step.source: value}, shape)
    if is_call(step.node, *CONVOLUTIONS):
        _set(values[steps], "groups", shape[1])
    return values[steps]


def _copy(graph: fx.Graph, node: fx.Node, swapped: Mapping[fx.Node, fx.Node], shape: list[int]) -> fx.Node:
    """``node`` with other operands, where it makes something of ``shape``."""
    copy = graph.node_copy(node, lambda n: swapped.get(n, n))
    copy.meta["val"] = node.meta["val"].new_empty(shape)
    return copy


def _set(node: fx.Node, name: str, value: Any) -> None:
    """Gives an op another argument, as it was given the one that it has."""
    place = [a.name for a in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def _take(graph: fx.Graph, weight: fx.Node, axis: int, part: Slice) -> fx.Node:
    taken = graph.call_function(take_slice, (weight, axis, part.start, part.stop, part.period))
    taken.meta = dict(weight.meta)
    taken.meta["val"] = take_slice(weight.meta["val"], axis, part.start, part.stop, part.period)
    return taken


def _take_bias(graph: fx.Graph, bias: fx.Node, part: Slice) -> fx.Node:
    """The slice of a bias along its last axis; of rows that are looked up, rows of the table's slice."""
    if not is_call(bias, aten.index.Tensor):
        return _take(graph, bias, len(shape_of(bias)) - 1, part)
    whole: Any = bias.args[0]
    taken = _take(graph, whole, len(shape_of(whole)) - 1, part)
    shape = [*shape_of(bias)[:-1], size(part, shape_of(bias)[-1])]
    return _copy(graph, bias, {whole: taken}, shape)


def _pick(graph: fx.Graph, operand: fx.Node, axis: int, part: Slice) -> fx.Node:
    """The part of a signal, as views that show where it is cut, and what joins the periods."""
    shape = list(shape_of(operand))
    periods = _reshape(graph, operand, [*shape[:axis], shape[axis] // part.period, part.period, *shape[axis + 1 :]])
    picked = graph.call_function(aten.slice.Tensor, (periods, axis + 1, part.start, part.stop))
    picked.meta = dict(operand.meta) | {"val": periods.meta["val"].narrow(axis + 1, part.start, part.stop - part.start)}
    shape[axis] = size(part, shape[axis])
    return _reshape(graph, picked, shape)


def _reshape(graph: fx.Graph, value: fx.Node, shape: list[int]) -> fx.Node:
    made = graph.call_function(aten.reshape.default, (value, shape))
    made.meta = dict(value.meta) | {"val": value.meta["val"].reshape(shape)}
    return made


def _arrange(
    graph: fx.Graph, value: fx.Node, view: torch.Tensor, part: Slice, base: Base, meta: Mapping[str, Any]
) -> fx.Node:
    """The arrangement that ``view`` is of the whole, of ``value``, which is a part of it: a view, then a permutation.

    ``view`` gives each dimension's stride in the packed output; in the smaller one a feature stride shrinks from
    periods to parts and a position stride by the share of features kept.
    """
    features, unit = base.features, math.prod(base.shape[base.axis + 1 :])
    width, kept = part.stop - part.start, size(part, features)

    def shrunk(stride: int) -> int:
        if stride < unit:
            return stride
        if stride >= unit * features:
            return stride // features * kept
        index = stride // unit
        return unit * (index // part.period * width if index >= part.period else index)

    strides = view.stride()
    dims = sorted(range(view.dim()), key=lambda d: (view.shape[d] > 1, -shrunk(strides[d])))
    with graph.inserting_after(value):
        arranged = graph.call_function(aten.reshape.default, (value, [view.shape[d] for d in dims]))
    arranged.meta = dict(meta) | {"val": value.meta["val"].reshape([view.shape[d] for d in dims])}
    order = [dims.index(d) for d in range(len(dims))]
    if order == sorted(order):
        return arranged
    with graph.inserting_after(arranged):
        result = graph.call_function(aten.permute.default, (arranged, order))
    result.meta = dict(meta) | {"val": arranged.meta["val"].permute(order)}
    return result

"""Pass (rewrite): a layer whose output is cut into parts becomes one layer per part.

Fused QKV, the gate/up of a layer or of experts and the like are several weights in one tensor; which rows belong
together shows only in what happens to the output, so it is followed forward until it is cut: through views, and through
functions of each entry that have no weights (``clamp``, an activation, a number as factor). ``y = W x; q, k, v =
y.split(d, -1)`` becomes ``q = W[0:d] x``, ...; interleaved layouts give periodic slices. A bias that is added to the
output before it is cut is cut with it, and functions are taken of each part. From there on every pass sees ordinary
layers whose weights are slices.

Assumes a functional graph and its flow. Promises the same outputs, up to the rounding of the smaller products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from modnorm_fx.atoms import Slice
from modnorm_fx.rules import RuleTable, arguments, shape_of
from modnorm_fx.slices import take_slice

from .canonicalize import aten, is_call, strip
from .flow import SHAPE_ONLY, Flow
from .layout import feature_slice, replay

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
#: functions of each entry of one tensor where what else they take are numbers, beside those that the rules know
SCALAR = frozenset(
    {
        aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor, aten.add.Scalar,
        aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar,
    }
)  # fmt: skip
#: more parts than any fused projection has (q, k, v, gate, ...); beyond it a model loops over heads, and its heads
#: stay one matrix
MOST_PARTS = 8


@dataclass(frozen=True)
class _Holder:
    """A node that holds a part of a layer's output: as the ``view`` of it, after ``functions`` of each entry."""

    node: fx.Node
    view: torch.Tensor
    functions: tuple[fx.Node, ...]


_Parts = dict[Slice, list[_Holder]]


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

    def cut(node: fx.Node) -> _Parts | None:
        layer = _layer(node, module, flow)
        return _parts(layer, rules, constants) if layer else None

    def alike(weight: fx.Node, parts: Mapping[Slice, object]) -> bool:
        """Whether all that read entries of the weight are layers that are cut the same way, or were."""
        users = [user for user in weight.users if user.target is not take_slice and user.target not in SHAPE_ONLY]
        return all((cut(user) or {}).keys() == parts.keys() for user in users)

    _pick_before_copies(module.graph)
    count = 0
    todo = list(module.graph.nodes)
    while todo:
        layer = _layer(todo.pop(), module, flow)
        parts = layer and _parts(layer, rules, constants)
        if layer and parts and alike(layer.weight, parts):
            todo.extend(_rewrite(layer, module, parts))
            count += 1
    return count


def _pick_before_copies(graph: fx.Graph) -> None:
    """Where a copy is made only to merge other axes than the first, along which it is then taken apart (SAM's batch and
    heads), has each part copied by itself: what is behind a copy is no view of the layer's output."""
    for node in list(graph.nodes):
        if not is_call(node, aten._unsafe_view.default, aten.reshape.default):
            continue
        source: Any = node.args[0]
        size = shape_of(node)
        picks = [_picks(user, len(size)) for user in node.users]
        if shape_of(source)[:1] != size[:1] or None in picks:
            continue
        for pick, index in chain.from_iterable(filter(None, picks)):
            with graph.inserting_before(pick):
                part = graph.call_function(aten.select.int, (source, 0, index))
                part.meta = dict(source.meta) | {"val": source.meta["val"].select(0, index)}
                merged = graph.call_function(aten.reshape.default, (part, list(size[1:])))
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


def _parts(layer: _Layer, rules: RuleTable, constants: Mapping[fx.Node, torch.Tensor]) -> _Parts | None:
    """The slices the output is cut into, and the nodes that hold each; None where it is used whole or cut
    irregularly."""
    output = torch.empty(shape_of(layer.node), device="meta")
    if not output.numel():
        return None
    stride, features = output.stride(layer.axis), output.shape[layer.axis]
    parts: _Parts = {}
    for holder in _cuts(_Holder(layer.output, output, ()), rules, constants, stride, features):
        found = feature_slice(holder.view, stride, features)
        if isinstance(found, str) or holder.view.numel() != output.numel() // features * _size(found, features):
            return None
        parts.setdefault(found, []).append(holder)
    if not 2 <= len(parts) <= MOST_PARTS or _overlap(parts, features):
        return None
    return parts


def _cuts(
    whole: _Holder, rules: RuleTable, constants: Mapping[fx.Node, torch.Tensor], stride: int, features: int
) -> Iterator[_Holder]:
    """Follows the output through views and functions of each entry; yields where it is first cut along features, or
    first used whole."""
    node, value, functions = whole.node, whole.view, whole.functions
    for user in node.users:
        if _is_function(user, node, rules):
            yield from _cuts(_Holder(user, value, (*functions, user)), rules, constants, stride, features)
            continue
        view = replay(user, value, rules) if user.target is not aten.index.Tensor else _indexed(user, value, constants)
        if view is None:
            yield whole
            continue
        # split, chunk, unbind: a tuple whose parts are picked by getitem
        picks: list[tuple[fx.Node, Any]] = (
            [(user, view)] if isinstance(view, torch.Tensor) else [(pick, view[pick.args[1]]) for pick in user.users]
        )
        for pick, part in picks:
            holder = _Holder(pick, part, functions)
            if feature_slice(part, stride, features) == "all":
                yield from _cuts(holder, rules, constants, stride, features)
            else:
                yield holder


def _is_function(node: fx.Node, source: fx.Node, rules: RuleTable) -> bool:
    """Whether each entry of ``node`` is a function of that of ``source`` at its place, the same for all."""
    if node.op != "call_function" or node.all_input_nodes != [source] or shape_of(node) != shape_of(source):
        return False
    row = rules.get(node.target)
    return (node.target in SCALAR and source not in node.args[1:]) or (row is not None and row.pointwise)


def _indexed(node: fx.Node, value: torch.Tensor, constants: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    """The view that ``value[..., index, :]`` is for a constant index in one run (Falcon's ``[-2]``), else None."""
    args: Any = node.args
    axes = [a for a, index in enumerate(args[1]) if index is not None]
    index = constants.get(strip(args[1][axes[0]])) if len(axes) == 1 else None
    if index is None or index.is_meta or index.dtype != torch.int64 or index.dim() != 1 or not index.numel():
        return None
    (axis,) = axes
    places = (index % value.shape[axis]).tolist()
    if places != list(range(places[0], places[0] + len(places))):
        return None
    return value.narrow(axis, places[0], len(places))


def _size(part: Slice, features: int) -> int:
    return features // part.period * (part.stop - part.start)


def _overlap(parts: _Parts, features: int) -> bool:
    indices = torch.arange(features)
    seen = torch.zeros(features, dtype=torch.int)
    for part in parts:
        seen[part.read(indices)] += 1
    return bool((seen > 1).any())


def _rewrite(layer: _Layer, module: fx.GraphModule, parts: _Parts) -> list[fx.Node]:
    graph = module.graph
    node, axis = layer.node, layer.axis
    shape = shape_of(node)
    made = []
    for part, holders in parts.items():
        width = _size(part, shape[axis])
        with graph.inserting_before(layer.output):
            swapped = {layer.weight: _take(graph, layer.weight, layer.weight_axis, part)}
            if layer.bias is not None:
                swapped[layer.bias] = _take_bias(graph, layer.bias, part)
            smaller = _copy(graph, node, swapped)
            made.append(smaller)
            smaller.meta["val"] = node.meta["val"].new_empty([*shape[:axis], width, *shape[axis + 1 :]])
            if layer.output is not node:
                swapped[node] = smaller
                smaller = _copy(graph, layer.output, swapped)
                smaller.meta["val"] = made[-1].meta["val"]
        values: dict[tuple[fx.Node, ...], fx.Node] = {(): smaller}
        for holder in holders:
            value = _apply(graph, values, holder.functions)
            with graph.inserting_after(value):
                _rebuild(graph, value, holder.node, holder.view, part, shape, axis)
    graph.eliminate_dead_code()
    return made


def _apply(graph: fx.Graph, values: dict[tuple[fx.Node, ...], fx.Node], functions: tuple[fx.Node, ...]) -> fx.Node:
    """The functions of a part, made once for all that hold it; ``values`` are those that have been."""
    if functions not in values:
        before, function = _apply(graph, values, functions[:-1]), functions[-1]
        with graph.inserting_after(before):
            made = _copy(graph, function, {function.all_input_nodes[0]: before})
        made.meta["val"] = function.meta["val"].new_empty(before.meta["val"].shape)
        values[functions] = made
    return values[functions]


def _copy(graph: fx.Graph, node: fx.Node, swapped: Mapping[fx.Node, fx.Node]) -> fx.Node:
    return graph.node_copy(node, lambda n: swapped.get(n, n))


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
    rows = _copy(graph, bias, {whole: taken})
    rows.meta["val"] = take_slice(bias.meta["val"], len(shape_of(bias)) - 1, part.start, part.stop, part.period)
    return rows


def _rebuild(
    graph: fx.Graph, layer: fx.Node, holder: fx.Node, view: torch.Tensor, part: Slice, shape: tuple[int, ...], axis: int
) -> None:
    """Replaces ``holder`` by the same arrangement of the smaller layer's output: a view, then a permutation.

    ``view`` gives each dimension's stride in the packed output; in the smaller one a feature stride shrinks from
    periods to parts and a position stride by the share of features kept.
    """
    features, unit = shape[axis], math.prod(shape[axis + 1 :])
    width, kept = part.stop - part.start, _size(part, shape[axis])

    def shrunk(stride: int) -> int:
        if stride < unit:
            return stride
        if stride >= unit * features:
            return stride // features * kept
        index = stride // unit
        return unit * (index // part.period * width if index >= part.period else index)

    strides = view.stride()
    dims = sorted(range(view.dim()), key=lambda d: (view.shape[d] > 1, -shrunk(strides[d])))
    arranged = graph.call_function(aten.view.default, (layer, [view.shape[d] for d in dims]))
    arranged.meta = dict(holder.meta) | {"val": layer.meta["val"].view([view.shape[d] for d in dims])}
    result = arranged
    order = [dims.index(d) for d in range(len(dims))]
    if order != sorted(order):
        with graph.inserting_after(arranged):
            result = graph.call_function(aten.permute.default, (arranged, order))
        result.meta = dict(holder.meta) | {"val": arranged.meta["val"].permute(order)}
    holder.replace_all_uses_with(result)

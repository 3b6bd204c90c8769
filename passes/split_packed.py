"""Pass (rewrite): a layer whose output is cut into parts becomes one layer per part.

Fused QKV, gate/up and the like are several weights in one tensor; which rows belong together shows only in what
happens to the output, so it is followed forward through views until it is cut. ``y = W x; q, k, v = y.split(d, -1)``
becomes ``q = W[0:d] x``, ...; interleaved layouts give periodic slices. From there on every pass sees ordinary layers
whose weights are slices.

Assumes a functional graph and its flow. Promises the same outputs, up to the rounding of the smaller products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from modnorm_fx.atoms import Slice
from modnorm_fx.rules import RuleTable, arguments, shape_of
from modnorm_fx.slices import take_slice

from .canonicalize import aten
from .flow import Flow
from .layout import feature_slice, replay

#: op -> (weight operand, its output axis, axis of the features in the output)
LAYERS: dict[Any, tuple[str, int, int]] = {
    aten.linear.default: ("weight", 0, -1),
    aten.addmm.default: ("mat2", 1, -1),
    aten.mm.default: ("mat2", 1, -1),
    aten.matmul.default: ("other", 1, -1),
    aten.convolution.default: ("weight", 0, 1),
    aten.conv1d.default: ("weight", 0, 1),
    aten.conv2d.default: ("weight", 0, 1),
    aten.conv3d.default: ("weight", 0, 1),
}
#: where the bias stands, unless it is called so
BIASES: dict[Any, str] = {aten.addmm.default: "self"}
#: more parts than any fused projection has (q, k, v, gate, ...); beyond it a model loops over heads, and its heads
#: stay one matrix
MOST_PARTS = 8


def split_packed(module: fx.GraphModule, flow: Flow, *, rules: RuleTable) -> int:
    """Rewrites ``module`` in place and returns how many layers were split. ``flow`` may be stale afterwards."""
    count = 0
    todo = [n for n in module.graph.nodes if n.op == "call_function" and n.target in LAYERS]
    while todo:
        node = todo.pop()
        parts = _parts(node, module, flow, rules)
        if parts:
            todo.extend(_rewrite(node, module, parts))
            count += 1
    return count


def _parts(
    node: fx.Node, module: fx.GraphModule, flow: Flow, rules: RuleTable
) -> dict[Slice, list[tuple[fx.Node, torch.Tensor]]] | None:
    """The slices the output is cut into, and the nodes that hold each; None where it is used whole or cut
    irregularly."""
    _, args = arguments(node, module)
    weight, _, axis = LAYERS[node.target]
    if not isinstance(args.get(weight), fx.Node) or flow.exogenous(args[weight]) or flow.signal(args[weight]):
        return None
    if node.target is aten.matmul.default and len(shape_of(args[weight])) != 2:
        return None
    if args.get("groups", 1) != 1 or args.get("transposed"):
        return None
    output = torch.empty(shape_of(node), device="meta")
    stride, features = output.stride(axis), output.shape[axis]
    parts: dict[Slice, list[tuple[fx.Node, torch.Tensor]]] = {}
    for holder, view in _cuts(node, output, rules, stride, features):
        found = feature_slice(view, stride, features)
        if isinstance(found, str) or view.numel() != output.numel() // features * _size(found, features):
            return None
        parts.setdefault(found, []).append((holder, view))
    if not 2 <= len(parts) <= MOST_PARTS or _overlap(parts, features):
        return None
    return parts


def _cuts(
    node: fx.Node, value: torch.Tensor, rules: RuleTable, stride: int, features: int
) -> Iterator[tuple[fx.Node, torch.Tensor]]:
    """Follows the output through views; yields where it is first cut along features, or first used whole."""
    for user in node.users:
        view = replay(user, value, rules)
        if view is None:
            yield node, value
        elif isinstance(view, torch.Tensor):
            if feature_slice(view, stride, features) == "all":
                yield from _cuts(user, view, rules, stride, features)
            else:
                yield user, view
        else:  # split, chunk, unbind: a tuple whose parts are picked by getitem
            for pick in user.users:
                part = view[pick.args[1]]
                if feature_slice(part, stride, features) == "all":
                    yield from _cuts(pick, part, rules, stride, features)
                else:
                    yield pick, part


def _size(part: Slice, features: int) -> int:
    return features // part.period * (part.stop - part.start)


def _overlap(parts: dict[Slice, list], features: int) -> bool:
    indices = torch.arange(features)
    seen = torch.zeros(features, dtype=torch.int)
    for part in parts:
        seen[part.read(indices)] += 1
    return bool((seen > 1).any())


def _rewrite(
    node: fx.Node, module: fx.GraphModule, parts: dict[Slice, list[tuple[fx.Node, torch.Tensor]]]
) -> list[fx.Node]:
    graph = module.graph
    _, args = arguments(node, module)
    weight, out_axis, axis = LAYERS[node.target]
    shape = shape_of(node)
    axis %= len(shape)
    made = []
    for part, holders in parts.items():
        width = _size(part, shape[axis])
        with graph.inserting_before(node):
            swapped = {args[weight]: _take(graph, args[weight], out_axis, part)}
            bias = args.get(BIASES.get(node.target, "bias"))
            if isinstance(bias, fx.Node):
                swapped[bias] = _take(graph, bias, 0, part)
            layer = _copy(graph, node, swapped)
        layer.meta["val"] = node.meta["val"].new_empty([*shape[:axis], width, *shape[axis + 1 :]])
        made.append(layer)
        for holder, view in holders:
            with graph.inserting_after(layer):
                _rebuild(graph, layer, holder, view, part, shape, axis)
    graph.eliminate_dead_code()
    return made


def _copy(graph: fx.Graph, node: fx.Node, swapped: Mapping[fx.Node, fx.Node]) -> fx.Node:
    return graph.node_copy(node, lambda n: swapped.get(n, n))


def _take(graph: fx.Graph, weight: fx.Node, axis: int, part: Slice) -> fx.Node:
    taken = graph.call_function(take_slice, (weight, axis, part.start, part.stop, part.period))
    taken.meta = dict(weight.meta)
    taken.meta["val"] = take_slice(weight.meta["val"], axis, part.start, part.stop, part.period)
    return taken


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

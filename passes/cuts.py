"""Where the output of a layer is cut along its features, for ``split_packed``.

The output is followed forward: through views; through functions of each entry (``clamp``, an activation, a number as
factor), in whatever layout; and through what works on each feature by itself while the features lie along one axis:
gains and biases, another layer's output that is added (LoRA), depthwise convolutions, and the positions that are
taken behind one (Mamba-2). Each of these can be had of a part of the features as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from modnorm_fx.atoms import Slice
from modnorm_fx.rules import RuleTable, arguments, shape_of

from .canonicalize import aten, is_call, strip
from .flow import Flow, is_float
from .layout import feature_slice, replay

#: functions of each entry of one tensor where what else they take are numbers, beside those that the rules know
SCALAR = frozenset(
    {
        aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor, aten.add.Scalar,
        aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar,
    }
)  # fmt: skip
SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
BINARY = SUMS | {aten.mul.Tensor, aten.div.Tensor}
CONVOLUTIONS = frozenset({aten.convolution.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})
#: more parts than any fused projection has (q, k, v, gate, ...); beyond it a model loops over heads, and its heads
#: stay one matrix
MOST_PARTS = 8


@dataclass(frozen=True)
class Base:
    """The layout in which views are given: that of the layer's output, or of the last ``Step`` that works on features.

    Attributes:
        shape: of the whole, contiguous.
        axis: of the features.
    """

    shape: tuple[int, ...]
    axis: int

    @property
    def features(self) -> int:
        return self.shape[self.axis]

    def whole(self) -> torch.Tensor:
        return torch.empty(self.shape, device="meta")


@dataclass(frozen=True, eq=False)
class Step:
    """An op between the layer and the cut that can be had of a part of the features.

    Attributes:
        view: what it reads, as a view of the base so far; None for a function of each entry, which is the same in any
            layout.
        base: of what it makes; None for a function of each entry, which leaves it.
        slices: operands that have something for each feature -> the axis along which they have it.
        layer: what makes the operand, where it is no weight but what another layer adds.
    """

    node: fx.Node
    source: fx.Node
    view: torch.Tensor | None = None
    base: Base | None = None
    slices: Mapping[fx.Node, int] = field(default_factory=dict)
    layer: fx.Node | None = None


@dataclass(frozen=True)
class Holder:
    """A node that holds a part of a layer's output: as the ``view`` of ``base``, after ``steps``."""

    node: fx.Node
    view: torch.Tensor
    base: Base
    steps: tuple[Step, ...] = ()


Parts = dict[Slice, list[Holder]]


@dataclass(frozen=True)
class Cutter:
    """Finds cuts in one graph.

    Args:
        constants: values of the placeholders of constants: an index such as ``[[-2]]`` is one.
        layers: ops that make features.
    """

    module: fx.GraphModule
    flow: Flow
    rules: RuleTable
    constants: Mapping[fx.Node, torch.Tensor]
    layers: frozenset[Any]

    def parts(self, output: fx.Node, axis: int) -> Parts | None:
        """The slices that ``output`` is cut into along ``axis``, and the nodes that hold each; None where it is used
        whole or cut irregularly."""
        base = Base(shape_of(output), axis)
        if 0 in base.shape:
            return None
        parts: Parts = {}
        for holder in self._cuts(Holder(output, base.whole(), base)):
            whole, features = holder.base.whole(), base.features
            found = feature_slice(holder.view, whole.stride(holder.base.axis), features)
            if isinstance(found, str) or holder.view.numel() != whole.numel() // features * size(found, features):
                return None
            parts.setdefault(found, []).append(holder)
        if not 2 <= len(parts) <= MOST_PARTS or _overlap(parts, base.features):
            return None
        return parts

    def _cuts(self, whole: Holder) -> Iterator[Holder]:
        """Yields where the features are first cut, or first used whole."""
        node, value, base = whole.node, whole.view, whole.base
        for user in node.users:
            if is_function(user, node, self.rules):
                yield from self._cuts(Holder(user, value, base, (*whole.steps, Step(user, node))))
                continue
            step = self._step(user, whole)
            if step is not None and step.base is not None:
                yield from self._cuts(Holder(user, step.base.whole(), step.base, (*whole.steps, step)))
                continue
            view = (
                replay(user, value, self.rules) if user.target is not aten.index.Tensor else self._indexed(user, value)
            )
            if view is None:
                yield whole
                continue
            # split, chunk, unbind: a tuple whose parts are picked by getitem
            picks: list[tuple[fx.Node, Any]] = (
                [(user, view)] if isinstance(view, torch.Tensor) else [(n, view[n.args[1]]) for n in user.users]
            )
            for pick, part in picks:
                holder = Holder(pick, part, base, whole.steps)
                if feature_slice(part, base.whole().stride(base.axis), base.features) == "all":
                    yield from self._cuts(holder)
                else:
                    yield holder

    def _step(self, node: fx.Node, whole: Holder) -> Step | None:
        """``node`` as a step of what ``whole`` holds, if it works on each feature by itself and they lie along one
        axis."""
        view, base = whole.view, whole.base
        stride = base.whole().stride(base.axis)
        axes = [a for a in range(view.dim()) if view.shape[a] == base.features > 1 and view.stride(a) == stride]
        if len(axes) != 1 or view.numel() != base.whole().numel() or node.all_input_nodes.count(whole.node) != 1:
            return None
        (axis,) = axes
        found = None
        if is_call(node, *BINARY):
            found = self._binary(node, whole.node, axis)
        elif is_call(node, *CONVOLUTIONS):
            found = self._depthwise(node, whole.node, axis)
        elif is_call(node, aten.slice.Tensor) and whole.steps and is_call(whole.steps[-1].node, *CONVOLUTIONS):
            found = ({}, None) if node.args[1:2] not in ((axis,), (axis - view.dim(),)) else None
        return None if found is None else Step(node, whole.node, view, Base(shape_of(node), axis), *found)

    def _binary(self, node: fx.Node, source: fx.Node, axis: int) -> tuple[dict[fx.Node, int], fx.Node | None] | None:
        """A product or sum with a weight that has a number for each feature, or a sum with what another layer makes."""
        others = [a for a in node.args[:2] if a is not source]
        other: Any = others[0] if len(others) == 1 else None
        if not isinstance(other, fx.Node) or not is_float(other) or shape_of(node) != shape_of(source):
            return None
        along = axis - len(shape_of(source)) + len(shape_of(other))
        if along < 0 or shape_of(other)[along] != shape_of(source)[axis]:
            return None
        if self._own(other):
            return {other: along}, None
        layer = self._maker(other) if is_call(node, *SUMS) else None
        return None if layer is None else ({other: along}, layer)

    def _depthwise(self, node: fx.Node, source: fx.Node, axis: int) -> tuple[dict[fx.Node, int], None] | None:
        _, args = arguments(node, self.module)
        weight, bias = args["weight"], args.get("bias")
        features = shape_of(source)[axis]
        if axis != 1 or args.get("groups", 1) != features or args.get("transposed") or args["input"] is not source:
            return None
        if not self._own(weight) or shape_of(weight)[0] != features or not (bias is None or self._own(bias)):
            return None
        return ({weight: 0} if bias is None else {weight: 0, bias: 0}), None

    def _own(self, node: Any) -> bool:
        """Whether ``node`` is a weight that nothing else uses."""
        return isinstance(node, fx.Node) and self.flow.weight(node) and len(node.users) == 1

    def _maker(self, node: fx.Node) -> fx.Node | None:
        """The layer whose output ``node`` is, behind views and functions of each entry; None where there is none, or
        the output is used elsewhere too."""
        while len(node.users) == 1 and self.flow.signal(node):
            if node.target in self.layers or str(node.target) in self.layers:
                return node
            sources = node.all_input_nodes
            if len(sources) != 1 or not (is_function(node, sources[0], self.rules) or self._view(node, sources[0])):
                return None
            (node,) = sources
        return None

    def _view(self, node: fx.Node, source: fx.Node) -> bool:
        return isinstance(replay(node, torch.empty(shape_of(source), device="meta"), self.rules), torch.Tensor)

    def _indexed(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor | None:
        """The view that ``value[..., index, :]`` is for a constant index in one run (Falcon's ``[-2]``), else None."""
        args: Any = node.args
        axes = [a for a, index in enumerate(args[1]) if index is not None]
        index = self.constants.get(strip(args[1][axes[0]])) if len(axes) == 1 else None
        if index is None or index.is_meta or index.dtype != torch.int64 or index.dim() != 1 or not index.numel():
            return None
        (axis,) = axes
        places = (index % value.shape[axis]).tolist()
        if places != list(range(places[0], places[0] + len(places))):
            return None
        return value.narrow(axis, places[0], len(places))


def is_function(node: fx.Node, source: fx.Node, rules: RuleTable) -> bool:
    """Whether each entry of ``node`` is a function of that of ``source`` at its place, the same for all."""
    if node.op != "call_function" or node.all_input_nodes != [source] or shape_of(node) != shape_of(source):
        return False
    row = rules.get(node.target)
    return (node.target in SCALAR and source not in node.args[1:]) or (row is not None and row.pointwise)


def size(part: Slice, features: int) -> int:
    """How many features a part has."""
    return features // part.period * (part.stop - part.start)


def _overlap(parts: Parts, features: int) -> bool:
    indices = torch.arange(features)
    seen = torch.zeros(features, dtype=torch.int)
    for part in parts:
        seen[part.read(indices)] += 1
    return bool((seen > 1).any())

"""Pass: where values come from. Every node is a signal, a weight, or exogenous.

* *signal*: depends on a float input of the user or on data mixed with weights; it carries norms.
* *weight*: one parameter, seen through views, casts and reparametrisations (``1 + w``, ``-exp(w)``), before it meets a
  signal.
* *exogenous*: constants, buffers, integer inputs and whatever is computed from those alone (masks, positions, rotary
  tables); and what has no entries (the rows of a table beyond its last).

Assumes a functional graph. Promises: each node has exactly one kind; a parameter that meets another parameter or
enters an op that no weight-side op explains makes that op a signal (a *learned source*), never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import fx

from modnorm_fx.capture import Input
from modnorm_fx.rules import RuleTable, arguments, operands
from modnorm_fx.slices import take_slice

aten = torch.ops.aten


class Kind(Enum):
    SIGNAL = "signal"
    WEIGHT = "weight"
    EXOGENOUS = "exogenous"


@dataclass(frozen=True)
class Flow:
    """Kinds by node, and for every weight node the placeholder of its parameter."""

    kinds: dict[fx.Node, Kind]
    parameters: dict[fx.Node, fx.Node]

    def signal(self, node: fx.Node) -> bool:
        """A region that was cut out of the graph since counts as what it was cut out of: a signal."""
        return self.kinds.get(node, Kind.SIGNAL if node.op == "call_module" else None) is Kind.SIGNAL

    def weight(self, node: fx.Node) -> bool:
        return self.kinds.get(node) is Kind.WEIGHT

    def exogenous(self, node: fx.Node) -> bool:
        return self.kinds.get(node) is Kind.EXOGENOUS


#: ops with a weight and numbers (or exogenous tensors) that leave it one weight: ``1 + w``, ``-w``, ``w / 2``.
ARITHMETIC = frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.add.Scalar,
        aten.sub.Scalar,
        aten.rsub.Scalar,
        aten.mul.Scalar,
        aten.div.Scalar,
    }
)
#: ops that keep the entries and their order.
COPIES = frozenset(
    {
        aten.clone.default,
        aten.contiguous.default,
        aten._to_copy.default,
        aten.to.dtype,
        aten.alias.default,
        aten.detach.default,
    }
)


#: ops that read the shape of a tensor and not its entries.
SHAPE_ONLY = frozenset(
    {
        aten.zero.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
        aten.rand_like.default,
        aten.randn_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)


def is_float(node: fx.Node) -> bool:
    """Whether the node's value is (or contains) a floating-point tensor."""
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in value)
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _is_empty(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.numel() == 0


def classify_flow(module: fx.GraphModule, inputs: tuple[Input, ...], *, rules: RuleTable) -> Flow:
    """Gives every node its kind (see the module's docstring)."""
    kinds: dict[fx.Node, Kind] = {}
    parameters: dict[fx.Node, fx.Node] = {}
    for entry in inputs:
        if entry.kind == "parameter":
            kinds[entry.node], parameters[entry.node] = Kind.WEIGHT, entry.node
        elif entry.kind == "user" and is_float(entry.node):
            kinds[entry.node] = Kind.SIGNAL
        else:
            kinds[entry.node] = Kind.EXOGENOUS
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        sources = node.all_input_nodes
        outside = all(kinds[s] is Kind.EXOGENOUS for s in sources)
        if outside or not is_float(node) or node.target in SHAPE_ONLY or _is_empty(node):
            kinds[node] = Kind.EXOGENOUS
            continue
        weights = [s for s in sources if kinds[s] is Kind.WEIGHT]
        signals = [s for s in sources if kinds[s] is Kind.SIGNAL]
        if len(weights) == 1 and not signals and _keeps_weight(module, node, weights[0], rules):
            kinds[node], parameters[node] = Kind.WEIGHT, parameters[weights[0]]
        else:
            kinds[node] = Kind.SIGNAL
    return Flow(kinds, parameters)


def _keeps_weight(module: fx.GraphModule, node: fx.Node, weight: fx.Node, rules: RuleTable) -> bool:
    """Whether ``node`` only views, copies, looks up or transforms entries of the one weight it reads."""
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
        return True
    key, args = arguments(node, module)
    if key in COPIES or key in (aten.index.Tensor, take_slice):
        return True
    if key in ARITHMETIC:
        return [n for _, n in operands(args)].count(weight) == 1
    rule = rules.get(key)
    return rule is not None and (rule.view or rule.pointwise)

"""Pass (rewrite): a product with a parameter whose entries are then summed becomes the matrix product that it is.

``(x * w).sum(-1)`` is a layer with one output for each w, as ``x @ w`` is (the attention vectors of a GAT, capsules,
``(x[:, None] * W).sum(-1)``); ``(q * k).sum()`` of two parameters is a layer on a learned vector (the λ of differential
attention). Taken as a factor and a sum, n entries of size 1 would add up to √n.

Assumes a functional graph and its flow. Promises the same outputs, up to the order of the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from modnorm_fx.rules import RuleTable

from .canonicalize import CASTS, aten, is_call, shape, strip
from .flow import Flow

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def recognize_dots(module: fx.GraphModule, flow: Flow, *, rules: RuleTable) -> int:
    """Rewrites ``module`` in place and returns how many sums were found."""
    count = 0
    for node in list(module.graph.nodes):
        if not is_call(node, aten.sum.dim_IntList, aten.sum.default):
            continue
        product = strip(node.args[0])
        if not is_call(product, aten.mul.Tensor) or len(product.users) > 1 or node.kwargs.get("dtype") is not None:
            continue
        rank = len(shape(product))
        axes: Any = (*node.args, None)[1]
        summed = {int(a) % rank for a in axes or range(rank)}
        factors: Any = product.args
        if not all(isinstance(n, fx.Node) for n in factors):  # a weight times a number
            continue
        weights = [n for n in factors if flow.weight(n) and _seen(n, rules)]
        if any(_full(n, product, summed) for n in weights) and factors[0] is not factors[1]:
            _rewrite(module, node, product, summed, both=len(weights) == 2)
            count += 1
    if count:
        module.graph.eliminate_dead_code()
    return count


def _seen(node: fx.Node, rules: RuleTable) -> bool:
    """Whether a weight is the parameter itself, seen through views."""
    while node.op == "call_function":
        if not (is_call(node, *CASTS) or (node.target in rules and rules[node.target].view)):
            return False
        node = node.all_input_nodes[0]
    return True


def _full(factor: fx.Node, product: fx.Node, summed: set[int]) -> bool:
    """Whether the factor has an entry of its own for each that is summed."""
    shift = len(shape(product)) - len(shape(factor))
    return all(a >= shift and shape(factor)[a - shift] == shape(product)[a] for a in summed)


def _rewrite(module: fx.GraphModule, node: fx.Node, product: fx.Node, summed: set[int], *, both: bool) -> None:
    size, graph = shape(product), module.graph
    result = "".join(LETTERS[a] for a in range(len(size)) if a not in summed)
    factors: Any = product.args
    operands, terms = [], []

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        values = fx.map_arg(args, lambda n: torch.empty(shape(n), dtype=n.meta["val"].dtype, device="meta"))
        made.meta = dict(node.meta) | {"val": target(*values)}
        return made

    with graph.inserting_before(node):
        for factor in factors:
            shift = len(size) - len(shape(factor))
            spread = [a for a, n in enumerate(shape(factor)) if n == 1 and size[a + shift] > 1]
            terms.append("".join(LETTERS[a + shift] for a in range(len(shape(factor))) if a not in spread))
            operands.append(call(aten.squeeze.dims, factor, spread) if spread else factor)
        if both and not result and terms[0] == terms[1] and len(summed) == 1:
            row = call(aten.unsqueeze.default, operands[1], 0)
            out = call(aten.squeeze.dim, call(aten.linear.default, operands[0], row), 0)
        else:
            out = call(aten.einsum.default, f"{','.join(terms)}->{result}", operands)
        if len(node.args) > 2 and node.args[2]:
            for axis in sorted(summed):
                out = call(aten.unsqueeze.default, out, axis)
    node.replace_all_uses_with(out)
    graph.erase_node(node)

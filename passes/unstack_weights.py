"""Pass (rewrite): a product with a stack of parameters becomes one product for each of them.

``torch.einsum("btd,edf->btef", x, torch.stack([e.weight for e in experts]))`` uses each expert's matrix as a layer
does. Left as it is, the stack would be a learned value that the data are multiplied by, entry by entry.

Assumes a functional ATen graph and its flow. Promises the same outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from modnorm_fx.weight_atoms import einsum_labels

from .canonicalize import aten, is_call, shape, strip
from .flow import Flow

PRODUCTS = (aten.bmm.default, aten.matmul.default)
#: more are left as they are: the graph grows by one product for each
MOST = 64


def unstack_weights(module: fx.GraphModule, flow: Flow) -> int:
    """Rewrites ``module`` in place and returns how many products were taken apart."""
    count = 0
    for node in list(module.graph.nodes):
        if is_call(node, aten.einsum.default):
            tensors: Any = node.args[1]
            terms, result = einsum_labels(str(node.args[0]), [len(shape(t)) for t in tensors])
        elif is_call(node, *PRODUCTS) and len(shape(node)) >= 3:
            tensors = node.args[:2]
            terms, result = _as_einsum(*(len(shape(t)) for t in tensors))
        else:
            continue
        for tensor, term in zip(tensors, terms, strict=True):
            pieces = _pieces(tensor, flow)
            if pieces is None or len(set(term)) < len(term):
                continue
            label = term[_axis(_stack(tensor)[0])]
            sizes = {shape(t)[own.index(label)] for t, own in zip(tensors, terms, strict=True) if label in own}
            if sizes == {len(pieces)} and all(own.count(label) <= 1 for own in terms):
                _split(module, node, tensors, terms, result, label, len(pieces))
                count += 1
                break
    if count:
        module.graph.eliminate_dead_code()
    return count


def _as_einsum(left: int, right: int) -> tuple[list[str], str]:
    """A batched matrix product with axes from the right: ``..., k, i, j`` and ``..., k, j, l``."""
    batch = "zyxwvutsrq"[: max(left, right, 2) - 2]
    return [batch[len(batch) - left + 2 :] + "ij", batch[len(batch) - right + 2 :] + "jl"], batch + "il"


def _axis(stack: fx.Node) -> int:
    return int((*stack.args, 0)[1]) % len(shape(stack))  # type: ignore[arg-type]


def _stack(node: Any) -> tuple[Any, tuple[int, int] | None]:
    """The stack that a value is, and which two axes of the pieces are swapped since."""
    node = strip(node)
    if is_call(node, aten.transpose.int):
        args: Any = node.args
        stack = strip(args[0])
        swapped = sorted(int(a) % len(shape(node)) for a in args[1:])
        if is_call(stack, aten.stack.default) and _axis(stack) == 0 and swapped[0] > 0:
            return stack, (swapped[0] - 1, swapped[1] - 1)
    return node, None


def _pieces(node: Any, flow: Flow) -> list[fx.Node] | None:
    """The parameters that a stack is made of."""
    stack, _ = _stack(node)
    if not is_call(stack, aten.stack.default):
        return None
    pieces: Any = stack.args[0]
    return pieces if 2 <= len(pieces) <= MOST and all(flow.weight(n) for n in pieces) else None


def _split(
    module: fx.GraphModule, node: fx.Node, tensors: Any, terms: list[str], result: str, label: str, count: int
) -> None:
    graph = module.graph

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        values = fx.map_arg(args, lambda n: torch.empty(shape(n), dtype=n.meta["val"].dtype, device="meta"))
        made.meta = dict(node.meta) | {"val": target(*values)}
        return made

    def place(tensor: fx.Node, term: str, index: int) -> fx.Node:
        if label not in term:
            return tensor
        (stack, swapped), axis = _stack(tensor), term.index(label)
        if is_call(stack, aten.stack.default) and _axis(stack) == axis and tensor.meta["val"].dtype == _dtype(stack):
            pieces: Any = stack.args[0]
            return pieces[index] if swapped is None else call(aten.transpose.int, pieces[index], *swapped)
        return call(aten.select.int, tensor, axis, index)

    equation = ",".join(term.replace(label, "") for term in terms) + "->" + result.replace(label, "")
    with graph.inserting_before(node):
        parts = [
            call(
                aten.einsum.default,
                equation,
                [place(tensor, term, i) for tensor, term in zip(tensors, terms, strict=True)],
            )
            for i in range(count)
        ]
        if label in result:
            out = call(aten.stack.default, parts, result.index(label))
        else:
            out = parts[0]
            for part in parts[1:]:
                out = call(aten.add.Tensor, out, part)
    node.replace_all_uses_with(out)
    graph.erase_node(node)


def _dtype(stack: fx.Node) -> torch.dtype:
    pieces: Any = stack.args[0]
    return pieces[0].meta["val"].dtype

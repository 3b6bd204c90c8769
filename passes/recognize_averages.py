"""Pass (rewrite): averages of values that are no softmax attention become one call.

``(softmax(a) * v).sum(axis)`` (pooling with learned weights, a choice between branches) becomes ``weighted_average``;
``q (kᵀ [v, 1])`` with its last column divided out (linear attention over positive q and k) becomes
``linear_attention``. Taken one by one, the product and the sum would count n independent terms, √n, where the weights
sum to 1; and in linear attention q and k would count twice, once above and once below the line.

``x + γ (pool(x) - x)`` (a stream that is mixed by pooling, without a norm layer before) becomes ``smoothing``. The
terms cancel, and as independent ones they would make the stream grow by √3 in every block. So do those of ``x + a (y -
x)`` with a number, a learned number or a gate for a, which becomes ``interpolation``.

Assumes a functional graph, its flow, and that softmax attention was recognised. Promises the same outputs.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from modnorm_fx.regions import extract

from .canonicalize import CASTS, aten, is_call, number, shape, strip
from .flow import Flow
from .recognize_attention import MATMULS, SOFTMAX, VIEWS

POOLS = frozenset({aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default})
#: what the weights pass through on the way from the softmax
MOVES = (*VIEWS, aten.transpose.int, aten.permute.default, aten.flatten.using_ints, aten.unflatten.int)


def recognize_averages(module: fx.GraphModule, flow: Flow) -> int:
    """Rewrites ``module`` in place and returns how many averages were found."""
    nodes = list(module.graph.nodes)
    found = (_weighted, _linear_attention, _smoothing, _interpolation)
    return sum(any(recognize(module, node, flow) for recognize in found) for node in nodes)


def _weighted(module: fx.GraphModule, node: fx.Node, flow: Flow) -> bool:
    """``node`` sums a product over the axis along which one factor sums to 1."""
    args: Any = node.args
    if not is_call(node, aten.sum.dim_IntList) or len(args[1] or ()) != 1:
        return False
    product = strip(args[0])
    if not is_call(product, aten.mul.Tensor):
        return False
    size = shape(product)[args[1][0]]
    factors: Any = product.args
    for weights, value in (factors[:2], factors[1::-1]):
        softmax = strip(weights, *MOVES)
        if not is_call(softmax, *SOFTMAX) or not isinstance(value, fx.Node) or not flow.signal(value):
            continue
        along: Any = softmax.args[1]
        if size > 1 and shape(softmax)[along] == size == shape(value)[args[1][0]]:
            inside = [node, *([args[0]] if args[0] is not product else []), product]
            facts = {"axis": args[1][0] % len(shape(product))}
            extract(module, "weighted_average", inside, node, {"weights": weights, "value": value}, facts)
            return True
    return False


def _linear_attention(module: fx.GraphModule, node: fx.Node, flow: Flow) -> bool:
    """``node`` is a product ``q (kᵀ [v, 1])`` without its last column, over its last column."""
    if not is_call(node, aten.div.Tensor):
        return False
    inside: list[fx.Node] = [node]

    def through(n: Any, *targets: Any) -> Any:
        while is_call(n, *CASTS, *targets) and not isinstance((*n.args, None)[1], fx.Node):
            inside.append(n)
            n = n.args[0]
        return n

    above = through(node.args[0], aten.slice.Tensor)
    below = through(node.args[1], aten.slice.Tensor, aten.add.Tensor, aten.add.Scalar)
    if above is not below or not is_call(above, *MATMULS) or len(inside) < 4:
        return False
    context = through(above.args[1])
    if not is_call(context, *MATMULS):
        return False
    padded = through(context.args[1])
    if not is_call(padded, aten.constant_pad_nd.default, aten.pad.default):
        return False
    args: Any = padded.args
    amounts, fill = args[1], args[-1]
    if list(amounts) != [0, 1] or not (number(fill) and fill == 1):
        return False
    query, key, value = above.args[0], context.args[0], args[0]
    if not all(isinstance(n, fx.Node) and flow.signal(n) for n in (query, key, value)):
        return False
    inputs = {"query": query, "key": key, "value": value}
    extract(module, "linear_attention", [*inside, above, context, padded], node, inputs)
    return True


def _smoothing(module: fx.GraphModule, node: fx.Node, flow: Flow) -> bool:
    """``node`` adds to a value the difference of its averages over windows and itself, times a learned gain or not."""
    if not is_call(node, aten.add.Tensor) or node.kwargs or len(node.args) != 2:
        return False
    terms: Any = node.args
    for x, branch in (terms, terms[::-1]):
        if not isinstance(x, fx.Node) or not flow.signal(x):
            continue
        factors: Any = branch.args if is_call(branch, aten.mul.Tensor) else (branch, None)
        for difference, gain in (factors, factors[::-1]):
            if not is_call(difference, aten.sub.Tensor) or difference.kwargs or difference.args[1] is not x:
                continue
            pool: Any = difference.args[0]
            if not is_call(pool, *POOLS) or pool.args[0] is not x or shape(pool) != shape(x):
                continue
            if gain is not None and not (isinstance(gain, fx.Node) and not flow.signal(gain)):
                continue
            inputs = {"input": x} | ({} if gain is None else {"gain": gain})
            inside = [node, *([] if gain is None else [branch]), difference, pool]
            extract(module, "smoothing", inside, node, inputs, {"window": math.prod(_window(pool))})
            return True
    return False


def _interpolation(module: fx.GraphModule, node: fx.Node, flow: Flow) -> bool:
    """``node`` adds to a value a part of the way to another one."""
    if not is_call(node, aten.add.Tensor) or node.kwargs or len(node.args) != 2:
        return False
    terms: Any = node.args
    for x, branch in (terms, terms[::-1]):
        if not (isinstance(x, fx.Node) and flow.signal(x) and is_call(branch, aten.mul.Tensor, aten.mul.Scalar)):
            continue
        factors: Any = branch.args
        for difference, part in (factors, factors[::-1]):
            if not is_call(difference, aten.sub.Tensor) or difference.kwargs or difference.args[1] is not x:
                continue
            y: Any = difference.args[0]
            if not (isinstance(y, fx.Node) and flow.signal(y)) or len({shape(n) for n in (x, y, node)}) > 1:
                continue
            if not (isinstance(part, fx.Node) or number(part)) or part in (x, y):
                continue
            inputs, facts = ({"part": part}, {}) if isinstance(part, fx.Node) else ({}, {"part": part})
            inside = [node, branch, difference]
            extract(module, "interpolation", inside, node, {"input": x, "other": y} | inputs, facts)
            return True
    return False


def _window(pool: fx.Node) -> tuple[int, ...]:
    """Sizes of the windows of a pooling, one for each axis."""
    sizes: Any = pool.args[1]
    axes = int(str(pool.target).split("avg_pool")[1][0])
    given = tuple(sizes) if isinstance(sizes, list | tuple) else (sizes,)
    return given * (axes if len(given) == 1 else 1)

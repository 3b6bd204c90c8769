"""Pass (rewrite): softmax attention written out, ``softmax(q kᵀ · c + bias + mask) v``, becomes one call.

Products may be ``matmul``, ``bmm``, ``baddbmm`` or ``einsum``, the values on either side. Scales before or after the
mask, casts, dropout, views, exogenous masks and a subtracted maximum are looked through. A learned or computed bias
(relative positions, sinks joined to the logits as further columns) and a factor on the logits (a temperature) become
operands of the call; a soft cap ``c·tanh(logits/c)`` becomes a fact of it. Attention whose logits are mixed between
heads stays as it is: its parts have rules of their own that give the same numbers.

Assumes a functional graph and its flow. Promises the same outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from modnorm_fx.regions import extract

from .canonicalize import CASTS, aten, is_call, number, picked, shape
from .flow import Flow

MATMULS = (aten.matmul.default, aten.bmm.default)
SOFTMAX = (aten.softmax.int, aten._softmax.default)
VIEWS = (
    aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.reshape.default, aten.dropout.default,
    aten.unsqueeze.default, aten.squeeze.dim, *CASTS,
)  # fmt: skip
MASKS = (
    aten.add.Tensor, aten.sub.Tensor, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self,
    aten.where.ScalarOther, aten.where.ScalarSelf,
)  # fmt: skip
#: names of the biases of a region, in order; more of them than any model has
BIASES = ("bias", "bias1", "bias2", "bias3")


@dataclass(frozen=True)
class _Product:
    """A product of two signals: its operands, the axis of each that is summed over, what is added to it."""

    left: fx.Node
    right: fx.Node
    summed: tuple[int, int]
    added: fx.Node | None = None
    factor: float = 1.0


@dataclass
class _Scores:
    """The logits of an attention, found from the softmax upwards.

    Attributes:
        product: of query and key.
        factor: what the product is multiplied by in all.
        cap: bound that a tanh sets on the logits.
        biases: what is added, with its factor. temperatures: tensors that multiply.
        inside: the nodes of the logits.
    """

    product: _Product
    factor: float
    inside: list[fx.Node]
    cap: float | None = None
    biases: list[tuple[fx.Node, float]] = field(default_factory=list)
    temperatures: list[fx.Node] = field(default_factory=list)


def recognize_attention(module: fx.GraphModule, flow: Flow) -> int:
    """Rewrites ``module`` in place and returns how many attentions were found."""
    return sum(_attention(module, node, flow) for node in list(module.graph.nodes))


def _attention(module: fx.GraphModule, output: fx.Node, flow: Flow) -> bool:
    found = _averages(output, flow)
    if found is None:
        return False
    softmax, value, around = found
    scores = _scores(softmax.args[0], flow, 1.0)
    if scores is None or len(scores.temperatures) > 1 or len(scores.biases) > len(BIASES):
        return False
    inputs = {"query": scores.product.left, "key": scores.product.right, "value": value}
    inputs |= dict(zip(BIASES, (node for node, _ in scores.biases), strict=False))
    inputs |= dict(zip(("temperature",), scores.temperatures, strict=False))
    inside = {*around, *scores.inside}
    read = {source for node in inside for source in node.all_input_nodes} - inside - set(inputs.values())
    if not all(flow.exogenous(node) for node in read):
        return False
    facts = {
        "scale": scores.factor,
        "width": shape(scores.product.left)[scores.product.summed[0]],
        "summed": dict(zip(("query", "key"), scores.product.summed, strict=True)),
        "cap": scores.cap,
        "biases": dict(zip(BIASES, (factor for _, factor in scores.biases), strict=False)),
    }
    extract(module, "attention", inside, output, inputs, facts)
    return True


def _averages(output: fx.Node, flow: Flow) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """(softmax, value, nodes inside) where ``output`` sums values over the axis of a softmax."""
    pair = _operands(output)
    if pair is None:
        return None
    for weights, value, axis in ((pair[0], pair[1], pair[2]), (pair[1], pair[0], pair[3])):
        inside = [output]
        node: Any = weights
        axis %= len(shape(node))
        while is_call(node, *VIEWS, aten.slice.Tensor, aten.transpose.int):
            source: Any = node.args[0]
            if is_call(node, aten.transpose.int):
                axis = _transposed(node, axis)
            elif axis != len(shape(node)) - 1:
                break
            elif is_call(node, aten.slice.Tensor):  # columns that joined for the softmax alone (sinks)
                dim: Any = node.args[1] if len(node.args) > 1 else 0
                if dim % len(shape(node)) != axis:
                    break
            elif shape(node)[-1] != shape(source)[-1]:
                break
            else:
                axis = len(shape(source)) - 1
            inside.append(node)
            node = source
        if is_call(node, *SOFTMAX) and node.args[1] in (-1, axis) and axis == len(shape(node)) - 1:
            return (node, value, [*inside, node]) if flow.signal(value) else None
    return None


def _transposed(node: fx.Node, axis: int) -> int:
    """The axis of a transpose's input that is ``axis`` of its output."""
    rank = len(shape(node))
    a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
    return {a: b, b: a}.get(axis, axis)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, int, int] | None:
    """(left, right, the axis of each that is summed over) of a product of two tensors."""
    args: Any = node.args
    if is_call(node, *MATMULS):
        return (args[0], args[1], -1, -2) if min(len(shape(args[0])), len(shape(args[1]))) >= 2 else None
    if is_call(node, aten.baddbmm.default):
        return args[1], args[2], -1, -2
    if is_call(node, aten.einsum.default) and len(args[1]) == 2 and "." not in args[0]:
        terms, _, result = args[0].replace(" ", "").partition("->")
        left, _, right = terms.partition(",")
        summed = [letter for letter in left if letter in right and letter not in result]
        if result and len(summed) == 1:
            return (*args[1], left.index(summed[0]), right.index(summed[0]))
    return None


def _product(node: Any, flow: Flow) -> _Product | None:
    """The product of two signals that ``node`` is."""
    found = _operands(node) if isinstance(node, fx.Node) else None
    if found is None or not (flow.signal(found[0]) and flow.signal(found[1])):
        return None
    left, right, *summed = found
    if not is_call(node, aten.baddbmm.default):
        return _Product(left, right, (summed[0], summed[1]))
    beta, alpha = (float(node.kwargs.get(name, 1)) for name in ("beta", "alpha"))  # type: ignore[arg-type]
    added: Any = node.args[0] if beta else None
    return _Product(left, right, (summed[0], summed[1]), added, alpha)


def _scores(node: Any, flow: Flow, factor: float) -> _Scores | None:
    """The product of query and key that ``node`` is computed from; ``factor`` multiplies ``node`` further down."""
    product = _product(node, flow)
    if product is not None:
        biases = [] if product.added is None or flow.exogenous(product.added) else [(product.added, factor)]
        return _Scores(product, factor * product.factor, [node], biases=biases)
    if not isinstance(node, fx.Node) or node.op != "call_function" or not flow.signal(node):
        return None
    args: Any = node.args
    if is_call(node, *VIEWS):
        kept = shape(node)[-1] == shape(args[0])[-1]
        return _above(node, args[0], flow, factor) if kept else None
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar) and number(args[1]):
        return _above(node, args[0], flow, factor * float(args[1]))
    if is_call(node, aten.div.Tensor, aten.div.Scalar) and number(args[1]):
        return _above(node, args[0], flow, factor / float(args[1]))
    if is_call(node, aten.tanh.default):
        found = _above(node, args[0], flow, factor)
        if found is not None:
            found.cap = min(abs(factor), found.cap or abs(factor))
        return found
    if is_call(node, aten.sub.Tensor) and _maximum_of(args[1]) is args[0]:
        found = _above(node, args[0], flow, factor)
        if found is not None:
            found.inside += [n for n in (args[1], args[1].args[0]) if n is not args[0]]
        return found
    if is_call(node, aten.mul.Tensor):
        return _tempered(node, flow, factor)
    sources = list(args[0]) if is_call(node, aten.cat.default) else node.all_input_nodes
    if is_call(node, aten.cat.default) and int((args + (0,))[1]) % len(shape(node)) != len(shape(node)) - 1:
        return None
    if not is_call(node, *MASKS, aten.cat.default):
        return None
    learned = [source for source in sources if not flow.exogenous(source)]
    for i, source in enumerate(learned):
        found = _above(node, source, flow, factor)
        if found is not None:
            found.biases += [(other, factor) for other in learned[:i] + learned[i + 1 :]]
            return found
    return None


def _above(node: fx.Node, source: Any, flow: Flow, factor: float) -> _Scores | None:
    found = _scores(source, flow, factor)
    if found is not None:
        found.inside.append(node)
    return found


def _tempered(node: fx.Node, flow: Flow, factor: float) -> _Scores | None:
    """Logits times a tensor: one number for all, or one for each head."""
    args: Any = node.args
    for source, other in ((args[0], args[1]), (args[1], args[0])):
        if isinstance(other, fx.Node) and set(shape(other)[-2:]) <= {1}:
            found = _above(node, source, flow, factor)
            if found is not None:
                found.temperatures += [] if flow.exogenous(other) else [other]
                return found
    return None


def _maximum_of(node: Any) -> Any:
    """What ``node`` is the largest entry of, along the last axis."""
    node = picked(node, 0, aten.max.dim)
    if is_call(node, aten.amax.default, aten.max.dim):
        dim: Any = node.args[1] if len(node.args) > 1 else None
        return node.args[0] if dim in (-1, [-1]) else None
    return None

"""Pass (rewrite): norm layers written out by hand become one call.

``x * rsqrt(mean(x²) + ε)``, ``x / sqrt(mean(x²) + ε)``, ``x / ‖x‖`` become ``rms_norm``; ``(x - mean) / sqrt(var +
ε)`` becomes ``layer_norm``; ``x - mean(x)`` becomes ``mean_subtract``; ``x * ‖x‖ / mean(‖x‖)`` (ConvNeXt v2's
global response normalisation) becomes ``response_norm``. Axes and epsilons may stand anywhere; casts are looked
through.

Assumes a functional ATen graph. Promises the same outputs (the region runs the ops it was cut from). Without it the
product rule counts x twice, see theory of local rules.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from modnorm_fx.regions import extract

from .canonicalize import CASTS, aten, is_call, number, picked, shape, strip

ROOTS = {aten.rsqrt.default: -0.5, aten.sqrt.default: 0.5, aten.reciprocal.default: -1.0}
KEEPS = (aten.clamp_min.default, aten.clamp.default, aten.expand.default, aten.maximum.default)
MEANS = (aten.mean.dim, aten.sum.dim_IntList)
NORMS = (aten.linalg_vector_norm.default, aten.linalg_norm.default, aten.norm.ScalarOpt_dim, aten.norm.Scalar)
VARIANCES = (aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim)
SUMS = (aten.add.Tensor, aten.add.Scalar)
SCALARS = (*SUMS, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
#: return (variance, mean)
BOTH = (aten.var_mean.correction, aten.var_mean.dim)
#: the most that may be added to a statistic without a change of its meaning; x / (1 + |x|) is no norm layer
EPSILON = 1e-2


def recognize_norms(module: fx.GraphModule) -> int:
    """Rewrites ``module`` in place and returns how many norm layers were found."""
    count = 0
    for node in list(module.graph.nodes):
        if is_call(node, aten.sub.Tensor):
            count += _mean_subtract(module, node)
    for node in list(module.graph.nodes):
        if is_call(node, aten.mul.Tensor, aten.div.Tensor):
            count += _divide_by_rms(module, node) or _rescale(module, node)
    return count


def _mean_subtract(module: fx.GraphModule, node: fx.Node) -> bool:
    args: Any = node.args
    x, m = args[:2]
    mean = picked(strip(m, aten.expand.default), 1, *BOTH)
    if not is_call(mean, aten.mean.dim, *BOTH) or strip(mean.args[0]) is not strip(x):
        return False
    if node.kwargs.get("alpha", 1) != 1:
        return False
    inside = _between(node, x)
    extract(module, "mean_subtract", inside, node, {"input": x}, {"axes": _axes(mean)})
    return True


def _divide_by_rms(module: fx.GraphModule, node: fx.Node) -> bool:
    """``node`` is a product or quotient of x with something computed from a statistic of x."""
    args: Any = node.args
    left, right = args[:2]
    pairs = [(left, right)] if is_call(node, aten.div.Tensor) else [(left, right), (right, left)]
    wanted = 1.0 if is_call(node, aten.div.Tensor) else -1.0
    for x, factor in pairs:
        found = _statistic(factor)
        if found is None or not isinstance(x, fx.Node):
            continue
        statistic, exponent, constant, over = found
        centred = _centred_input(module, x)
        if centred is not None and _centred_input(module, over) is centred:
            over = centred  # the mean was subtracted twice: once for the statistic, once for the signal
        if over is not strip(x) and over is not centred:
            continue
        power = exponent * (1 if _is_root(statistic) else 2)  # of the root mean square
        if not math.isclose(power, wanted):
            continue
        start = _entry(x, over, centred)
        scale = constant**-wanted * _output_scale(statistic, shape(x))
        extract(module, "layer_norm" if centred is over else "rms_norm", _between(node, start), node, {"input": start},
                {"axes": _axes(statistic), "scale": scale})  # fmt: skip
        return True
    return False


def _rescale(module: fx.GraphModule, node: fx.Node) -> bool:
    """``node`` is x times norms of x over their mean, which do not depend on the size of x."""
    args: Any = node.args
    if not is_call(node, aten.mul.Tensor):
        return False
    for x, factor in ((args[0], args[1]), (args[1], args[0])):
        ratio = strip(factor)
        if not isinstance(x, fx.Node) or not is_call(ratio, aten.div.Tensor):
            continue
        norms, mean = ratio.args
        while is_call(mean, *CASTS, *SUMS) and not isinstance((*mean.args, None)[1], fx.Node):
            mean = mean.args[0]
        if not is_call(mean, aten.mean.dim) or strip(mean.args[0]) is not strip(norms):
            continue
        found = _statistic(norms)
        if found is not None and found[3] is strip(x):
            extract(module, "response_norm", _between(node, strip(x)), node, {"input": strip(x)})
            return True
    return False


def _is_region(module: fx.GraphModule, node: Any, kind: str) -> bool:
    return (
        isinstance(node, fx.Node) and node.op == "call_module" and module.get_submodule(str(node.target)).kind == kind
    )


def _statistic(node: Any) -> tuple[fx.Node, float, float, Any] | None:
    """Walks a factor back to a mean square, variance or norm: (that node, exponent of it, constant factor, what it is
    taken of)."""
    exponent, constant = 1.0, 1.0
    while isinstance(node, fx.Node) and node.op == "call_function":
        node = picked(strip(node), 0, *BOTH)
        if _is_variance(node):
            node = strip(node.args[0])  # the mean of squares
        if is_call(node, *MEANS):
            squared = strip(node.args[0])
            base = _squared(squared)
            return None if base is None else (node, exponent, constant, strip(base))
        if is_call(node, *NORMS, *VARIANCES, *BOTH):
            if is_call(node, *NORMS) and node.args[1:2] not in ((), (None,), (2,), (2.0,)):
                return None
            return node, exponent, constant, strip(node.args[0])
        if node.target in ROOTS:
            exponent *= ROOTS[node.target]
        elif is_call(node, aten.pow.Tensor_Scalar):
            power: Any = node.args[1]
            exponent *= float(power)
        elif is_call(node, *KEEPS):
            pass
        elif is_call(node, *SCALARS) and number(node.args[1]):
            value: Any = node.args[1]
            if is_call(node, *SUMS) and abs(value) > EPSILON or not is_call(node, *SUMS) and value <= 0:
                return None
            if not is_call(node, *SUMS):  # a constant factor, such as 1/√n
                constant *= value ** (exponent if is_call(node, aten.mul.Tensor, aten.mul.Scalar) else -exponent)
        else:
            return None
        node = node.args[0]
    return None


def _is_variance(node: Any) -> bool:
    """``mean(x²) - mean(x)²``."""
    if not is_call(node, aten.sub.Tensor):
        return False
    squares, square = strip(node.args[0]), _squared(strip(node.args[1]))
    mean = strip(square)
    if not is_call(squares, aten.mean.dim) or not is_call(mean, aten.mean.dim) or node.kwargs.get("alpha", 1) != 1:
        return False
    base = _squared(strip(squares.args[0]))
    return base is not None and strip(base) is strip(mean.args[0]) and _axes(squares) == _axes(mean)


def _squared(node: Any) -> Any:
    if is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        return node.args[0]
    if is_call(node, aten.square.default):
        return node.args[0]
    if is_call(node, aten.mul.Tensor) and node.args[0] is node.args[1]:
        return node.args[0]
    return None


def _centred_input(module: fx.GraphModule, x: Any) -> Any:
    """If x is ``y - mean(y)``, y (stripped); the variance of y is then the mean square of x."""
    x = strip(x)
    return strip(x.args[0]) if _is_region(module, x, "mean_subtract") else None


def _entry(x: fx.Node, over: Any, centred: Any) -> fx.Node:
    """The node the region starts from: what both the signal and its statistic are computed from."""
    return over if isinstance(over, fx.Node) else x


def _is_root(node: fx.Node) -> bool:
    return is_call(node, *NORMS, aten.std.correction, aten.std.dim)


def _axes(node: fx.Node) -> list[int]:
    args: Any = node.args[1:]
    dim: Any = node.kwargs.get("dim")
    return [int(a) for a in next((value for value in args if isinstance(value, list | tuple)), dim or [])]


def _output_scale(statistic: fx.Node, x: tuple[int, ...]) -> float:
    """RMS of the result: 1 after division by a root *mean* square, 1/√n after division by a norm over n entries."""
    if is_call(statistic, aten.sum.dim_IntList, *NORMS):
        axes = _axes(statistic)
        return 1 / math.sqrt(math.prod(x[a] for a in axes) if axes else math.prod(x))
    return 1.0


def _between(output: fx.Node, start: fx.Node) -> list[fx.Node]:
    """Nodes on paths from ``start`` to ``output``, output included (everything else they read is a number)."""
    inside: dict[fx.Node, bool] = {start: True}

    def reaches(node: fx.Node) -> bool:
        if node not in inside:
            inside[node] = False
            if node > start:
                inside[node] = any([reaches(source) for source in node.all_input_nodes])
        return inside[node]

    reaches(output)
    return [node for node, yes in inside.items() if yes and node is not start]

"""Pass: which signs the entries of each value may have.

Decays are exponentials of what is never positive: ``exp(-exp(A_log)·softplus(dt))`` lies in (0, 1], whatever the sizes
of the two factors. A rule that sees only a size would integrate exp over both half lines, and a recurrence over the
result would grow without bound. Signs settle it: those of products and sums follow from the operands', functions of one
operand are run on a grid of it, and two idioms are known: the difference of two places of one running sum is the sum
between them (the half that runs backwards in time is masked out), and ``x - max(x)`` is never positive.

Assumes a functional graph. Promises a :class:`Sign` for every float node whose entries cannot have any sign.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from modnorm_fx.quadrature import Sign
from modnorm_fx.rules import RuleTable, arguments, operands

from .canonicalize import CASTS, aten, is_call, number
from .flow import ARITHMETIC, is_float
from .measure_constants import UNSET

#: places at which a function of one operand is tried; both signs, zero too
GRID = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-6, 6, 97, dtype=torch.float64)])
#: ops whose entries are sums, averages or a choice of those of their first operand
KEEPERS = CASTS | {
    aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default, aten.cumsum.default, aten.amax.default,
    aten.amin.default, aten.max.dim, aten.min.dim, aten.avg_pool1d.default, aten.avg_pool2d.default, aten.topk.default,
    aten.sort.default, aten.max_pool2d.default, aten.tril.default, aten.triu.default, aten.repeat.default,
    aten.roll.default, aten.flip.default, aten.gather.default, aten.index.Tensor, aten.index_select.default,
    aten.repeat_interleave.self_int, aten.dropout.default, aten.detach.default, "shares",
}  # fmt: skip
#: ops whose entries are each one of one operand
JOINERS = frozenset({
    aten.cat.default, aten.concatenate.default, aten.stack.default, aten.where.self, aten.where.ScalarOther,
    aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.constant_pad_nd.default,
    aten.pad.default, aten.maximum.default, aten.minimum.default, aten.max.other, aten.min.other, aten.add.Tensor,
    aten.select_scatter.default, aten.slice_scatter.default, aten.index_put.default, aten.copy.default,
})  # fmt: skip
PRODUCTS = frozenset({
    aten.mul.Tensor, aten.div.Tensor, aten.matmul.default, aten.bmm.default, aten.mm.default, aten.einsum.default,
})  # fmt: skip
POWERS = frozenset({aten.cumprod.default, aten.prod.dim_int, aten.prod.default})
NEVER_NEGATIVE = frozenset({
    aten.softmax.int, aten._softmax.default, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.var.dim,
    aten.var.correction, aten.ones.default, aten.ones_like.default, aten.new_ones.default, aten.rand_like.default,
})  # fmt: skip
ZEROS = UNSET | {aten.zero.default, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
FILLED = frozenset({aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default})
VIEWS = CASTS | {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.transpose.int, aten.permute.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.select.int,
    aten.split.Tensor, aten.unbind.int, aten.unflatten.int, aten.flatten.using_ints, operator.getitem,
}  # fmt: skip
LARGEST = frozenset({aten.amax.default, aten.max.dim, aten.logsumexp.default})
LARGER = frozenset({aten.maximum.default, aten.max.other})


def known_signs(module: fx.GraphModule, *, rules: RuleTable) -> dict[fx.Node, Sign]:
    """The sign of every node where it is known; nodes that may have any sign are left out."""
    signs: dict[fx.Node, Sign] = {}
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "output") and is_float(node):
            sign = _of(module, node, signs, rules)
            if sign is not Sign.ANY:
                signs[node] = sign
    return signs


def _of(module: fx.GraphModule, node: fx.Node, signs: Mapping[fx.Node, Sign], rules: RuleTable) -> Sign:
    key, args = arguments(node, module)
    if key is operator.getitem:
        return _sign(node.args[0], signs)
    if key in ZEROS:
        return Sign(0)
    if key in NEVER_NEGATIVE:
        return Sign.POSITIVE
    if key in FILLED:
        return _sign(args.get("fill_value", args.get("s")), signs)
    found = [n for _, n in operands(args)]
    row = rules.get(key)
    if key in KEEPERS or (row is not None and row.view):
        return _sign(found[0], signs)
    if key is aten.sub.Tensor:
        return _difference(args["self"], args["other"], signs)
    if key in PRODUCTS and len(found) > 1:
        square = key in (aten.mul.Tensor, aten.div.Tensor) and len(set(found)) == 1
        return Sign.POSITIVE if square else _product(found, signs)
    if key in POWERS:
        return Sign.POSITIVE if _sign(found[0], signs) is Sign.POSITIVE else Sign.ANY
    if key in JOINERS and not (len(found) == 1 and key in ARITHMETIC):
        return _union(key, args, signs)
    if key == "pointwise" or key in ARITHMETIC or (row is not None and row.pointwise):
        return _tried(module, node, signs) if len(set(found)) == 1 else Sign.ANY
    return Sign.ANY


def _sign(value: Any, signs: Mapping[fx.Node, Sign]) -> Sign:
    """Of an operand: a node, a number, or something without entries."""
    if isinstance(value, fx.Node):
        return signs.get(value, Sign.ANY) if is_float(value) else Sign.ANY
    if number(value):
        return Sign.POSITIVE if value > 0 else Sign.NEGATIVE if value < 0 else Sign(0)
    return Sign(0)


def _product(factors: list[fx.Node], signs: Mapping[fx.Node, Sign]) -> Sign:
    sign = Sign.POSITIVE
    for factor in factors:
        sign = sign.times(_mask_or(factor, signs))
    return sign


def _mask_or(factor: fx.Node, signs: Mapping[fx.Node, Sign]) -> Sign:
    """A mask multiplies by 0 or 1."""
    value = factor.meta.get("val")
    return Sign.POSITIVE if getattr(value, "dtype", None) is torch.bool else _sign(factor, signs)


def _union(key: Any, args: Mapping[str, Any], signs: Mapping[fx.Node, Sign]) -> Sign:
    """Every entry is that of one operand, a number among them, or the sum of one from each."""
    values: list[Any] = [v for n, v in args.items() if n in ("self", "other", "src", "tensors", "values", "value")]
    if key is aten.pad.default and args["value"] is None:
        values.append(0.0)
    if (args.get("alpha") or 1) < 0:
        return Sign.ANY
    sign = Sign(0)
    for value in values:
        for item in value if isinstance(value, list | tuple) else (value,):
            sign |= _where_branch(args, item) or _sign(item, signs)
    return sign


def _where_branch(args: Mapping[str, Any], item: Any) -> Sign | None:
    """``where(x > 20, x, ...)`` reads x only where it is positive."""
    condition = args.get("condition")
    if item is not args.get("self") or not is_call(condition, aten.gt.Scalar, aten.ge.Scalar):
        return None
    place: Any = condition.args[1]
    return Sign.POSITIVE if condition.args[0] is item and place >= 0 else None


def _tried(module: fx.GraphModule, node: fx.Node, signs: Mapping[fx.Node, Sign]) -> Sign:
    """The signs that a function of one operand takes on a grid of the operand's sign."""
    source = node.all_input_nodes[0]
    given = _sign(source, signs)
    halves = [half for half, sign in ((GRID, Sign.POSITIVE), (-GRID, Sign.NEGATIVE)) if sign in given]
    grid = torch.cat([*halves, GRID[:1]])
    target: Any = module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: grid)
    try:
        with torch.no_grad():
            values = target(*args, **kwargs)
    except Exception:  # it is only tried: a function that does not run on a vector has no known sign
        return Sign.ANY
    values = values[~values.isnan()] if isinstance(values, torch.Tensor) and not values.is_complex() else GRID[:0]
    if not values.numel():
        return Sign.ANY
    positive = Sign.POSITIVE if bool((values > 0).any()) else Sign(0)
    return positive | (Sign.NEGATIVE if bool((values < 0).any()) else Sign(0))


def _difference(a: Any, b: Any, signs: Mapping[fx.Node, Sign]) -> Sign:
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        running = _viewed(a)
        if is_call(running, aten.cumsum.default) and running is _viewed(b):
            return _sign(running, signs)
        if _dominates(b, a):
            return Sign.NEGATIVE
    return _sign(a, signs) | _sign(b, signs).flipped()


def _viewed(node: fx.Node) -> fx.Node:
    """What ``node`` shows a part or an arrangement of."""
    while is_call(node, *VIEWS):
        node = node.all_input_nodes[0]
    return node


def _dominates(bound: fx.Node, value: fx.Node, depth: int = 4) -> bool:
    """Whether ``bound`` is a maximum over entries of ``value``, or of it and others."""
    bound = _viewed(bound)
    if is_call(bound, *LARGEST):
        inner: Any = bound.args[0]
        return _same(_viewed(inner), _viewed(value))
    if is_call(bound, *LARGER) and depth:
        return any(_same(_viewed(n), _viewed(value)) or _dominates(n, value, depth - 1) for n in bound.all_input_nodes)
    return False


def _same(a: Any, b: Any, depth: int = 3) -> bool:
    """Whether two nodes compute the same: one node, or the same op on the same operands."""
    if a is b or not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return a is b or (not isinstance(a, fx.Node) and not isinstance(b, fx.Node) and a == b)
    if depth == 0 or a.op != "call_function" or a.target is not b.target or len(a.args) != len(b.args):
        return False
    return a.kwargs == b.kwargs and all(_same(x, y, depth - 1) for x, y in zip(a.args, b.args, strict=True))

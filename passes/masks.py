"""Which operands are masks: a large number that is added to logits, or stands in their place, decides which entries
count, and is not the size of a signal.

A mask of booleans needs none of this. One of numbers, ``scores + (1 - mask) * -1e9``, is told by its size and by where
it comes from: it depends on no parameter. That holds for constants of the graph (``measure_constants``) as for what is
computed from a float input (``propagate_scales``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from modnorm_fx.rules import Operand, arguments, operands

from .canonicalize import aten
from .flow import Flow

#: entries below this are masks; where they are added or chosen, also those above minus this
MASK = -1e4
#: operands that are added to others, or of which an entry is taken in place of another's
CHOOSING: Mapping[Any, frozenset[str]] = {
    op: frozenset(names.split())
    for names, ops in {
        "self other": (
            aten.add.Tensor, aten.sub.Tensor, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf,
            aten.maximum.default, aten.minimum.default, aten.fmax.default, aten.fmin.default,
        ),
        "min max": (aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor),
        "self": (
            aten.addmm.default, aten.baddbmm.default, aten.addbmm.default, aten.addmv.default, aten.addr.default,
            aten.addcmul.default, aten.addcdiv.default,
        ),
        "self src": (
            aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default,
            aten.as_strided_scatter.default, aten.scatter.src,
        ),
        "self source": (aten.masked_scatter.default, aten.index_copy.default),
        "self values": (aten.index_put.default,),
        "tensors": (aten.cat.default, aten.stack.default),
    }.items()
    for op in ops
}  # fmt: skip


def masks(
    node: fx.Node, found: Sequence[tuple[Operand, fx.Node]], scales: Mapping[fx.Node, float], learned: set[fx.Node]
) -> set[fx.Node]:
    """Which of the operands ``found`` of a node act as masks there: signals of ``scales`` that depend on no parameter
    and are beyond MASK, beside one that is ``learned``."""
    names = CHOOSING.get(node.target, frozenset())
    if not names or not any(n in learned for _, n in found):
        return set()
    return {n for op, n in found if op[0] in names and n not in learned and scales.get(n, 0.0) > -MASK}


def only_chooses(module: fx.GraphModule, node: fx.Node, flow: Flow) -> bool:
    """Whether every op that reads the constant ``node`` beside a signal or a weight adds it or chooses between them."""
    users = [u for u in node.users if u.op == "call_function" and not flow.exogenous(u)]
    return bool(users) and all(
        op[0] in CHOOSING.get(user.target, frozenset())
        for user in users
        for op, n in operands(arguments(user, module)[1])
        if n is node
    )

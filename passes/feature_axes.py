"""Pass: which axes of each value are features, the rest being positions (batch, token, pixel).

Needed where an op treats the two differently: joining along features is not joining along positions, and a vector
added along features is a bias where one added along positions is a table. Heads and head size are both features.

Assumes shapes on every node. Promises a set of axes for every float node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from modnorm_fx.rules import RuleTable, arguments, operands, shape_of
from modnorm_fx.weight_atoms import einsum_labels

from .canonicalize import aten
from .flow import Flow, is_float

CONVS = frozenset(
    {
        aten.convolution.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
        aten.conv2d.padding, aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
    }
)  # fmt: skip
LINEARS = frozenset(
    {
        aten.linear.default, aten.addmm.default, aten.embedding.default, aten.embedding_bag.default,
        aten.embedding_bag.padding_idx, aten.bilinear.default,
    }
)  # fmt: skip
MATMULS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})
RESHAPES = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int}
)
MOVES = frozenset(
    {aten.transpose.int, aten.t.default, aten.permute.default, aten.swapaxes.default, aten.movedim.intlist}
)
SPATIAL = frozenset(
    {
        aten.batch_norm.default,
        aten._native_batch_norm_legit_no_training.default,
        aten.group_norm.default,
        aten.instance_norm.default,
    }
)

Axes = frozenset[int]


def feature_axes(module: fx.GraphModule, flow: Flow, *, rules: RuleTable) -> dict[fx.Node, Axes]:
    """Feature axes per float node."""
    axes: dict[fx.Node, Axes] = {}
    for node in module.graph.nodes:
        if node.op == "output" or not is_float(node):
            continue
        try:
            rank = len(shape_of(node))
        except AttributeError:
            continue
        if node.op == "placeholder":
            channels = _channels(node, rank) if rank >= 3 and flow.signal(node) else rank - 1
            axes[node] = frozenset({channels} if rank else ())
        else:
            axes[node] = frozenset(a for a in _of(module, node, axes, flow) if 0 <= a < rank)
    return axes


def _channels(node: fx.Node, rank: int) -> int:
    """The axis of an input that the first convolution on its way takes for channels, else the last."""
    seen: set[fx.Node] = set()
    todo = [(user, tuple(range(rank))) for user in node.users]
    while todo and len(seen) < 50:
        user, order = todo.pop()  # order: the axis of the input behind each axis of the value
        if user in seen:
            continue
        seen.add(user)
        if user.target in CONVS:
            return order[1]
        if user.target in MOVES and len(shape_of(user)) == rank:
            places = [_moved(user, user.all_input_nodes[0], frozenset({a})) for a in range(rank)]
            order = tuple(order[places.index(frozenset({b}))] for b in range(rank))
        if user.target not in LINEARS:
            todo.extend((after, order) for after in user.users)
    return rank - 1


def _of(module: fx.GraphModule, node: fx.Node, axes: dict[fx.Node, Axes], flow: Flow) -> Axes:
    key, args = arguments(node, module)
    rank = len(shape_of(node))
    last = frozenset({rank - 1})
    inputs = [n for _, n in operands(args) if n in axes and not flow.weight(n)] or [
        n for _, n in operands(args) if n in axes
    ]
    if not inputs or key in LINEARS:
        return last
    if key in CONVS or key in SPATIAL:
        return frozenset({1 if rank > 2 else rank - 2}) if rank > 1 else last
    source = inputs[0]
    before, x = shape_of(source), axes[source]
    if key in RESHAPES:
        return regroup(before, shape_of(node), x)
    if key in MOVES:
        return _moved(node, source, x)
    if key is aten.unsqueeze.default:
        at = int(args["dim"]) % rank
        return frozenset(a + (a >= at) for a in x)
    if len(before) > rank and "dim" in args or key in (aten.squeeze.dims, aten.squeeze.default):  # indices, reductions
        return _dropped(before, rank, args, x)
    if key is aten.stack.default:
        at = int(args["dim"] or 0) % rank
        return frozenset(a + (a >= at) for a in x)
    if key is aten.einsum.default:
        return _labelled(args, rank, axes, flow) or last
    if key in (aten.im2col.default, aten.col2im.default):
        return frozenset({rank - (2 if key is aten.im2col.default else 3)})
    if key in (aten.baddbmm.default, aten.addbmm.default):
        return frozenset({rank - 1})
    if key is aten.view_as_real.default:
        return x | {rank - 1} if rank - 2 in x else x
    if key is aten.view_as_complex.default:
        return frozenset(a for a in x if a < rank) or last
    if key in MATMULS and len(inputs) > 1:
        right = axes[inputs[1]]
        shift = rank - len(shape_of(inputs[1]))
        return frozenset(a + rank - len(before) for a in x if a != len(before) - 1) | frozenset(
            a + shift for a in right if a == len(shape_of(inputs[1])) - 1
        )
    if key == "weighted_average":
        gone, value = args["region"].facts["axis"], args["value"]
        dropped = len(shape_of(value)) > rank
        return frozenset(a - (dropped and a > gone) for a in axes[value] if not (dropped and a == gone))
    if key in ("attention", "linear_attention") or key is aten.scaled_dot_product_attention.default:
        value = args["value"]
        return axes[value]
    # pointwise and the like: broadcasting aligns axes from the right
    out: set[int] = set()
    for n in inputs:
        shift = rank - len(shape_of(n))
        out |= {a + shift for a in axes[n] if shape_of(n)[a] > 1 or len(inputs) == 1}
    return frozenset(out) or last


def _labelled(args: Mapping[str, Any], rank: int, axes: Mapping[fx.Node, Axes], flow: Flow) -> Axes:
    """Axes of an einsum whose label is one of features in an operand, or of outputs of a weight."""
    tensors: Any = args["tensors"]
    terms, result = einsum_labels(str(args["equation"]), [len(shape_of(t)) for t in tensors])
    labels: set[str] = set()
    for tensor, term in zip(tensors, terms, strict=True):
        others = {label for t, own in zip(tensors, terms, strict=True) if t is not tensor for label in own}
        if flow.weight(tensor):
            labels |= set(term) - others
        else:
            labels |= {term[a] for a in axes.get(tensor, ()) if a < len(term)}
    return frozenset(a for a, label in enumerate(result[:rank]) if label in labels)


def regroup(before: tuple[int, ...], after: tuple[int, ...], axes: Axes) -> Axes:
    """Feature axes after a reshape: axes are grouped where running products agree; a group is features if a part of
    it was."""
    if 0 in before:
        return frozenset({len(after) - 1})
    out: set[int] = set()
    i = j = 0
    while i < len(before) and j < len(after):
        left, right, old, new = before[i], after[j], [i], [j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left *= before[i]
                old.append(i)
                i += 1
            else:
                right *= after[j]
                new.append(j)
                j += 1
        real = [a for a in old if before[a] > 1] or old
        if any(a in axes for a in real):
            out |= {b for b in new if after[b] > 1} or set(new)
    return frozenset(out)


def _moved(node: fx.Node, source: fx.Node, axes: Axes) -> Axes:
    """Runs the permutation on a tensor whose sizes are axis numbers."""
    rank = len(shape_of(source))
    probe = torch.empty([a + 1 for a in range(rank)], device="meta")
    move: Any = node.target
    moved = move(probe, *node.args[1:], **node.kwargs)
    return frozenset(b for b, size in enumerate(moved.shape) if size - 1 in axes)


def _dropped(before: tuple[int, ...], rank: int, args: Mapping[str, Any], axes: Axes) -> Axes:
    dim = args.get("dim")
    if len(before) == rank:  # keepdim
        return axes
    if dim is None:
        gone = {a for a, n in enumerate(before) if n == 1}
    else:
        gone = {int(d) % len(before) for d in (dim if isinstance(dim, list | tuple) else [dim])}
    kept = [a for a in range(len(before)) if a not in gone]
    return frozenset(i for i, a in enumerate(kept) if a in axes)

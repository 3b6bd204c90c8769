"""Pass: which atom each weight is, from the op that consumes it (never from its name or shape alone).

Assumes bindings and feature axes. Promises one :class:`Weight` per parameter slice, with all its uses; slices of one
parameter are disjoint. Failures are collected and raised together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from modnorm_fx import weight_atoms
from modnorm_fx.atoms import Atom, Scalar, Slice, Table
from modnorm_fx.capture import where
from modnorm_fx.errors import WeightError
from modnorm_fx.rules import AtomFunction, Operand, RuleTable, arguments, operand_at, operands, shape_of
from modnorm_fx.slices import take_slice
from modnorm_fx.weight_atoms import Site, einsum_labels

from .bind_weights import Affine, WeightUse, resolve
from .canonicalize import CASTS, aten, is_call
from .flow import Flow

#: what logits pass through on the way to the softmax
TO_SOFTMAX = CASTS | {
    aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.masked_fill.Scalar, aten.where.self,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.view.default, aten._unsafe_view.default, aten.expand.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.permute.default, aten.transpose.int, aten.slice.Tensor,
    aten.tanh.default, aten.constant_pad_nd.default, aten.pad.default, aten.embedding.default,
}  # fmt: skip
#: roles in which a weight is one factor of a product
FACTORS = frozenset(
    {
        weight_atoms.linear,
        weight_atoms.linear_transposed,
        weight_atoms.conv,
        weight_atoms.matmul_left,
        weight_atoms.matmul_right,
    }
)
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
#: ops that write over a part of what they are given
WRITES = frozenset({aten.slice_scatter.default, aten.select_scatter.default, aten.index_put.default})


@dataclass(frozen=True)
class Weight:
    """One slice of one parameter: its atom at each use.

    Attributes:
        key: qualified name with the slices in Python notation.
        parameter, slices, shape: what it is a part of, and its own shape.
        uses: (node, operand, atom) in graph order.
        sampled: whether a use has no rule, so that its atom is only ``Scalar`` and its gain an estimate.
        affine: for each use, the map ``shift + factor·w`` between what is stored and what is used.
    """

    key: str
    parameter: str
    slices: tuple[Slice, ...]
    shape: tuple[int, ...]
    uses: tuple[tuple[fx.Node, Operand, Atom], ...]
    sampled: bool = False
    affine: tuple[Affine, ...] = ()


def type_atoms(
    module: fx.GraphModule,
    uses: tuple[WeightUse, ...],
    flow: Flow,
    axes: dict[fx.Node, frozenset[int]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rules: RuleTable,
    unknown: str,
) -> tuple[Weight, ...]:
    """The weights in order of first use, a layer's matrix before its bias.

    A parameter whose uses overlap otherwise than the rows of a table is one sampled weight under ``unknown="sample"``.

    Raises WeightError naming every parameter that no atom describes.
    """
    weights: dict[tuple[str, tuple[Slice, ...]], Weight] = {}
    failures: list[str] = []
    for use in (resolve(u) for u in uses):
        key, args = arguments(use.node, module)
        rule = rules.get(key)
        site = Site(
            use.node,
            args,
            use.shape,
            use.view,
            use.through,
            axes.get(use.node, frozenset()),
            logits=feeds_softmax(use.node),
            rate=_feeds_softplus(use.node, module, rules),
            index=use.operand[1],
            apart=_kept_apart(use.node, flow, rules) if key is aten.einsum.default else frozenset(),
        )
        sampled = False
        try:
            if rule is None:
                raise WeightError(f"there is no rule for {use.node.target}")
            roles = args["region"].facts["weights"] if key == "computed_weight" else rule.weights
            role = roles.get(use.operand[0], weight_atoms.source)
            if role is weight_atoms.joined or (role is weight_atoms.table and use.node.target in WRITES):
                role = _role_of_joined(use.node, module, rules) or role
            if (
                "index" in use.through
                and role in FACTORS
                and use.view.dim() < min(2, len(shape_of(operand_at(args, use.operand))))
            ):
                raise WeightError(
                    "an index that depends on data makes a matrix of its entries",
                    why="its norm depends on which of them stand where",
                    do="pass unknown='sample' to estimate its effect",
                )
            atom = role(site)
        except WeightError as error:
            sampled = unknown == "sample"
            atom = Scalar(use.shape)
            if not sampled:
                place = where(use.node)
                failures.append(
                    f"{use.parameter}: {error.what}"
                    + (f" at {place}" if place else "")
                    + (f" ({error.why})" if error.why else "")
                )
        identity = (use.parameter, use.slices)
        known = weights.get(identity)
        if known is None:
            known = Weight(_name(use, shapes[use.parameter]), use.parameter, use.slices, use.shape, ())
        weights[identity] = replace(
            known,
            uses=known.uses + ((use.node, use.operand, atom),),
            sampled=known.sampled or sampled,
            affine=known.affine + (use.affine,),
        )
    by_parameter: dict[str, list[Weight]] = {}
    for weight in weights.values():
        by_parameter.setdefault(weight.parameter, []).append(weight)
    found: list[Weight] = []
    for name, parts in by_parameter.items():
        parts = _whole_tables(parts, shapes[name])
        if unknown == "sample" and _overlaps(parts):
            parts = [_joined(parts, Scalar(shapes[name]), sampled=True)]
        failures += _overlaps(parts)
        found += parts
    found.sort(key=lambda w: (w.uses[0][0], not w.uses[0][2].is_matrix))
    if failures:
        raise WeightError(
            "No atom describes the use of "
            + ("this parameter:" if len(failures) == 1 else f"these {len(failures)} parameters:")
            + "".join(f"\n    {line}" for line in failures),
            do="Pass unknown='sample' to estimate their effect, or add a rule (see CONTRIBUTING.md).",
        )  # fmt: skip
    return tuple(found)


def _role_of_joined(node: fx.Node, module: fx.GraphModule, rules: RuleTable) -> AtomFunction | None:
    """The role of vectors joined to a bias or a gain of one layer (q, none for k, and v), or of one of which a part is
    written over: a layer's, if all users give it the same."""
    found: set[AtomFunction | None] = set()
    for user in node.users:
        key, args = arguments(user, module) if user.op != "output" else (None, {})
        row = rules.get(key)
        if key is take_slice or key in CASTS or key in WRITES or (row is not None and row.view):
            found.add(_role_of_joined(user, module, rules))
        elif row is not None:
            found |= {row.weights.get(op[0]) for op, n in operands(args) if n is node}
        else:
            found.add(None)
    (role,) = found if len(found) == 1 else (None,)
    return role if role in (weight_atoms.bias, weight_atoms.gain) else None


def _name(use: WeightUse, shape: tuple[int, ...]) -> str:
    """The parameter's name with its slices in Python notation."""
    text, sizes = use.parameter, list(shape)
    for part in use.slices:
        text += part.text(sizes[part.axis])
        sizes[part.axis] = sizes[part.axis] // part.period * (part.stop - part.start)
    return text


def feeds_softmax(node: fx.Node, depth: int = 12) -> bool:
    """Whether the value ends in attention weights: a softmax reached through sums, masks and views, or an attention
    mask."""
    if node.target in SOFTMAX:
        return True
    if depth == 0 or node.target not in TO_SOFTMAX:
        return False
    for user in node.users:
        if user.target is aten.scaled_dot_product_attention.default and (
            node in user.args[3:4] or user.kwargs.get("attn_mask") is node
        ):
            return True
        if user.op == "call_module" and str(user.target).startswith("attention") and node in user.args[3:]:
            return True  # a bias of attention that was written out
        if feeds_softmax(user, depth - 1):
            return True
    return False


def _kept_apart(node: fx.Node, flow: Flow, rules: RuleTable) -> frozenset[int]:
    """Axes of an einsum's output along which a later product has a matrix of its own for each place: experts."""
    found: set[int] = set()
    size, todo = node.meta["val"].shape, [node]
    for value in todo:
        for user in value.users:
            row = rules.get(user.target)
            moved = user.op == "call_module" or is_call(user, *CASTS, aten.mul.Tensor)
            if moved or (row is not None and row.pointwise):
                if getattr(user.meta.get("val"), "shape", None) == size and user not in todo:
                    todo.append(user)
            elif is_call(user, aten.einsum.default):
                tensors: Any = user.args[1]
                terms, result = einsum_labels(str(user.args[0]), [t.meta["val"].dim() for t in tensors])
                own = terms[tensors.index(value)]
                later = {label for t, term in zip(tensors, terms, strict=True) if flow.weight(t) for label in term}
                found |= {a for a, label in enumerate(own) if label in later and label in result}
            elif is_call(user, aten.bmm.default, aten.matmul.default):
                other: Any = user.args[1]
                if user.args[0] is value and flow.weight(other) and other.meta["val"].dim() == len(size) > 2:
                    found |= {a for a in range(len(size) - 2) if other.meta["val"].shape[a] == size[a] > 1}
    return frozenset(found)


def _feeds_softplus(node: fx.Node, module: fx.GraphModule, rules: RuleTable) -> bool:
    """Whether the value goes to a softplus, by itself or at the start of a longer function, through views."""
    for user in node.users:
        if user.op == "call_module":
            body: Any = getattr(module.get_submodule(str(user.target)), "body", None)
            if body is not None and _starts_with_softplus(next(iter(body.graph.nodes))):
                return True
        elif is_call(user, aten.softplus.default):
            return True
        elif is_call(user, *CASTS) or (user.target in rules and rules[user.target].view):
            if _feeds_softplus(user, module, rules):
                return True
    return False


def _starts_with_softplus(start: fx.Node) -> bool:
    """Softplus of a region's input, or ``log(1 + exp(x))``."""
    if any(is_call(n, aten.softplus.default) for n in start.users):
        return True
    exps = [n for n in start.users if is_call(n, aten.exp.default)]
    sums = [n for e in exps for n in e.users if is_call(n, aten.add.Tensor, aten.add.Scalar)]
    return any(is_call(n, aten.log.default) for s in sums for n in s.users) or any(
        is_call(n, aten.log1p.default) for e in exps for n in e.users
    )


def _whole_tables(parts: list[Weight], shape: tuple[int, ...]) -> list[Weight]:
    """The parts of one parameter; a table that is used in overlapping runs of rows, or of which the example inputs
    reach only the first rows, is the whole table at each use: its rows are pieces of their own."""
    short = len(parts) == 1 and len(parts[0].slices) == 1 and parts[0].slices[0].start == 0
    atoms = {atom for w in parts for _, _, atom in w.uses}
    features = {tuple(a % len(shape) for a in atom.feature_axes) for atom in atoms if isinstance(atom, Table)}
    rows = all(len(w.slices) <= 1 and all(isinstance(atom, Table) for _, _, atom in w.uses) for w in parts)
    if not (short or _overlaps(parts)) or not rows or len(features) != 1:
        return parts
    (axes,) = features
    if any(w.slices and w.slices[0].axis in axes for w in parts):
        return parts
    return [_joined(parts, Table(shape, feature_axes=axes), sampled=any(w.sampled for w in parts))]


def _joined(parts: list[Weight], whole: Atom, *, sampled: bool) -> Weight:
    """One weight of all parts of a parameter, which is the atom ``whole`` at each of their uses."""
    name = parts[0].parameter
    uses = tuple((node, operand, whole) for w in parts for node, operand, _ in w.uses)
    affine = tuple(a for w in parts for a in w.affine)
    return Weight(name, name, (), whole.shape, uses, sampled, affine)


def _overlaps(parts: list[Weight]) -> list[str]:
    """Uses of one parameter that overlap: whole and in slices, or in overlapping slices of different axes."""
    return [
        f"{a.parameter}: used as {a.key} and as {b.key}, which overlap"
        for i, a in enumerate(parts)
        for b in parts[i + 1 :]
        if not _disjoint(a.slices, b.slices)
    ]


def _disjoint(a: tuple[Slice, ...], b: tuple[Slice, ...]) -> bool:
    for x, y in zip(a, b, strict=False):
        if (x.axis, x.period) != (y.axis, y.period):
            return False
        if x.stop <= y.start or y.stop <= x.start:
            return True
        if (x.start, x.stop) != (y.start, y.stop):
            return False
    return False

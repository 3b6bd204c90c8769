"""From the use of a weight to its atom: one short function per role that rules name in their ``weights``.

To add a role, copy a neighbour: it gets a :class:`Site` and returns an Atom, or raises WeightError saying what it
cannot describe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .atoms import (
    Atom,
    Bias,
    Conv,
    Embedding,
    Experts,
    Gain,
    GateBias,
    Gates,
    Linear,
    LogitBias,
    PatchConv,
    Reshaped,
    Scalar,
    Table,
)
from .errors import WeightError

__all__ = ["Site"]

#: maps under which a weight is still that weight, up to a number that multiplies it and one that is added
HARMLESS = frozenset({"add", "sub", "rsub", "neg", "index", "mul", "div"})


@dataclass(frozen=True)
class Site:
    """Where and how a weight is used.

    Attributes:
        node, args: the op that uses it, and its arguments by schema name.
        shape: shape of the part of the parameter that is used.
        view: the operand as a meta tensor over that part: sizes and strides are its arrangement, stride 0 a broadcast.
        through: reparametrisations on the way.
        features: feature axes of the op's output.
        logits: whether the output goes to a softmax over attention logits.
        rate: whether the output goes to a softplus, which makes a rate or a time step of it.
        index: which of a list of operands it is.
        apart: axes of the output along which a later product has a matrix of its own for each place.
    """

    node: fx.Node
    args: Mapping[str, Any]
    shape: tuple[int, ...]
    view: torch.Tensor
    through: tuple[str, ...]
    features: frozenset[int]
    logits: bool
    rate: bool = False
    index: int | None = None
    apart: frozenset[int] = frozenset()

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.view.shape)

    @property
    def is_whole(self) -> bool:
        return self.size == self.shape and self.view.is_contiguous()

    def arranged(self, make: Callable[[tuple[int, ...]], Atom]) -> Atom:
        """``make(shape)`` for the operand as the op sees it, wrapped in the arrangement of the stored entries if they
        differ."""
        if self.is_whole:
            return make(self.shape)
        if 0 in self.view.stride() and self.view.numel() > 1:
            return make(self.shape)
        strides = self.view.stride()
        order = sorted(range(self.view.dim()), key=lambda d: (self.view.shape[d] > 1, -strides[d]))
        stored = tuple(self.size[d] for d in order)
        return Reshaped(
            shape=self.shape,
            inner=make(self.size),
            stored=stored,
            permute=tuple(order.index(d) for d in range(len(order))),
        )

    def refuse_maps(self, what: str) -> None:
        curved = [t for t in self.through if t not in HARMLESS]
        if curved:
            raise WeightError(
                f"a {what} weight passes through {', '.join(curved)} before it meets the data",
                why="its norm would be that of another matrix than the one stored",
                do="pass unknown='sample' to estimate its effect",
            )


def _matrix(site: Site, transposed: bool) -> Atom:
    """A matrix operand of shape [out, in], or [in, out] when ``transposed``; more leading axes are a stack of
    matrices."""
    site.refuse_maps("matrix")
    if site.view.dim() == 1:
        return Gain(site.shape) if transposed else Bias(site.shape)
    if site.view.dim() > 2:
        atom = site.arranged(lambda shape: Experts((math.prod(shape[:-2]), *shape[-2:]), transposed=transposed))
        return atom if atom.shape == site.shape else Reshaped(atom, site.shape)
    if len(site.shape) == 2 and site.size == site.shape[::-1] and site.view.t().is_contiguous():
        return Linear(site.shape, transposed=not transposed)
    return site.arranged(lambda shape: Linear(shape, transposed=transposed))


def linear(site: Site) -> Atom:
    """``linear(x, W)``, W: [out, in]."""
    return _matrix(site, transposed=False)


def linear_transposed(site: Site) -> Atom:
    """``addmm(b, x, W)``, W: [in, out] (GPT-2's Conv1D)."""
    return _matrix(site, transposed=True)


def matmul_left(site: Site) -> Atom:
    """``W @ x``, W: [..., out, in]."""
    return _matrix(site, transposed=False)


def matmul_right(site: Site) -> Atom:
    """``x @ W``, W: [..., in, out]."""
    return _matrix(site, transposed=True)


def einsum_labels(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The labels of each operand's axes and of the result's, a private letter for every axis of an ellipsis."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    hidden = [rank - len(t.replace("...", "")) if "..." in t else 0 for t, rank in zip(terms, ranks, strict=True)]
    wide = max(hidden)
    dots = "".join(chr(0x100 + i) for i in range(wide))
    if not arrow:
        result = ("..." if wide else "") + "".join(sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1))
    filled = [term.replace("...", dots[wide - own :]) for term, own in zip(terms, hidden, strict=True)]
    return filled, result.replace("...", dots)


def contracted(site: Site) -> Atom:
    """A weight in an einsum. Its axes that are summed are inputs; of the others those that the other operands have too
    count matrices side by side, as do those that a later product keeps apart, and the rest are outputs. With neither
    inputs nor outputs it is a factor."""
    tensors: Any = site.args["tensors"]
    terms, result = einsum_labels(str(site.args["equation"]), [t.meta["val"].dim() for t in tensors])
    own = terms[site.index or 0]
    if "index" in site.through and site.is_whole and len(site.shape) == 2 and own[-1] not in result:
        return Linear(site.shape)  # rows are looked up: the outputs of one matrix
    if len(own) != site.view.dim():
        raise WeightError("its entries are looked up before an einsum")
    others = {label for i, term in enumerate(terms) if i != site.index for label in term}
    others |= {result[a] for a in site.apart if a < len(result)}
    if len(set(own)) < len(own) or (0 in site.view.stride() and site.view.numel() > 1):
        raise WeightError("its axes are repeated in an einsum")
    into = [d for d, label in enumerate(own) if label not in result]
    batch = [d for d, label in enumerate(own) if label in result and label in others]
    out = [d for d, label in enumerate(own) if label in result and label not in others]
    if not into and not out:
        return multiplied(site)
    site.refuse_maps("matrix")
    transposed = not site.view.permute(batch + out + into).is_contiguous()
    last = (into, out) if transposed else (out, into)
    count, *sizes = (math.prod(site.size[d] for d in axes) for axes in (batch, *last))
    kind, shape = (Experts, (count, *sizes)) if batch else (Linear, tuple(sizes))
    matrix = kind(shape, transposed=transposed)
    atom = replace(site, view=site.view.permute(batch + last[0] + last[1])).arranged(lambda _: matrix)
    return atom if atom.shape == site.shape else Reshaped(atom, site.shape)


def bilinear(site: Site) -> Atom:
    """``x W y``, W: [out, in, in]: a matrix on products of entries."""
    site.refuse_maps("bilinear")
    flat = Linear((site.size[0], math.prod(site.size[1:])))
    atom = site.arranged(lambda _: flat)
    return atom if atom.shape == site.shape else Reshaped(atom, site.shape)


def conv(site: Site) -> Atom:
    """Any convolution; stride = kernel without padding is a Linear on flattened patches."""
    site.refuse_maps("convolution")
    args, kernel = site.args, site.size[2:]
    groups = int(args.get("groups") or 1)
    spread = spread_of(site.node, args, len(kernel))
    patches = (
        _per_axis(args, "stride", 1, len(kernel)) == tuple(kernel)
        and not any(_per_axis(args, "padding", 0, len(kernel)))
        and set(_per_axis(args, "dilation", 1, len(kernel))) == {1}
    )
    if patches and groups == 1 and spread is None and any(k > 1 for k in kernel):
        return site.arranged(PatchConv)
    stride = spread if spread and max(spread) > 1 else None
    return site.arranged(lambda shape: Conv(shape, groups=groups, transposed=spread is not None, stride=stride))


def spread_of(node: fx.Node, args: Mapping[str, Any], axes: int) -> tuple[int, ...] | None:
    """Of a transposed convolution, every which tap along each axis meets in one output; None for others.

    Stride s and dilation d: taps i and j meet where s divides d(i - j).
    """
    if not args.get("transposed") and "conv_transpose" not in str(node.target):
        return None
    pairs = zip(_per_axis(args, "stride", 1, axes), _per_axis(args, "dilation", 1, axes), strict=True)
    return tuple(stride // math.gcd(stride, dilation) for stride, dilation in pairs)


def _per_axis(args: Mapping[str, Any], name: str, default: int, axes: int) -> tuple[int, ...]:
    value = args.get(name)
    if isinstance(value, str):
        return (0 if value == "valid" else -1,) * axes
    value = list(value) if isinstance(value, list | tuple) else [default if value is None else value]
    return tuple(int(v) for v in value) * (axes if len(value) == 1 else 1)


def embedding(site: Site) -> Atom:
    """Rows looked up, or entries of a table of logit biases (T5's buckets)."""
    if site.logits:
        return LogitBias(site.shape)
    site.refuse_maps("lookup")
    return site.arranged(Embedding)


def gates(site: Site) -> Atom:
    """A parameter of a recurrent layer: the gates' matrices ``[G·H, in]`` or biases ``[G·H]``, or the projection
    ``[P, H]`` of an LSTM."""
    site.refuse_maps("recurrent")
    states: Any = site.args["hx"]
    hidden = (states[-1] if isinstance(states, list | tuple) else states).meta["val"].shape[-1]
    count = site.size[0] // hidden
    if len(site.size) == 1:
        return GateBias(site.shape, gates=count) if count > 1 else Bias(site.shape)
    if count > 1:
        return site.arranged(lambda shape: Gates(shape, gates=count))
    return _matrix(site, transposed=False)


def gain(site: Site) -> Atom:
    """The weight of a norm layer."""
    return Gain(site.shape)


def bias(site: Site) -> Atom:
    """The bias of a layer: one vector over features. That of a rate (``dt_proj.bias``) has a value with a meaning."""
    return Scalar(site.shape) if site.rate else Bias(site.shape)


def logit_bias(site: Site) -> Atom:
    """Added to attention logits."""
    return LogitBias(site.shape)


def multiplied(site: Site) -> Atom:
    """An elementwise factor."""
    curved = any(t not in HARMLESS for t in site.through)
    return Scalar(site.shape) if curved or _count(site.shape) == 1 else Gain(site.shape)


def added(site: Site) -> Atom:
    """An added vector (bias), table with position axes, or logit bias."""
    if site.logits:
        return LogitBias(site.shape)
    if site.rate or any(t not in HARMLESS for t in site.through):
        return Scalar(site.shape)
    positions = [d for d in _varying(site) if d not in _aligned_features(site)]
    return table(site) if positions else Bias(site.shape)


def joined(site: Site) -> Atom:
    """Concatenated along positions: class tokens, registers, memory."""
    return table(site)


def looked_up(site: Site) -> Atom:
    """``W[index]``: rows, or entries of a table of logit biases."""
    return LogitBias(site.shape) if site.logits else site.arranged(Embedding) if len(site.size) == 2 else table(site)


def table(site: Site) -> Atom:
    """A table: rows are positions, the operand's feature axes are features. A single number has neither."""
    if not site.shape:
        return Scalar(site.shape)
    varying = _varying(site)
    features = [d for d in varying if d in _aligned_features(site)] or varying[-1:]
    whole = torch.empty(site.shape, device="meta")
    axes = []
    for d in features:
        match = [
            a
            for a, (n, s) in enumerate(zip(whole.shape, whole.stride(), strict=True))
            if s == site.view.stride(d) and n == site.size[d]
        ]
        if not match:
            return site.arranged(lambda shape: Table(shape, feature_axes=tuple(features)))
        axes.append(match[0])
    return Table(site.shape, feature_axes=tuple(axes) or (len(site.shape) - 1,))


def source(site: Site) -> Atom:
    """A parameter that feeds an ordinary op as an input would (learned queries, latents): a table over its last
    axis."""
    if not site.shape or any(t not in HARMLESS for t in site.through):
        return Scalar(site.shape)
    return Table(site.shape, feature_axes=(len(site.shape) - 1,))


def _varying(site: Site) -> list[int]:
    """Axes of the operand along which its entries differ."""
    return [d for d, (n, s) in enumerate(zip(site.size, site.view.stride(), strict=True)) if n > 1 and s > 0]


def _aligned_features(site: Site) -> set[int]:
    """Feature axes of the output, counted in the operand's axes (broadcasting aligns from the right)."""
    shift = len(site.node.meta["val"].shape) - len(site.size)
    return {a - shift for a in site.features}


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()

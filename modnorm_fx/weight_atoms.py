"""From the use of a weight to its atom: one short function per role that rules name in their ``weights``.

To add a role, copy a neighbour: it gets a :class:`Site` and returns an Atom, or raises WeightError saying what it
cannot describe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .atoms import Atom, Bias, Conv, Embedding, Experts, Gain, Linear, LogitBias, PatchConv, Reshaped, Scalar, Table
from .errors import WeightError

__all__ = ["Site"]

#: reparametrisations under which a matrix is still that matrix, up to a shift or a sign
HARMLESS = frozenset({"add", "sub", "rsub", "neg", "index"})


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
    """

    node: fx.Node
    args: Mapping[str, Any]
    shape: tuple[int, ...]
    view: torch.Tensor
    through: tuple[str, ...]
    features: frozenset[int]
    logits: bool

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
    if site.view.dim() > 2 and any(n > 1 for n in site.size[:-2]):
        if len(site.size) == 3:
            return site.arranged(lambda shape: Experts(shape, transposed=transposed))
        raise WeightError(f"a stack of matrices of shape {list(site.size)} has more than one leading axis")
    if len(site.shape) == 2 and site.size == site.shape[::-1] and site.view.t().is_contiguous():
        return Linear(site.shape, transposed=not transposed)
    if site.view.dim() == 2:
        return site.arranged(lambda shape: Linear(shape, transposed=transposed))
    raise WeightError(f"a matrix of shape {list(site.size)} has leading axes")


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


def conv(site: Site) -> Atom:
    """Any convolution; stride = kernel without padding is a Linear on flattened patches."""
    site.refuse_maps("convolution")
    args, kernel = site.args, site.size[2:]
    groups = int(args.get("groups") or 1)
    transposed = bool(args.get("transposed")) or "conv_transpose" in str(site.node.target)

    def per_axis(name: str, default: int) -> tuple[int, ...]:
        value = args.get(name)
        if isinstance(value, str):
            return (0 if value == "valid" else -1,) * len(kernel)
        value = list(value) if isinstance(value, list | tuple) else [default if value is None else value]
        return tuple(int(v) for v in value) * (len(kernel) if len(value) == 1 else 1)

    patches = (
        per_axis("stride", 1) == tuple(kernel)
        and not any(per_axis("padding", 0))
        and set(per_axis("dilation", 1)) == {1}
    )
    if patches and groups == 1 and not transposed and any(k > 1 for k in kernel):
        return site.arranged(PatchConv)
    return site.arranged(lambda shape: Conv(shape, groups=groups, transposed=transposed))


def embedding(site: Site) -> Atom:
    """Rows looked up."""
    site.refuse_maps("lookup")
    return site.arranged(Embedding)


def gain(site: Site) -> Atom:
    """The weight of a norm layer."""
    return Gain(site.shape)


def bias(site: Site) -> Atom:
    """The bias of a layer: one vector over features."""
    return Bias(site.shape)


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
    if any(t not in HARMLESS for t in site.through):
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
    """A table: rows are positions, the operand's feature axes are features."""
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
    return Table(site.shape, feature_axes=(len(site.shape) - 1,)) if site.shape else Scalar(site.shape)


def _varying(site: Site) -> list[int]:
    """Axes of the operand along which its entries differ."""
    return [d for d, (n, s) in enumerate(zip(site.size, site.view.stride(), strict=True)) if n > 1 and s > 0]


def _aligned_features(site: Site) -> set[int]:
    """Feature axes of the output, counted in the operand's axes (broadcasting aligns from the right)."""
    shift = len(site.node.meta["val"].shape) - len(site.size)
    return {a - shift for a in site.features}


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()

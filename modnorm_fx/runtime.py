"""What generated normalisers call, and the rest of the arithmetic behind the atoms: no geometry, only tensors.

Most functions work on a stack `[n, *shape]` of n equally shaped updates. Inputs may be float16 or bfloat16; sums are
accumulated in float32. Spectral norms are those of `spectral_norm`, whose functions are also found here.

Meant for updates of ordinary size: entries beyond 1e18 in magnitude overflow to a norm of infinity (and from there to
NaN in the update, which the optimizer refuses), and an update whose norm is below `TINY` counts as zero.

Paper: section 3 and the appendix (normalisation of whole updates).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from . import kernels
from .errors import NonFiniteError, OptimizerError
from .kernels import cpu
from .spectral_norm import (
    BLOCK,
    DITHER,
    TINY,
    dither,
    largest_eigenvalue,
    polar_factor,
    power_iteration,
    probe,
    ritz,
    semi_orthogonal,
    spectral_norms,
    start_vectors,
    working,
)

__all__ = [
    "BLOCK",
    "Line",
    "PIECE_CAP",
    "TINY",
    "check",
    "exact",
    "factors",
    "largest",
    "largest_eigenvalue",
    "matrix_factors",
    "most",
    "not_finite",
    "orthogonal",
    "piece_factors",
    "polar_factor",
    "power_iteration",
    "probe",
    "put_",
    "ritz",
    "row_rms",
    "run",
    "semi_orthogonal",
    "sign",
    "spectral",
    "spectral_norms",
    "start_vectors",
    "take",
    "working",
]

PIECE_CAP = 10.0
"""A piece (tap, row, expert) is never scaled up by more than this many times the factor of the largest piece."""


def row_rms(x: Tensor, axes: tuple[int, ...] = (-1,)) -> Tensor:
    """Root mean square over `axes`, which are kept with size 1."""
    if x.dim() == 3 and axes == (2,) and (gpu := kernels.triton_for(x)) is not None:
        return gpu.row_rms(x)[..., None]
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return torch.linalg.vector_norm(working(x), dim=axes, keepdim=True) / count**0.5


def piece_factors(norms: Tensor, target: float | Tensor, cap: float = PIECE_CAP) -> Tensor:
    """Factors, shaped like `norms`, that bring every piece to `target`; at most `cap` times that of the largest piece.

    If everything is zero (below `TINY`) all factors are 0; a norm that is NaN or infinite makes all factors NaN.
    """
    largest = norms.max()
    factors = target / torch.maximum(norms, largest / cap)
    factors = torch.where(largest > TINY, factors, 0.0)
    return torch.where(largest.isfinite(), factors, torch.nan)


# What generated normalisers call: n equally shaped updates at once, stacked along the first axis ----------------------


class Line(NamedTuple):
    """What one line of a generated normaliser measures: the same part of every update of a bucket.

    Attributes:
        bucket: which stack of updates.
        places: the part of an update, as nested slices (axis, start, stop, period); () for all of it.
        decays: whether weight decay acts on it.
        targets: leaf key -> norm of its update in a step of lr 1, in the order of the stack.
        declared: leaf key -> norm that its weights are declared to have, of leaves that decay and where it is not 1.
    """

    bucket: int
    places: tuple[tuple[int, int, int, int], ...]
    decays: bool
    targets: dict[str, float]
    declared: Mapping[str, float] = MappingProxyType({})

    @property
    def shrinkage(self) -> tuple[float, ...]:
        """The part of each leaf that a step of lr 1 with weight decay 1 takes away: its update's norm over its own."""
        return tuple(self.decays * t / self.declared.get(key, 1.0) for key, t in self.targets.items())


def run(
    factors: Callable[..., tuple[list[Tensor], list[Tensor]]],
    names: Sequence[Sequence[str]],
    shapes: Sequence[tuple[int, ...]],
    lines: Sequence[Line],
    updates: Mapping[str, Tensor],
    vectors: Sequence[Tensor | None],
    target: float,
) -> list[Tensor]:
    """Stacks `updates`, runs the generated `factors` on them, scales and puts them back; returns the power vectors.

    Raises, before anything is changed: OptimizerError if updates are missing, unknown or of another shape,
    NonFiniteError if one holds NaN or infinity.
    """
    check(names, shapes, updates)
    stacks = [torch.stack([updates[name] for name in bucket]) for bucket in names]
    targets = [
        target * torch.tensor(list(line.targets.values()), dtype=working(x[:0]).dtype.to_real(), device=x.device)
        for line in lines
        for x in (stacks[line.bucket],)
    ]
    found, fresh = factors(stacks, vectors, targets)
    scaled = [x * factor for x, factor in zip(stacks, found, strict=True)]
    if not torch.nn.utils.get_total_norm(scaled, float("inf")).isfinite():
        pairs = [pair for bucket, x in zip(names, scaled, strict=True) for pair in zip(bucket, x, strict=True)]
        raise not_finite([name for name, x in pairs if not x.isfinite().all()])
    for bucket, x in zip(names, scaled, strict=True):
        for name, update in zip(bucket, x, strict=True):
            updates[name].copy_(update)
    return fresh


def check(names: Sequence[Sequence[str]], shapes: Sequence[tuple[int, ...]], updates: Mapping[str, Tensor]) -> None:
    """Raises OptimizerError unless `updates` has the names and shapes that a normaliser was generated for."""
    wanted = {name: tuple(shape) for bucket, shape in zip(names, shapes, strict=True) for name in bucket}
    missing, unknown = [n for n in wanted if n not in updates], [n for n in updates if n not in wanted]
    if missing or unknown:
        name, what = (missing[0], "no update of") if missing else (unknown[0], "an update it does not know,")
        raise OptimizerError(
            f"The normaliser got {what} {name}.",
            why=f"{len(missing)} of its {len(wanted)} weights are missing, {len(unknown)} names are not among them",
            do="pass an update of every weight that has a norm, by its name in the model, and no others",
        )
    for name, shape in wanted.items():
        if tuple(updates[name].shape) != shape:
            raise OptimizerError(
                f"The update of {name} has shape {list(updates[name].shape)}.",
                why=f"the normaliser was generated for {list(shape)}",
                do="generate it again for this model",
            )


def not_finite(names: Sequence[str]) -> NonFiniteError:
    """The error for updates that cannot be scaled."""
    others = f" (and of {len(names) - 1} other weights)" if len(names) > 1 else ""
    return NonFiniteError(
        f"The update of {names[0] if names else 'a weight'}{others} holds NaN or infinity, or is too large to square.",
        why="no scaling makes it finite; nothing was changed",
        do="find where it comes from",
    )


def spectral(matrices: Tensor, vectors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Largest singular values of `[n, R, C]` (`[n]`) or `[n, P, R, C]` (`[n, P]`), and new power vectors `[n·P, k, C]`.

    One warm step of power iteration; without vectors, as many as it takes from a fixed start.
    """
    flat = matrices if matrices.dim() == 3 else matrices.flatten(0, -3)
    if flat.is_cpu and flat.stride(-1) != 1:  # as the kernel reads it
        flat = flat.contiguous()
    estimate, vectors = power_iteration(flat, start_vectors(flat) if vectors is None else vectors)
    return (estimate if flat is matrices else estimate.view(matrices.shape[:-2])), vectors


def matrix_factors(
    matrices: Tensor, vectors: Tensor | None, targets: Tensor, unit: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`factors(unit * s, targets)` `[n, 1, 1]` for the singular values s that `spectral` finds of `[n, R, C]`, and the
    new power vectors. One call where there are C++ kernels: a small operation of torch takes as long as a matrix or two
    of 64², ten times that where its code has left the cache."""
    if (
        vectors is not None
        and not torch.compiler.is_compiling()
        and cpu.takes(matrices, vectors, targets)
        and vectors.shape[1] == BLOCK
        and matrices.stride(2) == 1
    ):
        return cpu.matrix_factors(matrices, vectors, targets, unit, dither(vectors.shape[2]), DITHER)
    norms, vectors = spectral(matrices, vectors)
    return factors(unit * norms, targets)[:, None, None], vectors


def exact(matrices: Tensor) -> Tensor:
    """Largest singular values of `[n, R, C]` or `[n, P, R, C]` with a side of at most `BLOCK`, within 0.1%."""
    m = working(matrices.flatten(0, -3))
    m = m.mH if m.shape[-2] > m.shape[-1] else m
    size = m.abs().amax((-2, -1))
    m = m / torch.where(size > 0, size, 1.0)[:, None, None]
    if m.shape[-2] == 1:
        norms = torch.linalg.vector_norm(m, dim=(-2, -1))
    else:
        norms = largest_eigenvalue(m @ m.mH).clamp(min=0.0).sqrt()
    return (size * norms).view(matrices.shape[:-2])


def largest(x: Tensor) -> Tensor:
    """Largest absolute entry of each of the n updates, `[n, 1, …]`."""
    if x.dim() > 1 and (gpu := kernels.triton_for(x)) is not None:
        return gpu.max_abs(x.flatten(1)).view(-1, *[1] * (x.dim() - 1))
    size = working(x).abs()
    return size.amax(tuple(range(1, x.dim())), keepdim=True) if x.dim() > 1 else size


def most(norms: Tensor) -> Tensor:
    """The norm of the largest piece of each of the n updates, `[n]`."""
    return norms.flatten(1).amax(1) if norms.dim() > 1 else norms


def factors(norms: Tensor, targets: Tensor | None = None) -> Tensor:
    """`piece_factors` for each of the n updates: `norms` `[n, …]`, `targets` `[n]` (or 1); shaped like `norms`."""
    if targets is not None and not torch.compiler.is_compiling() and norms.numel() and cpu.takes(norms, targets):
        return cpu.piece_factors(norms, targets)  # one step, not nine
    shape = (-1,) + (1,) * (norms.dim() - 1)
    top = most(norms).view(shape)
    found = (1.0 if targets is None else targets.view(shape)) / torch.maximum(norms, top / PIECE_CAP)
    found = torch.where(top > TINY, found, 0.0)
    return torch.where(top.isfinite(), found, torch.nan)


def sign(x: Tensor) -> Tensor:
    """`x / |x|` entry by entry; zero stays zero, NaN and infinity become NaN."""
    return torch.sgn(x) + (x - x)


LARGE = 192
"""On a CPU, sides from here on are orthogonalised by singular value decomposition: 21 products of float32 matrices took
1.5 times as long at 768 and 0.4 times at 64 (benchmarks/results/orthogonal.json); at 128 they are even."""


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices with all singular values 1 of `[n, R, C]` or `[n, P, R, C]`, in the working precision.

    Zero stays zero. Of P pieces, one that is much smaller than the largest (by Frobenius norm) takes a smaller part:
    see `Atom.dualize_`.
    """
    from .orthogonal import orthogonalize

    flat = matrices.flatten(0, -3)
    exact = flat.device.type == "cpu" and min(flat.shape[1:]) >= LARGE
    found = (polar_factor(flat)[0] if exact else orthogonalize(flat)).reshape(matrices.shape)
    if matrices.dim() == 3:
        return found
    sizes = torch.linalg.matrix_norm(working(matrices))
    return found * (sizes * factors(sizes)).clamp(max=1.0)[..., None, None]


def take(whole: Tensor, places: Sequence[tuple[int, int, int, int]]) -> Tensor:
    """The part of every update `[n, …]` that `put_` writes: a view when contiguous."""
    for axis, start, stop, period in places:
        axis += 1
        if whole.shape[axis] == period:
            whole = whole.narrow(axis, start, stop - start)
        else:
            whole = whole.unflatten(axis, (-1, period)).narrow(axis + 1, start, stop - start).flatten(axis, axis + 1)
    return whole


def put_(whole: Tensor, places: Sequence[tuple[int, int, int, int]], part: Tensor) -> None:
    """Writes `part` `[n, …]` to the place of every update that nested slices (axis, start, stop, period) say.

    An entry i of the axis belongs to a slice if `start <= i % period < stop`. Axes of `part` may have size 1.
    """
    if not places:
        whole.copy_(part)
        return
    (axis, start, stop, period), *inner = places
    axis += 1
    width = stop - start
    if whole.shape[axis] == period:
        put_(whole.narrow(axis, start, width), inner, part)
        return
    view = whole.unflatten(axis, (-1, period)).narrow(axis + 1, start, width)
    if inner:
        joined = view.flatten(axis, axis + 1)
        put_(joined, inner, part)
        part = joined
    view.copy_(part.unsqueeze(axis) if part.shape[axis] == 1 else part.unflatten(axis, (-1, width)))

"""Tensor functions behind the atoms, and behind generated normalisers: arithmetic only, no geometry.

Everything works on a batch of P equally shaped pieces: matrices are `[P, out, in]`, power vectors `[P, BLOCK, in]`,
norms and factors `[P]`. Inputs may be float16 or bfloat16; every sum is accumulated in float32 (float64 stays float64).
Complex weights stay complex; the transpose of real ones is then the adjoint.

Meant for updates of ordinary size: entries beyond 1e18 in magnitude overflow to a norm of infinity (and from there to
NaN in the update, which the optimizer refuses), and an update whose norm is below `TINY` counts as zero.

Paper: section 3 and the appendix (normalisation of whole updates, power iteration with a stored vector).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "PIECE_CAP",
    "TINY",
    "piece_factors",
    "polar_factor",
    "power_iteration",
    "probe",
    "row_rms",
    "semi_orthogonal",
    "spectral_norms",
    "start_vectors",
    "working",
]

PIECE_CAP = 10.0
"""A piece (tap, row, expert) is never scaled up by more than this many times the factor of the largest piece."""

TINY = 1e-18
"""Norms below this count as zero: the squares of the entries leave the range of float32."""

DITHER = 1e-3
"""Size of the fixed vector mixed into every stored power vector. It costs 1e-6 of the estimate and lets a vector leave
a subspace it was once confined to (features that were dead at the time), which plain power iteration never does."""

BLOCK = 8
"""Power vectors per matrix. The updates of a training run turn, and large singular values change places: with one
vector and one iteration a step, one step in a hundred was found 20-25% low (momentum 0.9, batch 32). Eight vectors
read the matrix no more often and were 2-3% low. With a side of at most 8 the exact norm is as cheap: no vectors."""

START_TOLERANCE = 1e-3
START_LIMIT = 64


def working(x: Tensor) -> Tensor:
    """`x` in the precision in which sums are taken: double stays, everything else is single; complex stays complex."""
    if x.is_complex():
        return x if x.dtype == torch.complex128 else x.to(torch.complex64)
    return x if x.dtype == torch.float64 else x.float()


def probe(size: int, device: torch.device | str | None = None) -> Tensor:
    """A fixed unit vector `[size]` without structure, float32; from integer arithmetic, so the same on every device."""
    i = torch.arange(1, size + 1, device=device, dtype=torch.int64)
    hashed = ((i * i * 40503 + i * 30011) % 65521).float() / 32760.5 - 1.0
    return hashed / torch.linalg.vector_norm(hashed).clamp(min=TINY)


def _unit(x: Tensor) -> Tensor:
    """Every row of `x` divided by its 2-norm, safe for rows of any finite size; a zero row stays zero."""
    largest = x.abs().amax(-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=TINY)


def _largest_singular(wide: Tensor) -> Tensor:
    """Largest singular value `[P]` of `[P, few, many]` by its Gram matrix; NaN where an entry is not finite."""
    size = wide.abs().amax((-2, -1))
    wide = wide / torch.where(size > 0, size, 1.0)[:, None, None]
    if wide.shape[-2] == 1:
        return size * torch.linalg.vector_norm(wide, dim=(-2, -1))
    gram = wide @ wide.mH
    finite = gram.isfinite().all(-1).all(-1)
    largest = torch.linalg.eigvalsh(torch.where(finite[:, None, None], gram, 0.0))[:, -1]
    return torch.where(finite, size * largest.clamp(min=0.0).sqrt(), torch.nan)


def spectral_norms(matrices: Tensor) -> Tensor:
    """Largest singular values `[P]` of `[P, out, in]`, exact: Gram matrix of the smaller side and its eigenvalues.

    A piece with NaN or infinity has norm NaN.
    """
    m = working(matrices)
    return _largest_singular(m.mH if m.shape[-2] > m.shape[-1] else m)


def power_iteration(matrices: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """One step of block power iteration on WᵀW: `(estimates [P], new vectors [P, k, in] in float32)`.

    Args:
        matrices: `[P, out, in]`.
        vectors: `[P, k, in]` with `k <= out`; only their span matters. For k = 1 this is the iteration of `modula`.

    `Y = orthonormal basis of W·vectors`, new vectors `WᵀY`, estimate their largest singular value, never above W's. Nor
    is the estimate ever below the longest row of W, itself a lower bound: where that wins, the vectors have lost track,
    and the row becomes one of them. A zero piece keeps its vectors.
    """
    m = working(matrices)
    u = vectors.to(device=m.device, dtype=m.dtype)
    y = torch.linalg.qr((u @ m.mH).mH).Q.mH.contiguous()
    product = y @ m
    estimate = _largest_singular(product)

    longest, index = torch.linalg.vector_norm(m, dim=-1).max(-1)
    row = m.take_along_dim(index[:, None, None], dim=1)
    lost = longest > estimate
    product = torch.where(lost[:, None, None], torch.cat([row, product[:, 1:]], dim=1), product)
    estimate = torch.where(lost, longest, estimate)
    fresh = _unit(product) + DITHER * _start_block(u.shape[-2], u.shape[-1], m.device)
    single = torch.complex64 if m.is_complex() else torch.float32
    return estimate, torch.where(estimate[:, None, None] > TINY, fresh, u).to(single)


def _start_block(count: int, size: int, device: torch.device) -> Tensor:
    """`count` fixed vectors `[count, size]` of length 1, nearly orthogonal."""
    return _unit(probe(count * size, device).view(count, size))


def start_vectors(matrices: Tensor) -> Tensor:
    """Converged power vectors `[P, BLOCK, in]`, float32, for `[P, out, in]`; fewer vectors if a side is shorter.

    Iterates from a fixed start until no estimate moves by more than 1e-3 (at most 64 times). Zero pieces get the start.
    """
    m = working(matrices)
    u = _start_block(min(BLOCK, *m.shape[1:]), m.shape[-1], m.device).expand(m.shape[0], -1, -1)
    before = torch.zeros(m.shape[0], device=m.device, dtype=m.dtype.to_real())
    for _ in range(START_LIMIT):
        now, u = power_iteration(m, u)
        if not bool((now - before > START_TOLERANCE * now).any()):
            break
        before = now
    return u


def row_rms(x: Tensor, axes: tuple[int, ...] = (-1,)) -> Tensor:
    """Root mean square over `axes`, which are kept with size 1."""
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return torch.linalg.vector_norm(working(x), dim=axes, keepdim=True) / count**0.5


def polar_factor(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`(U Vᵀ [P, out, in], largest singular value [P])` of `[P, out, in]`, from the singular value decomposition.

    Directions whose singular value is rounding noise are left out, so a zero piece stays zero. A piece with NaN or
    infinity becomes NaN.
    """
    m = working(matrices)
    size = m.abs().amax((-2, -1))
    m = m / torch.where(size > 0, size, 1.0)[:, None, None]
    finite = m.isfinite().all(-1).all(-1)
    u, s, vt = torch.linalg.svd(torch.where(finite[:, None, None], m, 0.0), full_matrices=False)
    noise = s[:, :1] * (torch.finfo(m.dtype).eps * max(m.shape[-2:]))
    factor = (u * (s > noise).to(m.dtype)[:, None, :]) @ vt
    return torch.where(finite[:, None, None], factor, torch.nan), torch.where(finite, size * s[:, 0], torch.nan)


def piece_factors(norms: Tensor, target: float | Tensor, cap: float = PIECE_CAP) -> Tensor:
    """Factors, shaped like `norms`, that bring every piece to `target`; at most `cap` times that of the largest piece.

    If everything is zero (below `TINY`) all factors are 0; a norm that is NaN or infinite makes all factors NaN.
    """
    largest = norms.max()
    factors = target / torch.maximum(norms, largest / cap)
    factors = torch.where(largest > TINY, factors, 0.0)
    return torch.where(largest.isfinite(), factors, torch.nan)


def semi_orthogonal(
    pieces: int, out: int, into: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Random `[pieces, out, into]` with all singular values 1 (Haar), float32, drawn on the generator's device."""
    tall, flat = max(out, into), min(out, into)
    where = generator.device if generator is not None else device
    q, r = torch.linalg.qr(torch.randn(pieces, tall, flat, generator=generator, device=where))
    q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None, :]
    return (q if out >= into else q.mT).to(device if device is not None else q.device)

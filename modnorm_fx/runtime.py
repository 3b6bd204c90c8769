"""Tensor functions behind the atoms, and behind generated normalisers: arithmetic only, no geometry.

Everything works on a batch of P equally shaped pieces: matrices are `[P, out, in]`, power vectors `[P, in]`, norms and
factors `[P]`. Inputs may be float16 or bfloat16; every sum is accumulated in float32 (float64 stays float64).

Meant for updates of ordinary size: entries beyond 1e18 in magnitude overflow to a norm of infinity (and from there to
NaN in the update, which the optimizer refuses), and an update whose norm is below `TINY` counts as zero.

Paper: section 3 and the appendix (normalisation of whole updates, power iteration with a stored vector).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
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

START_BLOCK = 8
START_TOLERANCE = 1e-3
START_LIMIT = 64


def working(x: Tensor) -> Tensor:
    """`x` in the precision in which sums are taken: float64 stays, everything else is float32."""
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


def _product(matrices: Tensor, vectors: Tensor) -> Tensor:
    """`[P, out, in]` times `[P, in]`; one matrix takes the (faster) matrix-vector route."""
    if matrices.shape[0] == 1:
        return torch.mv(matrices[0], vectors[0]).unsqueeze(0)
    return torch.bmm(matrices, vectors.unsqueeze(-1)).squeeze(-1)


def spectral_norms(matrices: Tensor) -> Tensor:
    """Largest singular values `[P]` of `[P, out, in]`, exact: Gram matrix of the smaller side and its eigenvalues.

    A piece with NaN or infinity has norm NaN.
    """
    m = working(matrices)
    size = m.abs().amax((-2, -1))
    m = m / torch.where(size > 0, size, 1.0)[:, None, None]
    if 1 in m.shape[-2:]:
        return size * torch.linalg.vector_norm(m, dim=(-2, -1))
    gram = m.mT @ m if m.shape[-2] >= m.shape[-1] else m @ m.mT
    finite = gram.isfinite().all(-1).all(-1)
    gram = torch.where(finite[:, None, None], gram, 0.0)
    largest = torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0.0).sqrt()
    return torch.where(finite, size * largest, torch.nan)


def power_iteration(matrices: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """One step of power iteration on WᵀW: `(estimates [P], new vectors [P, in] in float32)`.

    `v = Wu/|Wu|`, `u' = Wᵀv`, estimate `|u'|`, never above the largest singular value. Nor is the estimate ever below
    the longest row, itself a lower bound of the norm: where the row wins, the vector has lost track and restarts from
    that row. A zero piece keeps its vector. The scale of `vectors` does not matter.
    """
    m = working(matrices)
    u = vectors.to(device=m.device, dtype=m.dtype)
    product = _product(m.mT, _unit(_product(m, u)))
    size = product.abs().amax(-1)
    estimate = size * torch.linalg.vector_norm(product / torch.where(size > 0, size, 1.0)[:, None], dim=-1)

    longest, index = torch.linalg.vector_norm(m, dim=-1).max(-1)
    lost = longest > estimate
    row = m.take_along_dim(index[:, None, None], dim=1).squeeze(1)
    estimate = torch.where(lost, longest, estimate)
    fresh = _unit(torch.where(lost[:, None], row, product)) + DITHER * probe(m.shape[-1], m.device)
    return estimate, torch.where(estimate[:, None] > TINY, fresh, u).float()


def start_vectors(matrices: Tensor) -> Tensor:
    """Converged power vectors `[P, in]`, float32, for `[P, out, in]`: the start of the warm power iteration.

    A single vector can linger at the second singular value (a 5x5 Gaussian matrix was seen to stop 27% low), so a block
    of 8 is iterated, from a fixed start, until no estimate moves by more than 1e-3 (at most 64 times).
    """
    m = working(matrices)
    size = m.abs().amax((-2, -1))
    m = (m / torch.where(size > 0, size, 1.0)[:, None, None]).nan_to_num()
    width = min(START_BLOCK, m.shape[-1], m.shape[-2])
    block = probe(m.shape[-1] * width, m.device).to(m.dtype).view(1, -1, width)
    before = torch.zeros((), device=m.device, dtype=m.dtype)
    for _ in range(START_LIMIT):
        block = torch.linalg.qr(m.mT @ (m @ block)).Q
        image = m @ block
        values, mix = torch.linalg.eigh(image.mT @ image)
        now = values[:, -1].clamp(min=0.0).sqrt()
        if bool((now - before <= START_TOLERANCE * now).all()):
            break
        before = now
    top = (block @ mix[:, :, -1:]).squeeze(-1)
    fixed = probe(m.shape[-1], m.device)
    return torch.where(size[:, None] > 0, top + DITHER * fixed, fixed).float()


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

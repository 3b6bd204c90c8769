"""Singular values of many equally shaped matrices at once: exact, by warm power iteration, and what follows from them.

Matrices are `[P, R, C]`, as they are stored (out × in, or in × out: the singular values are the same), power vectors
`[P, BLOCK, C]`. Inputs may be float16 or bfloat16; every sum is accumulated in float32 (float64 stays float64). Complex
matrices stay complex; the transpose of real ones is then the adjoint.

Paper: the appendix on normalisation (power iteration with a stored vector).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import kernels
from .kernels import cpu

__all__ = [
    "BLOCK",
    "TINY",
    "dither",
    "largest_eigenvalue",
    "polar_factor",
    "power_iteration",
    "probe",
    "renewed",
    "ritz",
    "semi_orthogonal",
    "spectral_norms",
    "start_vectors",
    "working",
]

TINY = 1e-15
"""Norms below this count as zero: their squares, of which Gram matrices are made, must be right to less than `JITTER`
in float32, whose range ends at 1.2e-38. (1e-15)² = 1e-30 leaves a hundred for entries smaller than the largest."""

DITHER = 1e-3
"""Size of the fixed vector mixed into every stored power vector. It costs 1e-6 of the estimate and lets a vector leave
a subspace it was once confined to (features that were dead at the time), which plain power iteration never does."""

BLOCK = 8
"""Power vectors per matrix. The updates of a training run turn, and large singular values change places: with one
vector and one iteration a step, one step in a hundred was found 20-25% low (momentum 0.9, batch 32). Eight vectors
read the matrix no more often and were 2-3% low. With a side of at most 8 the exact norm is as cheap: no vectors."""

JITTER = 1e-6
"""Added to the diagonal of Gram matrices of trace 1 before Cholesky: a few roundings of float32."""

SQUARINGS = 8

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


def largest_eigenvalue(gram: Tensor) -> Tensor:
    """Largest eigenvalue `[P]` of symmetric non-negative `[P, k, k]`, at most 0.1% low. NaN stays NaN.

    The matrix is squared `SQUARINGS` times, which leaves one eigenvector, or several whose eigenvalues hardly differ;
    the column with the largest diagonal entry gives a Rayleigh quotient. If it holds the share s of an eigenvector with
    eigenvalue 1 - d, the quotient is low by d·s²/(1 + s²) with s = (1 - d)^256, at most 1/(2e·256). Unlike an
    eigenvalue solver it needs no synchronisation, so that a CUDA graph can hold it.
    """
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1).real
    scaled = gram / torch.where(size > 0, size, 1.0)[:, None, None]
    power = scaled
    for _ in range(SQUARINGS):
        trace = power.diagonal(dim1=-2, dim2=-1).sum(-1).real
        power = power @ power / torch.where(trace > 0, trace * trace, 1.0)[:, None, None]
    best = power.diagonal(dim1=-2, dim2=-1).real.argmax(-1)
    column = power.take_along_dim(best[:, None, None], dim=2)
    above = (column.mH @ (scaled @ column)).flatten().real
    below = torch.linalg.vector_norm(column, dim=(-2, -1)) ** 2
    return size * above / torch.where(below == 0, 1.0, below)


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
    """Largest singular values `[P]` of `[P, R, C]`, exact: Gram matrix of the smaller side and its eigenvalues.

    A piece with NaN or infinity has norm NaN.
    """
    m = working(matrices)
    return _largest_singular(m.mH if m.shape[-2] > m.shape[-1] else m)


def power_iteration(matrices: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """One step of block power iteration on WᵀW: `(estimates [P], new vectors [P, k, C] in float32)`.

    Args:
        matrices: `[P, R, C]`.
        vectors: `[P, k, C]` with `k <= R`; only their span matters. For k = 1 this is the iteration of `modula`.

    `v = W·vectors` and `z = Wᵀv` take one reading of W. With `Y` an orthonormal basis of the span of v (`ritz`), the
    new vectors are WᵀY and the estimate is their largest singular value, never above W's (the C++ kernel may round W to
    bfloat16 first, which moves the norm by 2⁻⁹ at most). Nor is the estimate ever below the longest row of W, itself a
    lower bound: where that wins, the vectors have lost track, and the row becomes one of them. A zero piece keeps its
    vectors.
    """
    if vectors.shape[-2] == BLOCK and matrices.stride(-1) == 1 and cpu.takes(matrices, vectors):
        return _power_step(matrices, vectors) if torch.compiler.is_compiling() else _power_step_(matrices, vectors)
    m = working(matrices)
    u = vectors.to(device=m.device, dtype=m.dtype)
    if (gpu := kernels.triton_for(matrices)) is not None:
        squares = torch.empty(matrices.shape[:2], device=m.device)
        v, z = gpu.power_products(matrices, u, squares)
        longest, index = squares.sqrt().max(-1)
    else:
        v = u @ m.mH
        z = v @ m
        longest, index = torch.linalg.vector_norm(m, dim=-1).max(-1)
    return renewed(u, v, z, longest, m.take_along_dim(index[:, None, None], dim=1))


def renewed(u: Tensor, v: Tensor, z: Tensor, longest: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """What `power_iteration` makes of its products `v = u Wᴴ` `[P, k, R]` and `z = v W` `[P, k, C]`: estimates, and the
    vectors that follow `u` `[P, k, C]`. `longest` `[P]` is the length of W's longest row, `row` `[P, 1, C]`."""
    estimate, product = ritz(v, z)
    lost = longest > estimate
    product = torch.where(lost[:, None, None], torch.cat([row, product[:, 1:]], dim=1), product)
    estimate = torch.where(lost, longest, estimate)
    fresh = whitened(product, product @ product.mH) + DITHER * _start_block(u.shape[-2], u.shape[-1], u.device)
    single = torch.complex64 if u.is_complex() else torch.float32
    fresh = torch.where(estimate[:, None, None] > TINY, fresh, u).to(single)
    return estimate, fresh.contiguous()  # as a checkpoint holds it: sums depend on strides


def ritz(v: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """From `v = u Wᴴ` `[P, k, R]` and `z = v W` `[P, k, C]`: `(largest singular value [P], Y W [P, k, C])` for an
    orthonormal basis Y of the rows of v.

    Cholesky: `v vᴴ = t L Lᴴ` with its trace t, so `Y = L⁻¹ v / √t` is orthonormal and `Y W = L⁻¹ z / √t`: W is not read
    again.
    """
    product = whitened(z, v @ v.mH)
    return largest_eigenvalue(product @ product.mH).clamp(min=0.0).sqrt(), product


def whitened(rows: Tensor, gram: Tensor) -> Tensor:
    """`L⁻¹ rows / √t` `[P, k, C]` for the Cholesky factor L of `gram / t` and the trace t of `gram` `[P, k, k]`.

    With the rows' own gram they become orthonormal: power vectors are kept so, for the smaller the differences between
    their images, the more directions survive. `JITTER` keeps L invertible where rows depend on each other; directions
    below its root, a thousandth of the largest, fade.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1).real
    nonzero = torch.where(trace <= TINY * TINY, 1.0, trace)[:, None, None]
    gram = gram / nonzero + JITTER * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(lower, rows / nonzero.sqrt(), upper=False)


def _power_step_(matrices: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    return cpu.power_step(matrices, vectors, dither(matrices.shape[-1]), DITHER)


@torch.library.custom_op("modnorm_fx::power_step", mutates_args=())
def _power_step(matrices: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The C++ kernel as an op that torch.compile leaves whole."""
    return _power_step_(matrices, vectors)


@_power_step.register_fake
def _(matrices: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    return matrices.new_empty(matrices.shape[0]), torch.empty_like(vectors)


@functools.cache
def dither(size: int) -> Tensor:
    """What kernels on the CPU add to power vectors, times `DITHER`: `_start_block`, made once for each size."""
    return _start_block(BLOCK, size, torch.device("cpu"))


def _start_block(count: int, size: int, device: torch.device) -> Tensor:
    """`count` fixed vectors `[count, size]` of length 1, nearly orthogonal."""
    return _unit(probe(count * size, device).view(count, size))


def start_vectors(matrices: Tensor) -> Tensor:
    """Converged power vectors `[P, BLOCK, C]`, float32, for `[P, R, C]`; fewer vectors if a side is shorter.

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


def polar_factor(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`(U Vᵀ [P, R, C], largest singular value [P])` of `[P, R, C]`, from the singular value decomposition.

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


def semi_orthogonal(
    pieces: int, out: int, into: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Random `[pieces, out, into]` with all singular values 1 (Haar), float32, drawn on the generator's device."""
    tall, flat = max(out, into), min(out, into)
    where = generator.device if generator is not None else device
    q, r = torch.linalg.qr(torch.randn(pieces, tall, flat, generator=generator, device=where))
    q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None, :]
    return (q if out >= into else q.mT).to(device if device is not None else q.device)

"""Orthogonal factors `U Vᵀ` of many equally shaped matrices at once, by matrix products alone.

One step replaces X by `aX + b(XXᴴ)X + c(XXᴴ)²X`: its singular vectors stay, and every singular value s becomes
`as + bs³ + cs⁵`. A `Schedule` is a few such steps which together send all of `[lowest, 1]` close to 1. Zero stays zero.
What lies between zero and `lowest`, rounding noise for one, is raised only in part: by `slope` times at most. So a
matrix of low rank keeps its rank up to noise, where the singular value decomposition (`runtime.polar_factor`) cuts off.

Sources: Jordan, *Muon* (2024); Bernstein and Newhouse, *Modular duality in deep learning*, arXiv 2410.21265; Amsel,
Persson, Musco, Gower, *The Polar Express*, arXiv 2505.16932.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .runtime import working

__all__ = ["DEFAULT", "SCHEDULES", "Schedule", "bounds", "minimax", "orthogonalize", "polar_express", "response"]

Triple = tuple[float, float, float]

SAFETY = 1.01
"""Every step but the last allows for singular values this many times too large, as rounding to bfloat16 makes them. The
factor of the Polar Express paper."""

CUSHION = 0.02407327424182761
"""A step is never designed for less than this share of its largest singular value. Below that the optimal polynomial
would press some large singular values down to the size of the small ones, where rounding spoils them. The number is
the one behind the coefficients that the Polar Express paper prints: with it, `polar_express` gives the same."""

GRID = 200_001


@dataclass(frozen=True)
class Schedule:
    """Steps of an odd polynomial of degree five.

    Attributes:
        name: its key in `SCHEDULES`.
        coefficients: `(a, b, c)` of each step.
        lowest: the smallest singular value that it is made for; the largest is at most 1.
        source: where the coefficients come from.
    """

    name: str
    coefficients: tuple[Triple, ...]
    lowest: float
    source: str

    @property
    def slope(self) -> float:
        """The factor by which singular values far below `lowest` grow."""
        return math.prod(a for a, _, _ in self.coefficients)


# Where the coefficients come from -----------------------------------------------------------------------------------


def minimax(low: float, high: float) -> Triple:
    """The `(a, b, c)` that make `max |1 - (ax + bx³ + cx⁵)|` over `[low, high]` smallest.

    x, x³, x⁵ are a Chebyshev system on positive numbers, so the error of the best polynomial takes its largest size
    four times with alternating sign: at both ends and at two extrema between them. Remez: solve for the polynomial that
    does so at four given points, move the inner two to its extrema (the roots of `a + 3bx² + 5cx⁴`), repeat.
    """
    ratio = low / high
    if ratio > 1 - 1e-5:  # the error is below 1e-15: the Taylor polynomial that is flat to second order at 1
        a, b, c = 15 / 8, -10 / 8, 3 / 8
        return a / high, b / high**3, c / high**5
    inner = (0.75 * ratio + 0.25, 0.25 * ratio + 0.75)
    error = math.inf
    for _ in range(50):
        points = torch.tensor([ratio, *inner, 1.0], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([points, points**3, points**5, signs], dim=1)
        before = error
        a, b, c, error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = (math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c)))
        if abs(error - before) <= 1e-15:
            break
    return a / high, b / high**3, c / high**5


def polar_express(lowest: float, steps: int, *, safety: float = SAFETY, cushion: float = CUSHION) -> Schedule:
    """The schedule of Amsel and others for singular values in `[lowest, 1]`, computed in float64.

    Greedy, which they prove optimal among such compositions: the first polynomial is the best on `[l, u] =
    [lowest, 1]`; it maps that interval to `[l', 2 - l']`, for which the next is the best, and so on. With the cushion a
    step is made for `[cushion·u, u]` where l is below; then it is scaled so that l and u are sent equally far from 1.
    With the safety factor all steps but the last work on x / safety.
    """
    low, high = lowest, 1.0
    coefficients = []
    for step in range(steps):
        a, b, c = minimax(max(low, cushion * high), high)
        if low < cushion * high:
            centre = 2 / (_polynomial((a, b, c), low) + _polynomial((a, b, c), high))
            a, b, c = a * centre, b * centre, c * centre
        if step < steps - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        coefficients.append((a, b, c))
        low = _polynomial((a, b, c), low)
        high = 2 - low
    source = "Amsel, Persson, Musco, Gower 2025, arXiv 2505.16932"
    return Schedule("polar-express", tuple(coefficients), lowest, source)


def _polynomial(coefficients: Triple, x: float) -> float:
    a, b, c = coefficients
    return x * (a + x * x * (b + x * x * c))


_ALL = (
    Schedule(
        "polar-express",
        (
            (8.229028816819284, -22.96855557482072, 16.508608338771324),
            (4.103639681007992, -2.870563373536064, 0.5170788045208089),
            (4.0547374523932085, -2.8582401301708145, 0.5188315346559439),
            (3.8689152838204515, -2.8140921851822713, 0.5270831081312408),
            (3.160321471583819, -2.323148007183267, 0.47507384240532463),
            (2.187088874625964, -1.5387214902667765, 0.3899325570606924),
            (1.884698922987308, -1.2607348724665255, 0.3760750984912136),
        ),
        lowest=3e-4,
        source="Amsel, Persson, Musco, Gower 2025, arXiv 2505.16932; computed by polar_express(3e-4, 7)",
    ),
    Schedule(
        "muon",
        ((3.4445, -4.7750, 2.0315),) * 5,
        lowest=2e-3,
        source="Jordan 2024, kellerjordan.github.io/posts/muon; torch.optim.Muon",
    ),
    Schedule(
        "modula",
        (
            (3955 / 1024, -8306 / 1024, 5008 / 1024),
            (3735 / 1024, -6681 / 1024, 3463 / 1024),
            (3799 / 1024, -6499 / 1024, 3211 / 1024),
            (4019 / 1024, -6385 / 1024, 2906 / 1024),
            (2677 / 1024, -3029 / 1024, 1162 / 1024),
            (2172 / 1024, -1833 / 1024, 682 / 1024),
        ),
        lowest=2e-3,
        source="You 2025, as in modula/atom.py of github.com/modula-systems/modula",
    ),
)

SCHEDULES: dict[str, Schedule] = {schedule.name: schedule for schedule in _ALL}
"""By name. The authors of "muon" and "modula" give no `lowest`: below this one, results leave the interval they keep
above it."""

DEFAULT = SCHEDULES["polar-express"]


def response(schedule: Schedule, values: Tensor) -> Tensor:
    """What singular values become, in float64; `values` are relative to the normalisation, so in [0, 1]."""
    x = values.double()
    for a, b, c in schedule.coefficients:
        square = x * x
        x = x * (a + square * (b + square * c))
    return x


@functools.cache
def bounds(schedule: Schedule) -> tuple[float, float]:
    """The smallest interval that holds what becomes of singular values in `[lowest, 1]`; a fine grid, in float64."""
    grid = torch.logspace(math.log10(schedule.lowest), 0.0, GRID, dtype=torch.float64)
    values = response(schedule, grid)
    return values.min().item(), values.max().item()


# The matrices -------------------------------------------------------------------------------------------------------


def orthogonalize(matrices: Tensor, schedule: Schedule | str = DEFAULT, *, dtype: torch.dtype | None = None) -> Tensor:
    """About `U Vᴴ` for `[P, out, in]`: the same singular vectors, singular values sent into `bounds(schedule)`.

    Args:
        matrices: any strides, any floating dtype or complex. Tall ones are worked on transposed, and then the result
            is a transposed view.
        schedule: a `Schedule` or the name of one.
        dtype: of the matrix products: float32, float64 or bfloat16 (real matrices only). None means that of the
            result. With bfloat16 singular values end up to 0.5% above `bounds`, and those below a hundredth of the
            largest a few percent below (benchmarks/orthogonal.py).

    Returns:
        `[P, out, in]` in float32 (float64 for float64; the complex counterparts for complex).

    Each piece is divided by a bound of its largest singular value that costs no product, as the first step needs
    G = XXᴴ and G² anyway: the fourth root of G²'s Frobenius norm or largest absolute row sum, whichever is smaller. On
    Gaussian 768×768 matrices it is 1.5 times the largest singular value, where the Frobenius norm of X is 14 times, and
    on updates of training runs 1.01 times. A matrix of a single row or column is divided by its length, which is exact.

    A zero piece stays zero, a piece with NaN or infinity becomes NaN, and no piece influences another. No value is read
    back from the device, so that a CUDA graph can hold it. In float32 on CUDA, `torch.backends.cuda.matmul` decides
    about TF32.
    """
    if isinstance(schedule, str):
        schedule = SCHEDULES[schedule]
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalize(matrices.mH, schedule, dtype=dtype).mH
    m = working(matrices)
    chosen = _product_dtype(m, dtype)
    size = torch.linalg.vector_norm(m, math.inf, dim=(-2, -1), keepdim=True)
    m = m / _nonzero(size)
    if m.shape[-2] == 1:
        return m / _nonzero(torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True))

    (a, b, c), *later = schedule.coefficients
    x = m.to(chosen)
    gram = working(torch.bmm(x, x.mH))
    trace = _nonzero(gram.diagonal(dim1=-2, dim2=-1).real.sum(-1)[:, None, None])
    gram = gram / trace
    square = working(torch.bmm(gram.to(chosen), gram.to(chosen)))
    bound = _nonzero(_above_largest_eigenvalue(square).sqrt())
    x = (m / (trace * bound).sqrt()).to(chosen)
    x = torch.baddbmm(x, ((b / bound) * gram + (c / bound**2) * square).to(chosen), x, beta=a)
    for a, b, c in later:
        gram = torch.bmm(x, x.mH)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(m.dtype)


def _above_largest_eigenvalue(matrices: Tensor) -> Tensor:
    """A number `[P, 1, 1]` not below the largest eigenvalue of Hermitian `[P, k, k]`."""
    frobenius = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    row_sum = torch.linalg.vector_norm(matrices, 1, dim=-1, keepdim=True).amax(-2, keepdim=True)
    return torch.minimum(frobenius, row_sum)


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1.0, x)


def _product_dtype(m: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return m.dtype
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"dtype={dtype}: the products can be taken in float32, float64 or bfloat16.")
    if m.is_complex():
        if dtype == torch.bfloat16:
            raise ValueError("dtype=torch.bfloat16: there are no complex numbers of that precision.")
        return dtype.to_complex()
    return dtype

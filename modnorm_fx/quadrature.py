"""Typical size and slope of a scalar function on Gaussian inputs, by the midpoint rule on a fine grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Flag
from functools import lru_cache
from itertools import pairwise

import torch

from .errors import ModnormError

__all__ = ["NODES", "Sign", "gaussian_moments", "joint_moments"]


class Sign(Flag):
    """Which signs the entries of a value may have. Zero always may occur; ``Sign(0)`` is all zeros."""

    NEGATIVE = 1
    POSITIVE = 2
    ANY = 3

    def flipped(self) -> Sign:
        """Of the negated value."""
        swapped = (Sign.NEGATIVE, Sign.POSITIVE), (Sign.POSITIVE, Sign.NEGATIVE)
        return Sign(sum(new.value for old, new in swapped if old in self))

    def times(self, other: Sign) -> Sign:
        """Of a product."""
        return (self if Sign.POSITIVE in other else Sign(0)) | (self.flipped() if Sign.NEGATIVE in other else Sign(0))


#: Midpoints of equal cells of [-12, 12]. The rule converges faster than any power for smooth functions against a
#: Gaussian (1e-12 here), and a kink or step (ReLU, hard-swish, their slopes) costs at most one cell, 1e-3.
#: Gauss-Hermite nodes are so far apart that a kink costs 1%. An even number keeps midpoints off zero.
NODES, REACH = 4800, 12.0
#: a rule on cells three times as wide agrees to this much unless an integral diverges, where it gives 1/√3; a kink or
#: step costs 1% at most
CONVERGED = 0.05
#: entries further out, in units of the scale, are one in a million
RARE = 5.0


#: what float32 holds
LARGEST = torch.finfo(torch.float32).max


#: activations do all they do at inputs of ordinary size: where cells of the whole range would be longer than NEAR/100,
#: the inputs up to NEAR have cells of their own. At a scale of 1e4 the slope of tanh all comes from there.
NEAR = 20.0


@lru_cache(maxsize=64)
def _nodes(sign: Sign, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Midpoints ``z`` and weights for inputs ``scale·z``."""
    near = NEAR / scale if 2 * REACH / NODES * scale > NEAR / 100 else 0.0
    edges = [-REACH, -near, near, REACH] if near else [-REACH, REACH]
    cells = (torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES
    z = torch.cat([low + (high - low) * cells for low, high in pairwise(edges)])
    widths = torch.cat([torch.full_like(cells, (high - low) / NODES) for low, high in pairwise(edges)])
    weights = widths / math.sqrt(2 * math.pi) * torch.exp(-z * z / 2)
    if sign in (Sign.NEGATIVE, Sign.POSITIVE):  # weights are relative: half of them makes no difference
        half = z > 0 if sign is Sign.POSITIVE else z < 0
        z, weights = z[half], weights[half]
    return z, weights


def gaussian_moments(
    function: Callable[[torch.Tensor], torch.Tensor], scale: float, sign: Sign = Sign.ANY, *, growing: bool = False
) -> tuple[float, float]:
    """Root mean square of ``f(scale·z)`` and of ``f'(scale·z)`` for ``z ~ N(0, 1)``, or ``±|z|`` if its sign is known.

    Points where the function is not finite (in float32, which the model computes in) are left out: its operand is then
    positive, or bounded, by construction. An integral that does not converge (of ``1/x²``, the squared slope of
    ``log x``, near 0), or most of which comes from entries that are too rare to be met (of ``exp`` at a scale above
    2.5), is not taken: the number is then that at the size of the operand, ``±scale``, as in rules for functions of
    something positive; if there is one, for at a scale of 1000 ``exp`` is infinite there, or zero.

    Args:
        function: elementwise, differentiable almost everywhere; called on a float64 vector.
        scale: RMS of the input, positive.
        sign: signs that the input may have.
        growing: whether the input sums more and more terms of one sign. Entries of n terms are then as large as n and
            move by √n, so that ``f'²`` counts by ``|z|`` over its mean: what is far out moves most, and the decays
            ``exp(-Σ)`` that matter are near.

    Returns:
        ``(√E f², √E f'²)``, the output's scale and the sensitivity.

    Raises:
        ModnormError: the function is finite nowhere.
    """
    nodes, weights = _nodes(sign, scale)
    y, slope = _evaluated(function, scale * nodes)
    if growing:
        slope = slope * (nodes.abs() * math.sqrt(math.pi / 2)).sqrt()
    finite = y.isfinite() & slope.isfinite()
    if not finite.any():
        raise ModnormError(
            f"A pointwise function has no finite value on inputs of size {scale:g}.",
            do="Report the model, or add a rule.",
        )
    found = _moments(y, slope, torch.where(finite, weights, 0.0))
    coarse = _moments(y[1::3], slope[1::3], torch.where(finite, weights, 0.0)[1::3])
    seen = _moments(
        y, slope, torch.where(finite & (nodes.abs() < RARE), weights, 0.0), total=float(weights[finite].sum())
    )
    diverges = [
        not math.isclose(whole, part, rel_tol=CONVERGED, abs_tol=1e-12) or 2 * common**2 < whole**2
        for whole, part, common in zip(found, coarse, seen, strict=True)
    ]
    if not any(diverges):
        return found
    ends = [end for end, half in ((scale, Sign.POSITIVE), (-scale, Sign.NEGATIVE)) if half in (sign or Sign.ANY)]
    y, slope = _evaluated(function, torch.tensor(ends, dtype=torch.float64))
    finite = y.isfinite() & slope.isfinite()
    if not finite.any():
        return found
    there = _moments(y, slope, finite.double())
    if not finite.all() and not any(there):
        return found
    return there[0] if diverges[0] else found[0], there[1] if diverges[1] else found[1]


def _evaluated(
    function: Callable[[torch.Tensor], torch.Tensor], places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and derivatives."""
    with torch.enable_grad():
        x = places.requires_grad_()
        y = function(x)
        slope = torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else torch.zeros_like(x)
    y, slope = y.detach().double(), slope.double()
    return torch.where(y.abs() < LARGEST, y, torch.inf), torch.where(slope.abs() < LARGEST, slope, torch.inf)


def _moments(
    y: torch.Tensor, slope: torch.Tensor, weights: torch.Tensor, total: float | None = None
) -> tuple[float, float]:
    """Root mean squares; what has no weight does not count. ``total``: the sum of weights, where it is more."""
    total = float(weights.sum()) if total is None else total
    squares = [float((weights * torch.where(weights > 0, v, 0.0).square()).sum()) / total for v in (y, slope)]
    return math.sqrt(squares[0]), math.sqrt(squares[1])


#: midpoints per operand of a function of two: a step or kink costs a cell, 1% of the Gaussian's mass
PAIR_NODES, PAIR_REACH = 240, 6.0


def joint_moments(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], scales: tuple[float, float]
) -> tuple[float, float, tuple[float, float]]:
    """Mean and RMS of ``f(s·z, t·w)`` and RMS of its two derivatives, for independent ``z, w ~ N(0, 1)``.

    Points where the function is not finite are left out, as in :func:`gaussian_moments`.

    Args:
        function: elementwise in two float64 vectors.
        scales: RMS of the two inputs; an operand of scale zero stays zero.

    Returns:
        ``(E f, √E f², (√E (∂f/∂x)², √E (∂f/∂y)²))``.

    Raises:
        ModnormError: the function is finite nowhere.
    """
    z = (torch.arange(PAIR_NODES, dtype=torch.float64) + 0.5) * (2 * PAIR_REACH / PAIR_NODES) - PAIR_REACH
    weights = torch.exp(-(z[:, None].square() + z.square()) / 2).reshape(-1)
    pairs = torch.cartesian_prod(z, z)
    with torch.enable_grad():
        x, y = ((scale * column).requires_grad_() for scale, column in zip(scales, pairs.unbind(1), strict=True))
        value = function(x, y)
        slopes = torch.autograd.grad(value.sum(), [x, y], allow_unused=True) if value.requires_grad else (None, None)
    columns = [value.detach(), *(torch.zeros_like(value) if slope is None else slope for slope in slopes)]
    finite = torch.stack([column.isfinite() for column in columns]).all(0)
    if not finite.any():
        raise ModnormError(
            f"A function of two operands has no finite value on inputs of sizes {scales[0]:g} and {scales[1]:g}.",
            do="Report the model, or add a rule.",
        )
    weights = torch.where(finite, weights, 0.0)
    total = float(weights.sum())
    kept = [torch.where(finite, column, 0.0) for column in columns]
    mean = float((weights * kept[0]).sum()) / total
    roots = [math.sqrt(float((weights * column.square()).sum()) / total) for column in kept]
    return mean, roots[0], (roots[1], roots[2])

"""Typical size and slope of a scalar function on Gaussian inputs, by Gauss-Hermite quadrature."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

__all__ = ["gaussian_moments", "NODES"]

#: 128 nodes integrate polynomials up to degree 255 exactly and kinked functions (ReLU, hard-swish) to about 1e-3; an even
#: number keeps a node off the kink at zero.
NODES = 128


@lru_cache(maxsize=1)
def _nodes() -> tuple[torch.Tensor, torch.Tensor]:
    z, w = np.polynomial.hermite_e.hermegauss(NODES)
    return torch.from_numpy(z), torch.from_numpy(w / np.sqrt(2 * np.pi))


def gaussian_moments(function: Callable[[torch.Tensor], torch.Tensor], scale: float) -> tuple[float, float]:
    """Root mean square of ``f(scale·z)`` and of ``f'(scale·z)`` for ``z ~ N(0, 1)``.

    Args:
        function: elementwise, differentiable almost everywhere; called on a float64 vector.
        scale: RMS of the input, positive.

    Returns:
        ``(√E f², √E f'²)``, the output's scale and the sensitivity.
    """
    nodes, weights = _nodes()
    with torch.enable_grad():
        x = (scale * nodes).requires_grad_()
        y = function(x)
        slope = torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else torch.zeros_like(x)
    mean_square = lambda v: float((weights * v.detach().double().square()).sum().sqrt())  # noqa: E731
    return mean_square(y), mean_square(slope)

"""The paper's ResCNN on digits as they are, 8x8 and grey.

`zoo:rescnn` has the paper's images, 32x32 in colour. A digit that is enlarged to them is nearly flat within the 3x3
pixels that a convolution sees, and the mean over pixels says little of the shape of what is larger.
"""

from __future__ import annotations

from modnorm_fx.models_zoo import paper

__all__ = ["rescnn"]


def rescnn(width: int = 16, layers: int = 2, classes: int = 10) -> paper.ResCNN:
    """`layers` blocks of two convolutions."""
    return paper.ResCNN(width=width, blocks=layers, channels=1, classes=classes, image_size=8)

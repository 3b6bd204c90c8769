"""How contributions add up: the one choice that must be the same for scales, sensitivities and the budget of an update.

A convention answers three questions with one rule, so that the products telescope over a trunk of residual branches:
what is the scale of a sum, what is the sensitivity over several paths, and how is a unit update shared between weights.

* ``paper``: every scale is 1, paths and shares add linearly. Equal to the recursion of arXiv 2405.14813, section 3,
  and meant for networks that are written the paper's way (residuals ``(1-1/L) x + (1/L) f(x)``).
* ``tracked``: typical values in quadrature. The scale of a sum of independent terms is the root of the sum of
  squares, so is the sensitivity over several paths, and a weight of mass share ``m/M`` may take ``√(m/M)`` of the
  update. Meant for existing models: L pre-norm branches of unit scale give a stream of scale ``√(s₀²+l)`` and a
  sensitivity ``1/√(s₀²+l)`` at layer l.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .atoms import Atom, Embedding
from .errors import ModnormError

if TYPE_CHECKING:
    from .tree import Allotment

__all__ = ["Convention", "PAPER", "TRACKED", "convention"]


@dataclass(frozen=True)
class Convention:
    """One consistent way to add up contributions.

    Attributes:
        name: what users type.
        tracks_scales: whether nodes carry an expected RMS; if not, every scale is 1.
        quadrature: whether contributions add as squares.
    """

    name: str
    tracks_scales: bool
    quadrature: bool

    def add(self, values: Iterable[float]) -> float:
        """The joint size of several contributions: scales at a sum, sensitivities over paths."""
        return math.hypot(*values) if self.quadrature else math.fsum(values)

    def share(self, mass: float, total: float) -> float:
        """The part of a unit update that a module of ``mass`` out of ``total`` may take; parts add up to 1 under
        ``add``."""
        if total <= 0:
            return 0.0
        return math.sqrt(mass / total) if self.quadrature else mass / total

    def declared(self, atom: Atom) -> float:
        """The norm that the matrix of a layer is declared to have; its layer then keeps the scale of its input."""
        return atom.typical_norm if self.tracks_scales else 1.0

    def binding(self, uses: list[Allotment]) -> list[Allotment]:
        """The uses of one weight that its norm counts: all of them (the triangle inequality), or the lookups alone.

        An embedding tied to the head is an exception under ``tracked``. The head's operator norm is attained by
        updates of rank one, which those of a head nearly are (its gradient points along the mean feature vector), and
        would hold the rows back by up to d: a tied GPT-2 (d=64, 2 layers, 100 steps, best of a factor-2 grid) reached
        a loss of 2.77 with the sum, 2.45 with the lookups alone, plain AdamW 2.55. At d=768 and lr=0.1 the lookups
        allow steps of 1e-3 per entry, the size used in practice. Lookups that reach no output (every place of the
        example text holds an image) do not count.
        """
        lookups = [u for u in uses if isinstance(u.node.atom, Embedding) and u.gain > 0]
        return lookups if self.quadrature and lookups else uses


PAPER = Convention("paper", tracks_scales=False, quadrature=False)
TRACKED = Convention("tracked", tracks_scales=True, quadrature=True)
_BY_NAME = {c.name: c for c in (PAPER, TRACKED)}


def convention(name: str | Convention) -> Convention:
    """Looks a convention up by name. Raises ModnormError for a name that does not exist."""
    if isinstance(name, Convention):
        return name
    if name not in _BY_NAME:
        raise ModnormError(
            f"There is no convention {name!r}.",
            do=f"Pass one of {', '.join(map(repr, _BY_NAME))}: 'tracked' for existing models, 'paper' for nets written "
            "the paper's way.",
        )
    return _BY_NAME[name]

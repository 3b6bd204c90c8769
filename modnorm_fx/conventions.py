"""How contributions add up: the one choice that must be the same for scales, sensitivities and the budget of an update.

A convention answers three questions with one rule, so that the products telescope over a trunk of residual branches:
what is the scale of a sum, what is the sensitivity over several paths, and how is a unit update shared between weights.

* ``paper``: every scale is 1, paths and shares add linearly. Equal to the recursion of arXiv 2405.14813, section 3,
  and meant for networks that are written the paper's way (residuals ``(1-1/L) x + (1/L) f(x)``).
* ``tracked``: typical values in quadrature. The scale of a sum of independent terms is the root of the sum of
  squares, so is the sensitivity over several paths, and a weight of mass share ``m/M`` may take ``√(m/M)`` of the
  update. Meant for existing models: pre-norm branches of scale s give a stream of scale ``√(s₀²+l·s²)`` behind l of
  them, and a branch there a sensitivity of one over the scale at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .atoms import Atom, Embedding, Linear, Reshaped
from .errors import ModnormError

if TYPE_CHECKING:
    from .tree import Allotment

__all__ = ["Convention", "PAPER", "TRACKED", "convention"]

#: scale of all branches of a deep residual stream together, beside a stem of scale 1. That it is one number for all
#: depths is the 1/√depth of depth-muP (arXiv 2310.02244); 2 is measured (docs/design-decisions.md)
BRANCHES = 2.0


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

    def branch(self, count: int) -> float:
        """The part of its norm that the last weight of a residual branch is declared to have, for ``count`` branches.

        Under ``tracked`` all of it for up to four branches, and less for more, so that all of a stream's branches
        together have the scale of four (`BRANCHES`). With the whole norm each, they drown what the stream began with.
        """
        return min(1.0, BRANCHES / math.sqrt(count)) if self.tracks_scales else 1.0

    def heads(self, count: int) -> float:
        """What the sensitivity to a matrix is multiplied by that makes the queries or keys of ``count`` heads.

        A head's logits depend on its own features alone. The norm of the matrix measures those of all heads together,
        by their RMS; an update of norm 1 whose singular vectors each lie in one head (as those of a dual can: it has
        as many as there are features) moves that head's features by √count. ``paper`` measures all heads together.
        """
        return math.sqrt(count) if self.tracks_scales else 1.0

    def binding(self, uses: list[Allotment]) -> list[Allotment]:
        """The uses of one weight that its norm counts, each with the atom and the gain that it counts with.

        All of them, each by its own atom, so that the triangle inequality holds. An embedding tied to the head is an
        exception under ``tracked``: its norm is that of its lookups, the largest RMS of a row, and the head counts by
        what an update of row RMS 1 does to a feature vector that is independent of it, ``√into`` times its scale. The
        head's operator norm is attained by updates of rank one, which those of a head nearly are (its gradient points
        along the mean feature vector), and would hold the rows back by up to d. What each choice costs is in
        docs/design-decisions.md. Lookups that reach no output (every place of the example text holds an image) do not
        count, and uses that are neither lookups nor matrices do not count beside lookups.
        """
        lookups = [u for u in uses if isinstance(u.node.atom, Embedding) and u.gain > 0]
        if not (self.quadrature and lookups):
            return uses
        rows = lookups[0].node.atom
        return lookups + [_by_rows(u, layer.into, rows) for u in uses if isinstance(layer := _layer(u), Linear)]


def _layer(use: Allotment) -> Atom:
    atom = use.node.atom
    return atom.inner if isinstance(atom, Reshaped) else atom


def _by_rows(use: Allotment, into: int, rows: Atom) -> Allotment:
    """A matrix's use as the norm of its rows counts it: entries of size 1 that are independent of the input add up in
    quadrature over its ``into`` features."""
    return replace(use, node=replace(use.node, atom=rows, gain=use.node.gain * math.sqrt(into)))


PAPER = Convention("paper", tracks_scales=False, quadrature=False)
TRACKED = Convention("tracked", tracks_scales=True, quadrature=True)
_BY_NAME = {c.name: c for c in (PAPER, TRACKED)}


def convention(name: str | Convention) -> Convention:
    """Looks a convention up by name. Raises ModnormError for a name that does not exist."""
    if isinstance(name, Convention):
        return name
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ModnormError(
            f"There is no convention {name!r}.",
            do=f"Pass one of {', '.join(map(repr, _BY_NAME))}: 'tracked' for existing models, 'paper' for nets written "
            "the paper's way.",
        )
    return _BY_NAME[name]

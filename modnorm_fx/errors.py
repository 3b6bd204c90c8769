"""One family of errors, written for the person who reads them.

Every error says *what* happened, *where* (module path and source line of the user's model, when there is one), *why*,
and *what to do*. Nothing else in the package is raised at users: an exception of another type is a defect of this
package.
"""

from __future__ import annotations

__all__ = [
    "ModnormError",
    "CaptureError",
    "UnknownOpError",
    "WeightError",
    "MassError",
    "ModelMismatchError",
    "FormatError",
    "OptimizerError",
    "NonFiniteError",
    "InternalError",
]


class ModnormError(Exception):
    """Base of every error of this package.

    Args:
        what: one sentence, what went wrong, naming the thing.
        where: module path and source line in the user's model, if there is one.
        why: one sentence of cause.
        do: one sentence, what the reader can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, do: str | None = None):
        self.what, self.where, self.why, self.do = what, where, why, do
        lines = [what]
        lines += [f"  {label}: {text}" for label, text in (("where", where), ("why", why), ("do", do)) if text]
        super().__init__("\n".join(lines))


class CaptureError(ModnormError):
    """The model could not be traced to a graph, or no example inputs could be found for it."""


class UnknownOpError(ModnormError):
    """The graph contains operations that have no rule and may not (or cannot) be sampled."""


class WeightError(ModnormError):
    """A parameter is used in a way that no atom describes, or there is no parameter at all."""


class MassError(ModnormError):
    """A mass is negative or not finite, all are zero, or a path names no leaf."""


class ModelMismatchError(ModnormError):
    """A norm meets parameters (names, shapes) other than those it was inferred for."""


class FormatError(ModnormError):
    """A saved norm cannot be read: wrong schema, newer version, unknown or missing fields."""


class OptimizerError(ModnormError):
    """The optimizer and the norm do not fit together, or an optimizer was given arguments it cannot use."""


class NonFiniteError(ModnormError):
    """A gradient or an update holds NaN or infinity; the step was refused and nothing was changed."""


class InternalError(ModnormError):
    """Two computations of this package that must agree do not: a defect here, please report it."""

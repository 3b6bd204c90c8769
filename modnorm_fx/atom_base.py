"""What every atom is: the base class, slices of parameters, and atoms as JSON. Import them from `modnorm_fx.atoms`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import runtime
from .errors import FormatError, WeightError

__all__ = ["Atom", "Slice", "Vectors", "shares"]

Vectors = Tensor | tuple["Vectors | None", ...]
"""Power vectors: `[pieces, 8, columns]` float32, for the matrices as they are stored, or a tuple of them for `Tied`
(None for parts without a spectral norm)."""


@dataclass(frozen=True)
class Slice:
    """Part of a tensor along one axis: the indices i with `start <= i % period < stop`.

    A contiguous slice has `period` equal to the size of the axis; a smaller period repeats, as in projections that
    interleave q, k, v per head.
    """

    axis: int
    start: int
    stop: int
    period: int

    def read(self, w: Tensor) -> Tensor:
        """The part of `w`: a view when contiguous; the periods joined (a copy where no view exists) otherwise."""
        width = self.stop - self.start
        if w.shape[self.axis] == self.period:
            return w.narrow(self.axis, self.start, width)
        parts = w.unflatten(self.axis, (-1, self.period)).narrow(self.axis + 1, self.start, width)
        return parts.flatten(self.axis, self.axis + 1)

    def write_(self, w: Tensor, part: Tensor) -> None:
        """Put a changed `read(w)` back into `w`, of any strides."""
        width = self.stop - self.start
        parts = w.unflatten(self.axis, (-1, self.period)).narrow(self.axis + 1, self.start, width)
        parts.copy_(part.unflatten(self.axis, (-1, width)))

    def text(self, size: int) -> str:
        """The slice in Python notation, for an axis of `size` entries (which tells whether the period repeats)."""
        before = ":, " * self.axis
        if size == self.period:
            return f"[{before}{self.start}:{self.stop}]"
        return f".unflatten({self.axis}, (-1, {self.period}))[{before}:, {self.start}:{self.stop}]"

    def __str__(self) -> str:
        return self.text(self.period)


@dataclass(frozen=True)
class Atom:
    """Base of all atoms; `shape` is the shape of the tensor the atom works on (a parameter after its slices).

    Subclasses say how a tensor falls into pieces, what the exact norm of every piece is, and how one number per piece
    spreads over the tensor; the norm is that of the largest piece. In-place methods keep the dtype of the tensor.

    Every method raises WeightError when the tensor does not have the atom's shape.
    """

    shape: tuple[int, ...]
    kind: ClassVar[str] = ""
    is_matrix: ClassVar[bool] = False
    decays: ClassVar[bool] = False

    @property
    def typical_norm(self) -> float:
        """The norm of a random weight that keeps the scale of what it reads; what weights are declared to have where
        scales are tracked."""
        return 1.0

    # What a subclass provides ---------------------------------------------------------------------------------------

    def piece_norms(self, w: Tensor) -> Tensor:
        """Exact norm of every piece, in the working precision."""
        raise NotImplementedError

    def spread(self, numbers: Tensor) -> Tensor:
        """One number per piece, shaped to broadcast against the whole tensor."""
        return numbers

    def unit_dual(self, w: Tensor) -> Tensor:
        """The step of norm 1 with the largest inner product with `w`, in the working precision."""
        raise NotImplementedError

    def _draw(self, w: Tensor, generator: torch.Generator | None) -> Tensor:
        """A random tensor whose pieces all have norm 1."""
        raise NotImplementedError

    def _estimate(self, w: Tensor, vectors: Vectors) -> tuple[Tensor, Vectors | None]:
        """Norms of the pieces by one warm power iteration, and the new vectors; exact, and None, if there is none."""
        return self.piece_norms(w), None

    # What every atom offers -----------------------------------------------------------------------------------------

    def norm(self, w: Tensor) -> Tensor:
        """The exact norm of `w`, float32, no dimensions."""
        self._check(w)
        return self.piece_norms(w).max().float()

    def start_vectors(self, w: Tensor) -> Vectors | None:
        """Power vectors `[pieces, 8, columns]` of `w`, float32, converged from a deterministic start; None where there
        is no spectral norm, or where the exact one is as cheap (a side of at most 8)."""
        return None

    def estimate(self, w: Tensor, vectors: Vectors | None = None) -> tuple[Tensor, Vectors | None]:
        """The norm (float32, no dimensions) as `normalize_` sees it, and the vectors for the next call."""
        self._check(w)
        norms, vectors = (self.piece_norms(w), None) if vectors is None else self._estimate(w, vectors)
        return norms.max().float(), vectors

    def normalize_(self, w: Tensor, target: float | Tensor, vectors: Vectors | None = None) -> Vectors | None:
        """Scale `w` in place so that every piece, and with it the whole, has norm `target`.

        Pieces that are exactly zero stay zero, and no piece is scaled by more than `PIECE_CAP` times the factor of the
        largest piece. Without `vectors` the norms are exact; with them, one warm power iteration estimates spectral
        norms from below, and the new vectors are returned (section 3 of the paper).
        """
        self._check(w)
        norms, vectors = (self.piece_norms(w), None) if vectors is None else self._estimate(w, vectors)
        w.mul_(self.spread(runtime.piece_factors(norms, target)))
        return vectors

    def dualize_(self, w: Tensor, target: float | Tensor) -> None:
        """Replace `w` by its dual of norm `target`: of all such steps the one with the largest inner product with `w`.

        Exact (from the singular vectors) while the pieces lie within a factor `PIECE_CAP` of each other. A smaller
        piece takes a proportionally smaller share, so that noise in a piece near zero does not become a full step.
        """
        self._check(w)
        w.copy_(self.unit_dual(w) * target)

    def initialize_(self, w: Tensor, norm: float = 1.0, generator: torch.Generator | None = None) -> None:
        """Fill `w` with a random weight whose pieces all have norm exactly `norm`: semi-orthogonal matrices, Gaussian
        rows. Vectors have fixed starts. Random numbers come from `generator`, on its device."""
        self._check(w)
        w.copy_(self._draw(w, generator) * norm)

    def project_(self, w: Tensor, bound: float | Tensor = 1.0) -> None:
        """Shrink every piece of `w` whose norm exceeds `bound` back to it; the others are not touched."""
        self._check(w)
        norms = self.piece_norms(w)
        w.mul_(self.spread(torch.where(norms > bound, bound / norms, 1.0)))

    def describe(self) -> str:
        """What the atom is, in a few words: `Linear 768→2304`."""
        return f"{self.kind} {'×'.join(map(str, self.shape)) or 'scalar'}"

    def to_json(self) -> dict[str, Any]:
        """The atom as plain JSON data; `Atom.from_json` reads it back."""
        return {"kind": self.kind} | {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @staticmethod
    def from_json(d: dict[str, Any]) -> Atom:
        """The atom that `to_json` wrote.

        Raises:
            FormatError: the kind is unknown, or a field is missing, unknown or of the wrong type.
        """
        kinds = {cls.kind: cls for cls in _concrete()}
        if not isinstance(d, dict) or d.get("kind") not in kinds:
            raise FormatError(f"No atom can be read from {d!r}.", why=f"its kind is none of {', '.join(sorted(kinds))}")
        cls = kinds[d["kind"]]
        names = {f.name for f in fields(cls)}
        if not {"shape"} <= d.keys() - {"kind"} <= names:
            raise FormatError(f"The atom {d!r} has missing or unknown fields.", why=f"{d['kind']} has {sorted(names)}")
        try:
            return cls(**{name: _READERS.get(name, bool)(value) for name, value in d.items() if name != "kind"})
        except (TypeError, ValueError) as error:
            raise FormatError(f"The atom {d!r} cannot be read.", why=str(error)) from error

    def _check(self, w: Tensor) -> None:
        if tuple(w.shape) != self.shape:
            raise WeightError(
                f"A tensor of shape {list(w.shape)} was given to {self.describe()}, whose shape is {list(self.shape)}.",
                why="an atom works on the part of a parameter that its leaf's slices cut out",
                do="pass leaf.read(tensor)",
            )


# JSON and small helpers ---------------------------------------------------------------------------------------------


def shares(sizes: Tensor) -> Tensor:
    """How much of a full step pieces of these sizes take in `dualize_`: 1 down to 1/PIECE_CAP of the largest."""
    return (sizes * runtime.piece_factors(sizes, 1.0)).clamp(max=1.0)


def _plain(value: Any) -> Any:
    """A field of an atom as JSON data."""
    if isinstance(value, Atom):
        return value.to_json()
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _integers(value: Any) -> tuple[int, ...] | None:
    return None if value is None else tuple(int(v) for v in value)


_READERS: dict[str, Any] = {
    "shape": _integers,
    "groups": int,
    "gates": int,
    "feature_axes": _integers,
    "permute": _integers,
    "stored": _integers,
    "stride": _integers,
    "inner": Atom.from_json,
    "atoms": lambda value: tuple(Atom.from_json(v) for v in value),
    "weights": lambda value: tuple(float(v) for v in value),
}


def _concrete(cls: type[Atom] = Atom) -> Iterator[type[Atom]]:
    """All atom classes that have a kind."""
    for sub in cls.__subclasses__():
        if sub.kind:
            yield sub
        yield from _concrete(sub)

"""The atoms: what one weight (or one slice of it) does to activations, and the norm that follows from it.

An atom is a value without tensors: it knows its shape and its kind, and takes the weight or its update as an argument.
Its norm is the one that the op induces between activations measured by `max over positions of RMS over features`
(paper: section 3 and the appendix on atomic modules; grouped convolutions, vectors, tables and experts extend the
paper's three atoms by the same definition).

Every atom offers `norm`, `normalize_`, `dualize_`, `initialize_`, `project_`, `start_vectors`, `describe` and JSON.
Tensors may have any floating dtype, which in-place methods keep; sums are accumulated in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import runtime
from .atom_base import Atom, Slice, Vectors
from .errors import WeightError
from .matrix_atoms import Conv, Experts, Gates, Linear, PatchConv
from .runtime import PIECE_CAP

__all__ = [
    "PIECE_CAP",
    "Atom",
    "Bias",
    "Conv",
    "Embedding",
    "Experts",
    "Gain",
    "GateBias",
    "Gates",
    "Linear",
    "LogitBias",
    "PatchConv",
    "Reshaped",
    "Scalar",
    "Slice",
    "Table",
    "Tied",
    "Vectors",
]


# Rows: pieces are vectors measured by RMS ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows(Atom):
    """Atoms made of rows measured by RMS over `_axes`; the other axes count rows."""

    @property
    def _axes(self) -> tuple[int, ...]:
        return (-1,)

    def piece_norms(self, w: Tensor) -> Tensor:
        return runtime.row_rms(w, self._axes)

    def unit_dual(self, w: Tensor) -> Tensor:
        norms = self.piece_norms(w)
        return runtime.working(w) * self.spread(runtime.piece_factors(norms, 1.0))

    def _draw(self, w: Tensor, generator: torch.Generator | None) -> Tensor:
        where = generator.device if generator is not None else w.device
        rows = torch.randn(self.shape, generator=generator, device=where).to(w.device)
        return rows / runtime.row_rms(rows, self._axes)


@dataclass(frozen=True)
class Embedding(_Rows):
    """Rows looked up, `[V, d]`: the largest RMS of a row."""

    kind: ClassVar[str] = "Embedding"
    is_matrix: ClassVar[bool] = True
    decays: ClassVar[bool] = True


@dataclass(frozen=True)
class Table(_Rows):
    """Added table with position axes (learned positions, class token): the largest RMS of a position's features."""

    feature_axes: tuple[int, ...] = (-1,)
    kind: ClassVar[str] = "Table"
    is_matrix: ClassVar[bool] = True
    decays: ClassVar[bool] = True

    @property
    def _axes(self) -> tuple[int, ...]:
        return self.feature_axes


@dataclass(frozen=True)
class Bias(_Rows):
    """Added vector, one number per feature: RMS over all entries."""

    kind: ClassVar[str] = "Bias"

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(len(self.shape)))

    def piece_norms(self, w: Tensor) -> Tensor:
        return runtime.row_rms(w, self._axes) if self.shape else runtime.working(w).abs()

    def initialize_(self, w: Tensor, norm: float = 1.0, generator: torch.Generator | None = None) -> None:
        """Zeros, whatever `norm`."""
        self._check(w)
        w.zero_()


@dataclass(frozen=True)
class GateBias(Bias):
    """The biases of a recurrent layer's gates in one tensor `[gates·out]`: the largest RMS of a gate's."""

    gates: int = 1
    kind: ClassVar[str] = "GateBias"

    def piece_norms(self, w: Tensor) -> Tensor:
        return runtime.row_rms(w.unflatten(0, (self.gates, -1)))

    def spread(self, numbers: Tensor) -> Tensor:
        return numbers.expand(-1, self.shape[0] // self.gates).flatten()

    def describe(self) -> str:
        return f"Bias {self.gates}× {self.shape[0] // self.gates}"


# Elementwise: max |.| -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Largest(Atom):
    """Atoms measured by the largest absolute entry; one piece, so `normalize_` scales the whole."""

    def piece_norms(self, w: Tensor) -> Tensor:
        return runtime.working(w).abs().max()

    def unit_dual(self, w: Tensor) -> Tensor:
        return torch.sgn(w) + (w - w)  # w - w keeps infinity visible, which sgn would hide


@dataclass(frozen=True)
class Gain(_Largest):
    """Elementwise factor (weights of norm layers, LayerScale): `max |g|`."""

    kind: ClassVar[str] = "Gain"

    def initialize_(self, w: Tensor, norm: float = 1.0, generator: torch.Generator | None = None) -> None:
        """Every entry `norm`."""
        self._check(w)
        w.fill_(norm)


@dataclass(frozen=True)
class LogitBias(_Largest):
    """Added to attention logits (relative position tables): `max |b|`."""

    kind: ClassVar[str] = "LogitBias"

    def initialize_(self, w: Tensor, norm: float = 1.0, generator: torch.Generator | None = None) -> None:
        """Zeros, whatever `norm`."""
        self._check(w)
        w.zero_()


@dataclass(frozen=True)
class Scalar(_Largest):
    """Temperatures, logit scales, numbers whose value has a meaning of its own (`A_log`, `dt_bias`): `max |.|`."""

    kind: ClassVar[str] = "Scalar"

    def initialize_(self, w: Tensor, norm: float = 1.0, generator: torch.Generator | None = None) -> None:
        """Nothing: the model's author chose the value."""
        self._check(w)


# Atoms of atoms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reshaped(Atom):
    """The op sees `w.reshape(stored).permute(permute).reshape(inner.shape)` of a tensor of shape `shape`.

    Everything is `inner`'s. Without `stored` or `permute` that step is left out.
    """

    inner: Atom
    permute: tuple[int, ...] | None = None
    stored: tuple[int, ...] | None = None
    kind: ClassVar[str] = "Reshaped"

    def __init__(
        self,
        inner: Atom,
        shape: tuple[int, ...],
        permute: tuple[int, ...] | None = None,
        stored: tuple[int, ...] | None = None,
    ):
        for name, value in (("shape", shape), ("inner", inner), ("permute", permute), ("stored", stored)):
            object.__setattr__(self, name, value)

    @property
    def is_matrix(self) -> bool:  # type: ignore[override]
        return self.inner.is_matrix

    @property
    def decays(self) -> bool:  # type: ignore[override]
        return self.inner.decays

    @property
    def typical_norm(self) -> float:
        return self.inner.typical_norm

    def read(self, w: Tensor) -> Tensor:
        """What the op sees of `w`: a view where there is one."""
        self._check(w)
        if self.stored is not None:
            w = w.reshape(self.stored)
        if self.permute is not None:
            w = w.permute(self.permute)
        return w.reshape(self.inner.shape)

    def _write_(self, w: Tensor, seen: Tensor) -> None:
        """Put back a changed `read(w)`; nothing to do if it is a view."""
        if seen.untyped_storage().data_ptr() == w.untyped_storage().data_ptr():
            return
        stored = self.stored or self.shape
        permute = self.permute or tuple(range(len(stored)))
        back = sorted(range(len(stored)), key=lambda axis: permute[axis])
        w.copy_(seen.reshape([stored[axis] for axis in permute]).permute(back).reshape(self.shape))

    def norm(self, w: Tensor) -> Tensor:
        return self.inner.norm(self.read(w))

    def start_vectors(self, w: Tensor) -> Vectors | None:
        return self.inner.start_vectors(self.read(w))

    def estimate(self, w: Tensor, vectors: Vectors | None = None) -> tuple[Tensor, Vectors | None]:
        return self.inner.estimate(self.read(w), vectors)

    def normalize_(self, w: Tensor, target: float | Tensor, vectors: Vectors | None = None) -> Vectors | None:
        seen = self.read(w)
        vectors = self.inner.normalize_(seen, target, vectors)
        self._write_(w, seen)
        return vectors

    def dualize_(self, w: Tensor, target: float | Tensor) -> None:
        seen = self.read(w)
        self.inner.dualize_(seen, target)
        self._write_(w, seen)

    def initialize_(self, w: Tensor, norm: float = 1.0, generator: torch.Generator | None = None) -> None:
        seen = self.read(w)
        self.inner.initialize_(seen, norm, generator)
        self._write_(w, seen)

    def project_(self, w: Tensor, bound: float | Tensor = 1.0) -> None:
        seen = self.read(w)
        self.inner.project_(seen, bound)
        self._write_(w, seen)

    def describe(self) -> str:
        return self.inner.describe()


@dataclass(frozen=True)
class Tied(Atom):
    """One tensor used several times: `Σ weights[i]·atoms[i].norm(w)`, by the triangle inequality.

    The uses share one tensor: one factor scales it, pieces do not saturate by themselves. Power vectors are the tuple
    of the atoms' vectors.
    """

    atoms: tuple[Atom, ...]
    weights: tuple[float, ...]
    kind: ClassVar[str] = "Tied"

    def __post_init__(self) -> None:
        if not self.atoms or len(self.atoms) != len(self.weights) or any(a.shape != self.shape for a in self.atoms):
            raise WeightError("Tied needs at least one atom, all of its own shape, and one weight for each.")

    @property
    def is_matrix(self) -> bool:  # type: ignore[override]
        return any(atom.is_matrix for atom in self.atoms)

    @property
    def decays(self) -> bool:  # type: ignore[override]
        return any(atom.decays for atom in self.atoms)

    def norm(self, w: Tensor) -> Tensor:
        return self.estimate(w)[0]

    def start_vectors(self, w: Tensor) -> Vectors | None:
        vectors = tuple(atom.start_vectors(w) for atom in self.atoms)
        return vectors if any(v is not None for v in vectors) else None

    def estimate(self, w: Tensor, vectors: Vectors | None = None) -> tuple[Tensor, Vectors | None]:
        given = vectors if isinstance(vectors, tuple) else (None,) * len(self.atoms)
        pairs = [atom.estimate(w, v) for atom, v in zip(self.atoms, given, strict=True)]
        total = torch.stack([weight * norm for weight, (norm, _) in zip(self.weights, pairs, strict=True)]).sum()
        return total, (tuple(v for _, v in pairs) if vectors is not None else None)

    def normalize_(self, w: Tensor, target: float | Tensor, vectors: Vectors | None = None) -> Vectors | None:
        norm, vectors = self.estimate(w, vectors)
        w.mul_(runtime.piece_factors(norm, target))
        return vectors

    def dualize_(self, w: Tensor, target: float | Tensor) -> None:
        """Replace `w` by the sum of the atoms' duals, each of norm 1 in its own atom, scaled to norm `target`.

        The dual of a sum of norms has no closed form. This is a direction of descent (every term is) of the right norm.
        """
        total = torch.zeros_like(runtime.working(w))
        for atom in self.atoms:
            dual = runtime.working(w).clone()
            atom.dualize_(dual, 1.0)
            total += dual
        self.normalize_(total, target)
        w.copy_(total)

    def initialize_(self, w: Tensor, norm: float = 1.0, generator: torch.Generator | None = None) -> None:
        """As the first matrix among the atoms (else the first atom) does it, then scaled to norm exactly `norm`; biases
        stay zero and scalars stay what they are."""
        first = next((atom for atom in self.atoms if atom.is_matrix), self.atoms[0])
        first.initialize_(w, 1.0, generator)
        if first.is_matrix or isinstance(first, Gain):
            self.normalize_(w, norm)

    def project_(self, w: Tensor, bound: float | Tensor = 1.0) -> None:
        norm = self.norm(w)
        w.mul_(torch.where(norm > bound, bound / norm, 1.0))

    def describe(self) -> str:
        return "Tied " + " + ".join(atom.describe() for atom in self.atoms)

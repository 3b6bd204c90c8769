"""Atoms whose pieces are matrices measured by their largest singular value. Import them from `modnorm_fx.atoms`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import runtime
from .atom_base import Atom, Vectors, shares

__all__ = ["Conv", "Experts", "Gates", "Linear", "PatchConv", "met_taps"]


@dataclass(frozen=True)
class _Spectral(Atom):
    """Atoms made of P equally shaped matrices, with norm `unit · max σ_max`."""

    is_matrix: ClassVar[bool] = True
    decays: ClassVar[bool] = True

    def matrices(self, w: Tensor) -> Tensor:
        """The pieces `[P, out, in]`, or `[P, in, out]` where they are stored so (singular values are the same); a view
        where there is one."""
        raise NotImplementedError

    def _assemble(self, pieces: Tensor) -> Tensor:
        """Inverse of `matrices`."""
        raise NotImplementedError

    @property
    def piece_shape(self) -> tuple[int, int, int]:
        """(P, out, in)."""
        raise NotImplementedError

    @property
    def unit(self) -> float:
        """The norm of a piece divided by its largest singular value."""
        _, out, into = self.piece_shape
        return math.sqrt(into / out)

    def piece_norms(self, w: Tensor) -> Tensor:
        return self.unit * runtime.spectral_norms(self.matrices(w))

    def start_vectors(self, w: Tensor) -> Tensor | None:
        self._check(w)
        if min(self.piece_shape[1:]) <= runtime.BLOCK:  # the exact norm costs no more
            return None
        return runtime.start_vectors(self.matrices(w))

    def _estimate(self, w: Tensor, vectors: Vectors) -> tuple[Tensor, Vectors | None]:
        assert isinstance(vectors, Tensor)
        norms, vectors = runtime.power_iteration(self.matrices(w), vectors)
        return self.unit * norms, vectors

    def unit_dual(self, w: Tensor) -> Tensor:
        factor, sigma = runtime.polar_factor(self.matrices(w))
        return self._assemble(factor * (shares(sigma) / self.unit)[:, None, None])

    def _draw(self, w: Tensor, generator: torch.Generator | None) -> Tensor:
        count, rows, columns = self.matrices(w).shape
        pieces = runtime.semi_orthogonal(count, rows, columns, generator=generator, device=w.device)
        return self._assemble(pieces / self.unit)


@dataclass(frozen=True)
class Linear(_Spectral):
    """`W x`: `√(in/out)·σ_max`. Shape `[out, in]`, or `[in, out]` when `transposed` (as in `addmm`)."""

    transposed: bool = False
    kind: ClassVar[str] = "Linear"

    @property
    def out(self) -> int:
        """Number of output features."""
        return self.shape[1 if self.transposed else 0]

    @property
    def into(self) -> int:
        """Number of input features."""
        return self.shape[0 if self.transposed else 1]

    @property
    def piece_shape(self) -> tuple[int, int, int]:
        return 1, self.out, self.into

    def matrices(self, w: Tensor) -> Tensor:
        return w.unsqueeze(0)

    def _assemble(self, pieces: Tensor) -> Tensor:
        return pieces[0]

    def describe(self) -> str:
        return f"Linear {self.into}→{self.out}"


def met_taps(kernel: Sequence[int], stride: Sequence[int] | None) -> int:
    """How many taps of a kernel meet in one output, at most; ``stride``: of a transposed convolution, else None."""
    return math.prod(-(-k // s) for k, s in zip(kernel, stride or (1,) * len(kernel), strict=True))


@dataclass(frozen=True)
class Conv(_Spectral):
    """Convolution: `K · max over taps and groups of √(in/out)·σ_max(W_tap,group)`, with in and out per group, for K
    taps that meet in one output.

    Shape `[out, in/groups, *kernel]`, or `[in, out/groups, *kernel]` when `transposed`. Any number of kernel axes. All
    taps meet in an output, whatever stride, padding and dilation are; of a transposed convolution every `stride`-th
    along each axis. Depthwise convolutions are the case `in/groups = 1`.
    """

    groups: int = 1
    transposed: bool = False
    stride: tuple[int, ...] | None = None
    kind: ClassVar[str] = "Conv"

    @property
    def taps(self) -> int:
        """Number of kernel positions K."""
        return math.prod(self.shape[2:])

    @property
    def met(self) -> int:
        """Number of taps that meet in one output, at most."""
        return met_taps(self.shape[2:], self.stride)

    @property
    def piece_shape(self) -> tuple[int, int, int]:
        first, second = self.shape[0] // self.groups, self.shape[1]
        out, into = (second, first) if self.transposed else (first, second)
        return self.groups * self.taps, out, into

    @property
    def unit(self) -> float:
        return self.met * super().unit

    @property
    def typical_norm(self) -> float:
        """√K: the outputs of K independent taps of norm 1/√K add up in quadrature to the scale of the input. Taps of a
        step agree and add up linearly, so a step of norm 1 still moves the output by its whole scale. Depthwise
        filters count as 1 (see `layer_rules.convolution`)."""
        return math.sqrt(self.met) if self.piece_shape[2] > 1 else 1.0

    def matrices(self, w: Tensor) -> Tensor:
        return w.reshape(self.groups, -1, self.shape[1], self.taps).permute(0, 3, 1, 2).flatten(0, 1)

    def _assemble(self, pieces: Tensor) -> Tensor:
        return pieces.unflatten(0, (self.groups, self.taps)).permute(0, 2, 3, 1).reshape(self.shape)

    def spread(self, numbers: Tensor) -> Tensor:
        per_group = numbers.view(self.groups, 1, *self.shape[2:])
        return per_group.repeat_interleave(self.shape[0] // self.groups, dim=0)

    def describe(self) -> str:
        _, out, into = self.piece_shape
        text = f"Conv {'×'.join(map(str, self.shape[2:]))} {into * self.groups}→{out * self.groups}"
        return text + (f" /{self.groups}" if self.groups > 1 else "") + (" transposed" if self.transposed else "")


@dataclass(frozen=True)
class PatchConv(_Spectral):
    """Convolution with stride = kernel, no padding, no groups: a Linear on flattened patches, `[out, in·K]`."""

    kind: ClassVar[str] = "PatchConv"

    @property
    def piece_shape(self) -> tuple[int, int, int]:
        return 1, self.shape[0], math.prod(self.shape[1:])

    def matrices(self, w: Tensor) -> Tensor:
        return w.flatten(1).unsqueeze(0)

    def _assemble(self, pieces: Tensor) -> Tensor:
        return pieces[0].reshape(self.shape)

    def describe(self) -> str:
        return f"PatchConv {'×'.join(map(str, self.shape[2:]))} {self.shape[1]}→{self.shape[0]}"


@dataclass(frozen=True)
class Experts(_Spectral):
    """Batched or grouped matmul, one matrix per expert: the largest Linear. Shape `[E, out, in]`, or `[E, in, out]`."""

    transposed: bool = False
    kind: ClassVar[str] = "Experts"

    @property
    def piece_shape(self) -> tuple[int, int, int]:
        experts, first, second = self.shape
        return (experts, second, first) if self.transposed else (experts, first, second)

    def matrices(self, w: Tensor) -> Tensor:
        return w

    def _assemble(self, pieces: Tensor) -> Tensor:
        return pieces

    def spread(self, numbers: Tensor) -> Tensor:
        return numbers[:, None, None]

    def describe(self) -> str:
        experts, out, into = self.piece_shape
        return f"Experts {experts}× {into}→{out}"


@dataclass(frozen=True)
class Gates(_Spectral):
    """The matrices of a recurrent layer's gates in one tensor, all applied to one input: the largest Linear. Shape
    `[gates·out, in]`."""

    gates: int = 1
    kind: ClassVar[str] = "Gates"

    @property
    def piece_shape(self) -> tuple[int, int, int]:
        return self.gates, self.shape[0] // self.gates, self.shape[1]

    def matrices(self, w: Tensor) -> Tensor:
        return w.unflatten(0, (self.gates, -1))

    def _assemble(self, pieces: Tensor) -> Tensor:
        return pieces.flatten(0, 1)

    def spread(self, numbers: Tensor) -> Tensor:
        return numbers.repeat_interleave(self.shape[0] // self.gates)[:, None]

    def describe(self) -> str:
        gates, out, into = self.piece_shape
        return f"Gates {gates}× {into}→{out}"

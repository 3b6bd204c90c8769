"""What a generated normaliser writes for each kind of atom: one short function per family of atoms.

All of it is about a stack `x` `[n, *shape]` of n updates, named by an expression. To add an atom, copy a neighbour:
`measure` says how the norms of its pieces are computed, `direct` what an update of norm 1 in the dual direction is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Protocol

from . import runtime
from .atoms import (
    Atom,
    Conv,
    Experts,
    GateBias,
    Gates,
    PatchConv,
    Reshaped,
    Tied,
)
from .atoms import _Largest as Largest
from .atoms import _Rows as Rows
from .matrix_atoms import _Spectral as Spectral

__all__ = ["Measured", "Writer", "direct", "measure", "single"]


class Writer(Protocol):
    """Where statements go."""

    def spectral(self, matrices: str) -> str:
        """Writes a power iteration on an expression; returns the name of the singular values."""

    def assign(self, hint: str, expression: str) -> str:
        """Writes an assignment to a new name; returns the name."""


@dataclass(frozen=True)
class Measured:
    """Norms of the pieces of n updates, `[n, …]`, as an expression.

    Attributes:
        norms: the expression.
        spread: from a name of numbers shaped like the norms to an expression that broadcasts against the stack.
        fills: the shape of what `spread` gives, without n: the atom's, or 1 where one number holds for all.
    """

    norms: str
    spread: Callable[[str], str]
    fills: tuple[int, ...]


def _same(numbers: str) -> str:
    return numbers


def _alone(atom: Atom, norms: str) -> Measured:
    """One number for each update."""
    axes = len(atom.shape)
    return Measured(norms, lambda f: f"{f}[:{', None' * axes}]" if axes else f, (1,) * axes)


@singledispatch
def measure(atom: Atom, x: str, out: Writer) -> Measured:
    """The norms of the atom's pieces in the stack that the expression `x` names."""
    raise NotImplementedError(f"no code for {type(atom).__name__}")


def single(atom: Atom, x: str) -> tuple[str, str] | None:
    """Of an atom that is one matrix with power vectors: its matrices in the stack `x` and its norm over their singular
    values ("" if that is 1), as expressions. Norms and factors of such a stack are one call, `rt.matrix_factors`."""
    if not isinstance(atom, Spectral) or isinstance(atom, (Conv, Experts, Gates)):
        return None
    if min(atom.piece_shape[1:]) <= runtime.BLOCK:
        return None
    return _matrices(atom, x), _unit(atom).removesuffix(" * ")


@singledispatch
def direct(atom: Atom, x: str, out: Writer) -> str:
    """The duals of norm 1 of the stack that the expression `x` names, as an expression."""
    raise NotImplementedError(f"no code for {type(atom).__name__}")


# Matrices -----------------------------------------------------------------------------------------------------------


@singledispatch
def _matrices(atom: Atom, x: str) -> str:
    """The atom's matrices as they are stored: `[n, R, C]`, or `[n, P, R, C]` for atoms of several."""
    return x


@singledispatch
def _assembled(atom: Atom, pieces: str) -> str:
    """Inverse of `_matrices`."""
    return pieces


def _unit(atom: Spectral) -> str:
    """The norm of a piece over its singular value, unfolded."""
    _, out, into = atom.piece_shape
    root = "" if into == out else f"sqrt({into} / {out}) * "
    return f"{atom.met} * {root}" if isinstance(atom, Conv) and atom.met > 1 else root


def _sigmas(atom: Spectral, x: str, out: Writer) -> str:
    matrices = _matrices(atom, x)
    return f"rt.exact({matrices})" if min(atom.piece_shape[1:]) <= runtime.BLOCK else out.spectral(matrices)


@measure.register
def _(atom: Spectral, x: str, out: Writer) -> Measured:
    alone = _alone(atom, _unit(atom) + _sigmas(atom, x, out))
    spread, fills = _spread_pieces(atom)
    return Measured(alone.norms, spread or alone.spread, fills or alone.fills)


@direct.register
def _(atom: Spectral, x: str, out: Writer) -> str:
    unit = _unit(atom).removesuffix(" * ")
    over = f" / ({unit})" if unit else ""
    return _assembled(atom, out.assign("d", f"rt.orthogonal({_matrices(atom, x)}){over}"))


@singledispatch
def _spread_pieces(atom: Atom) -> tuple[Callable[[str], str] | None, tuple[int, ...]]:
    """How the numbers `[n, P]` of the pieces spread; None if there is one piece."""
    return None, ()


@_matrices.register
def _(atom: PatchConv, x: str) -> str:
    return f"{x}.flatten(2)"


@_assembled.register
def _(atom: PatchConv, pieces: str) -> str:
    return f"{pieces}.unflatten(2, {atom.shape[1:]})"


@_spread_pieces.register
def _(atom: Experts) -> tuple[Callable[[str], str], tuple[int, ...]]:
    return lambda f: f"{f}[:, :, None, None]", (atom.shape[0], 1, 1)


@_matrices.register
def _(atom: Gates, x: str) -> str:
    return f"{x}.unflatten(1, ({atom.gates}, -1))"


@_assembled.register
def _(atom: Gates, pieces: str) -> str:
    return f"{pieces}.flatten(1, 2)"


@_spread_pieces.register
def _(atom: Gates) -> tuple[Callable[[str], str], tuple[int, ...]]:
    rows = atom.shape[0] // atom.gates
    return lambda f: f"{f}.repeat_interleave({rows}, 1)[:, :, None]", (atom.shape[0], 1)


@_matrices.register
def _(atom: Conv, x: str) -> str:
    if atom.groups == 1:
        return f"{x}.flatten(3).permute(0, 3, 1, 2)"
    return f"{x}.unflatten(1, ({atom.groups}, -1)).flatten(4).permute(0, 1, 4, 2, 3).flatten(1, 2)"


@_assembled.register
def _(atom: Conv, pieces: str) -> str:
    kernel = atom.shape[2:]
    if atom.groups == 1:
        return f"{pieces}.permute(0, 2, 3, 1).unflatten(3, {kernel})"
    apart = f"{pieces}.unflatten(1, ({atom.groups}, {atom.taps})).permute(0, 1, 3, 4, 2)"
    return f"{apart}.flatten(1, 2).unflatten(3, {kernel})"


@_spread_pieces.register
def _(atom: Conv) -> tuple[Callable[[str], str], tuple[int, ...]]:
    kernel, rows = atom.shape[2:], atom.shape[0] // atom.groups
    repeat = f".repeat_interleave({rows}, 1)" if atom.groups > 1 and rows > 1 else ""
    sizes = ", ".join(map(str, (atom.groups, 1, *kernel)))
    return lambda f: f"{f}.view(-1, {sizes}){repeat}", (1 if atom.groups == 1 else atom.shape[0], 1, *kernel)


# Rows and numbers ---------------------------------------------------------------------------------------------------


@measure.register
def _(atom: Rows, x: str, out: Writer) -> Measured:
    if not atom.shape:
        return Measured(f"rt.largest({x})", _same, ())
    axes = tuple(axis % len(atom.shape) for axis in atom._axes)
    fills = tuple(1 if axis in axes else size for axis, size in enumerate(atom.shape))
    return Measured(f"rt.row_rms({x}, {tuple(axis + 1 for axis in axes)})", _same, fills)


@measure.register
def _(atom: GateBias, x: str, out: Writer) -> Measured:
    size = atom.shape[0] // atom.gates
    norms = f"rt.row_rms({x}.unflatten(1, ({atom.gates}, {size})))"
    return Measured(norms, lambda f: f"{f}.expand(-1, -1, {size}).flatten(1)", atom.shape)


@measure.register
def _(atom: Largest, x: str, out: Writer) -> Measured:
    return Measured(f"rt.largest({x})", _same, (1,) * len(atom.shape))


@direct.register
def _(atom: Largest, x: str, out: Writer) -> str:
    return f"rt.sign({x})"


@direct.register
def _(atom: Rows, x: str, out: Writer) -> str:
    measured = measure(atom, x, out)
    factors = out.assign("f", f"rt.factors({measured.norms})")
    return out.assign("d", f"{x} * {measured.spread(factors)}")


# Atoms of atoms -----------------------------------------------------------------------------------------------------


def _seen(atom: Reshaped, x: str) -> str:
    """`Reshaped.read` for a stack."""
    if atom.stored is not None and atom.stored != atom.shape:
        x += f".reshape(-1, {', '.join(map(str, atom.stored))})"
    if atom.permute is not None:
        x += f".permute(0, {', '.join(str(axis + 1) for axis in atom.permute)})"
    permuted = _permuted(atom)
    return x if permuted == atom.inner.shape else x + f".reshape(-1, {', '.join(map(str, atom.inner.shape))})"


def _permuted(atom: Reshaped) -> tuple[int, ...]:
    stored = atom.stored or atom.shape
    return tuple(stored[axis] for axis in atom.permute) if atom.permute is not None else tuple(stored)


def _back(atom: Reshaped, seen: str) -> str:
    """Inverse of `_seen`, for a stack of the inner atom's full shape."""
    permuted = _permuted(atom)
    if permuted != atom.inner.shape:
        seen += f".reshape(-1, {', '.join(map(str, permuted))})"
    if atom.permute is not None:
        back = sorted(range(len(atom.permute)), key=lambda axis: atom.permute[axis])  # type: ignore[index]
        seen += f".permute(0, {', '.join(str(axis + 1) for axis in back)})"
    stored = tuple(atom.stored or atom.shape)
    return seen if stored == atom.shape else seen + f".reshape(-1, {', '.join(map(str, atom.shape))})"


@measure.register
def _(atom: Reshaped, x: str, out: Writer) -> Measured:
    inner = measure(atom.inner, _seen(atom, x), out)
    if math.prod(inner.fills) == 1:
        zeros = ", 0" * len(inner.fills)
        alone = _alone(atom, inner.norms)
        return Measured(alone.norms, lambda f: alone.spread(f"{inner.spread(f)}[:{zeros}]"), alone.fills)
    sizes = ", ".join(map(str, atom.inner.shape))
    return Measured(inner.norms, lambda f: _back(atom, f"{inner.spread(f)}.expand(-1, {sizes})"), atom.shape)


@direct.register
def _(atom: Reshaped, x: str, out: Writer) -> str:
    return _back(atom, direct(atom.inner, _seen(atom, x), out))


def _sum(atom: Tied, x: str, out: Writer) -> str:
    terms = [
        f"{weight!r} * rt.most({measure(part, x, out).norms})"
        for weight, part in zip(atom.weights, atom.atoms, strict=True)
    ]
    return " + ".join(terms)


@measure.register
def _(atom: Tied, x: str, out: Writer) -> Measured:
    return _alone(atom, _sum(atom, x, out))


@direct.register
def _(atom: Tied, x: str, out: Writer) -> str:
    total = out.assign("d", " + ".join(direct(part, x, out) for part in atom.atoms))
    factors = out.assign("f", f"rt.factors({_sum(atom, total, out)})")
    return out.assign("d", f"{total} * {_alone(atom, factors).spread(factors)}")

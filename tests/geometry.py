"""Norms of weights and updates written down once more, in numpy and by loops: nothing of it calls an atom's methods."""

from __future__ import annotations

import math

import numpy as np

from modnorm_fx.atoms import Atom, Slice

Array = np.ndarray


def part(array: Array, slices: tuple[Slice, ...]) -> Array:
    """Entries with `start <= i % period < stop` along the axis, slice after slice."""
    for s in slices:
        index = [i for i in range(array.shape[s.axis]) if s.start <= i % s.period < s.stop]
        array = np.take(array, index, axis=s.axis)
    return array


def spectral(matrix: Array) -> float:
    """The norm of `x → matrix x` from RMS to RMS; `[out, in]`."""
    out, into = matrix.shape
    return math.sqrt(into / out) * float(np.linalg.svd(matrix, compute_uv=False)[0])


def rms(array: Array) -> float:
    return math.sqrt(float(np.mean(np.square(array))))


def convolution(w: Array, groups: int, transposed: bool) -> list[float]:
    """Number of taps times the norm of each tap in each group."""
    taps = math.prod(w.shape[2:])
    flat = w.reshape(w.shape[0], w.shape[1], taps)
    size = w.shape[0] // groups
    blocks = [flat[g * size : (g + 1) * size, :, t] for g in range(groups) for t in range(taps)]
    return [taps * spectral(b.T if transposed else b) for b in blocks]


def pieces(atom: Atom, w: Array) -> list[float]:
    """The norms whose largest is the norm, by the kind of the atom."""
    match atom.kind:
        case "Linear":
            return [spectral(w.T if atom.transposed else w)]
        case "Conv":
            return convolution(w, atom.groups, atom.transposed)
        case "PatchConv":
            return [spectral(w.reshape(w.shape[0], -1))]
        case "Experts":
            return [spectral(e.T if atom.transposed else e) for e in w]
        case "Gates":
            return [spectral(g) for g in np.split(w, atom.gates, axis=0)]
        case "Embedding":
            return [rms(row) for row in w.reshape(-1, w.shape[-1])]
        case "Table":
            features = [a % w.ndim for a in atom.feature_axes]
            rows = np.moveaxis(w, features, range(w.ndim - len(features), w.ndim))
            return [rms(row) for row in rows.reshape(-1, math.prod(w.shape[a] for a in features))]
        case "Bias":
            return [rms(w)]
        case "GateBias":
            return [rms(g) for g in np.split(w, atom.gates, axis=0)]
        case "Gain" | "LogitBias" | "Scalar":
            return [float(np.abs(w).max())]
        case "Reshaped":
            seen = w.reshape(atom.stored) if atom.stored is not None else w
            seen = np.transpose(seen, atom.permute) if atom.permute is not None else seen
            return pieces(atom.inner, seen.reshape(atom.inner.shape))
        case "Tied":
            terms = zip(atom.weights, atom.atoms, strict=True)
            return [sum(factor * max(pieces(a, w)) for factor, a in terms)]
    raise AssertionError(f"no geometry is written down for {atom.kind}")


def norm(atom: Atom, w: Array) -> float:
    return max(pieces(atom, w))

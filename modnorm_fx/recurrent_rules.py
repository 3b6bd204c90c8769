"""Rules for recurrent layers that ATen keeps as one op: LSTM, GRU, RNN; any depth, both directions, packed or not.

Every matrix of a layer has norm 1, so its pre-activations have RMS ``√(s² + h²)`` for inputs of scale s and states of
scale h. Two things are followed over the time steps, both in quadrature: the scales of the states, and the response of
the output to a change. A change of x, of a state or of a weight counts as independent from step to step, as inputs do;
the gates are near σ(0) = 1/2, so that a change is forgotten within a few steps. What changes slowly (a bias, the smooth
output of a layer below) adds up over that time: its response is up to twice as large.

Numbers are typical ones under every convention: a recurrence whose matrices have norm 1 has no bound that holds for
every length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from . import weight_atoms as atom_of
from .quadrature import gaussian_moments
from .rules import Call, Local, RuleTable

__all__ = ["RECURRENT"]

aten = torch.ops.aten
RECURRENT = RuleTable()

OVER_TIME = "scales and responses of the recurrence over its time steps, in quadrature, at matrices of norm 1"
#: a longer sequence has the averages of this many steps: its states are stationary after some ten
LONGEST = 512
#: states that change by less than this relative amount count as stationary
STATIONARY = 1e-6


@dataclass(frozen=True)
class _Step:
    """One time step: the new states' scales (h first), and for each new state the squared response to a unit change of
    the input's and of the recurrent pre-activations, and of each old state."""

    scales: tuple[float, ...]
    x: tuple[float, ...]
    u: tuple[float, ...]
    states: tuple[tuple[float, ...], ...]


_Cell = Callable[[float, Sequence[float]], _Step]


@lru_cache(maxsize=4096)
def _moments(function: Callable[[torch.Tensor], torch.Tensor], scale: float) -> tuple[float, float]:
    return gaussian_moments(function, scale)


def _rnn(function: Callable[[torch.Tensor], torch.Tensor]) -> _Cell:
    """``h' = f(Wx + Uh)``."""

    def step(s: float, states: Sequence[float]) -> _Step:
        value, slope = _moments(function, math.hypot(s, states[0]))
        return _Step((value,), (slope**2,), (slope**2,), ((slope**2,),))

    return step


def _lstm(s: float, states: Sequence[float]) -> _Step:
    """``c' = σ_f c + σ_i tanh_g``, ``h' = σ_o tanh(c')``; every gate has its own ``Wx + Uh``."""
    h, c = states
    v = math.hypot(s, h)
    gate, gate_slope = _moments(torch.sigmoid, v)
    g, g_slope = _moments(torch.tanh, v)
    new_c = math.hypot(gate * c, gate * g)
    out, out_slope = _moments(torch.tanh, new_c)
    into_c = (gate_slope * c) ** 2 + (gate_slope * g) ** 2 + (gate * g_slope) ** 2
    through = (gate * out_slope) ** 2
    into_h = through * into_c + (gate_slope * out) ** 2
    moved = (into_h, into_c)
    return _Step((gate * out, new_c), moved, moved, (moved, (through * gate**2, gate**2)))


def _gru(s: float, states: Sequence[float]) -> _Step:
    """``n = tanh(W_n x + σ_r U_n h)``, ``h' = (1-σ_z) n + σ_z h``; ``1-σ`` is distributed as σ is."""
    (h,) = states
    gate, gate_slope = _moments(torch.sigmoid, math.hypot(s, h))
    n, n_slope = _moments(torch.tanh, math.hypot(s, gate * h))
    through, by_r, by_z = (gate * n_slope) ** 2, (gate_slope * h) ** 2, gate_slope**2 * (n**2 + h**2)
    x, u = through * (1 + by_r) + by_z, through * (gate**2 + by_r) + by_z
    return _Step((math.hypot(gate * n, gate * h),), (x,), (u,), ((u + gate**2,),))


def _run(cell: _Cell, s: float, start: Sequence[float], length: int) -> tuple[list[_Step], list[Sequence[float]]]:
    """The steps, and the states' scales before each."""
    steps: list[_Step] = []
    before: list[Sequence[float]] = []
    states = tuple(start)
    for _ in range(min(length, LONGEST)):
        before.append(states)
        if len(before) > 1 and all(math.isclose(a, b, rel_tol=STATIONARY) for a, b in zip(*before[-2:], strict=True)):
            steps.append(steps[-1])
        else:
            steps.append(cell(s, states))
        states = steps[-1].scales
    return steps, before


def _response(
    steps: Sequence[_Step],
    *,
    x: float = 0.0,
    u: Sequence[float] | None = None,
    out: Sequence[float] | None = None,
    start: Sequence[float] | None = None,
) -> float:
    """RMS over time of the change of h, for changes of these sizes: ``x`` of the input's pre-activations at every step,
    ``u`` of the recurrent ones, ``out`` of h itself, ``start`` of the first states."""
    change = [v**2 for v in start or [0.0] * len(steps[0].scales)]
    total = 0.0
    for t, step in enumerate(steps):
        change = [
            step.x[i] * x**2
            + (step.u[i] * u[t] ** 2 if u else 0.0)
            + sum(step.states[j][i] * change[j] for j in range(len(change)))
            for i in range(len(change))
        ]
        if out:
            change[0] += out[t] ** 2
        total += change[0]
    return math.sqrt(total / len(steps))


@dataclass(frozen=True)
class _Layer:
    """Of one layer: the scale of its output, and the response of the output (per direction) to a unit change of the
    input, of the first states, and of each parameter in the op's order."""

    scale: float
    x: float
    start: tuple[float, ...]
    parameters: tuple[float, ...]


def _layer(cell: _Cell, s: float, start: Sequence[float], length: int, parameters: int) -> _Layer:
    """``parameters``: 2 matrices, or 4 with biases, and 1 more with a projection."""
    steps, before = _run(cell, s, start, length)
    old, new = [states[0] for states in before], [step.scales[0] for step in steps]
    scale = math.sqrt(sum(h * h for h in new) / len(new))
    x = _response(steps, x=1.0)
    found = [s * x, _response(steps, u=old)]
    if parameters >= 4:
        found += [x, _response(steps, u=[1.0] * len(steps))]
    if parameters % 2:
        found.append(_response(steps, out=new))
    unit = [[float(i == j) for i in range(len(start))] for j in range(len(start))]
    return _Layer(scale, x, tuple(_response(steps, start=one) for one in unit), tuple(found))


def _recurrence(call: Call, cell: _Cell, name: str) -> Local:
    """Layers one after the other; those before the last reach the output through the inputs of those after them."""
    packed = "batch_sizes" in call.args
    time = 0 if packed or not call["batch_first"] else 1
    length = call.shape("batch_sizes" if packed else name)[time]
    layers, directions = int(call["num_layers"]), 2 if call["bidirectional"] else 1
    states: Any = call["hx"]
    pair = isinstance(states, list | tuple)
    start = [call.scale("hx", i) for i in range(len(states))] if pair else [call.scale("hx")]
    each = len(call["params"]) // (layers * directions)
    found: list[_Layer] = []
    s = call.scale(name)
    for _ in range(layers):
        found.append(_layer(cell, s, start, length, each))
        s = found[-1].scale
    after = [math.prod(layer.x for layer in found[i + 1 :]) for i in range(layers)]
    share = 1 / math.sqrt(directions)
    params = [
        value * later * share
        for layer, later in zip(found, after, strict=True)
        for _ in range(directions)
        for value in layer.parameters
    ]
    first = [
        math.hypot(*(layer.start[i] * later for layer, later in zip(found, after, strict=True)))
        for i in range(len(start))
    ]
    return Local(s, {name: after[0] * found[0].x, "hx": first if pair else first[0], "params": params})


@RECURRENT.rule(aten.lstm.input, aten.lstm.data, status="typical", source=OVER_TIME, weights={"params": atom_of.gates})
def lstm(call: Call) -> Local:
    return _recurrence(call, _lstm, "data" if "data" in call.args else "input")


@RECURRENT.rule(aten.gru.input, aten.gru.data, status="typical", source=OVER_TIME, weights={"params": atom_of.gates})
def gru(call: Call) -> Local:
    return _recurrence(call, _gru, "data" if "data" in call.args else "input")


@RECURRENT.rule(aten.rnn_tanh.input, aten.rnn_tanh.data, status="typical", source=OVER_TIME,
                weights={"params": atom_of.gates})  # fmt: skip
def rnn_tanh(call: Call) -> Local:
    return _recurrence(call, _rnn(torch.tanh), "data" if "data" in call.args else "input")


@RECURRENT.rule(aten.rnn_relu.input, aten.rnn_relu.data, status="typical", source=OVER_TIME,
                weights={"params": atom_of.gates})  # fmt: skip
def rnn_relu(call: Call) -> Local:
    return _recurrence(call, _rnn(torch.relu), "data" if "data" in call.args else "input")


@RECURRENT.rule(aten._pack_padded_sequence.default, aten._pad_packed_sequence.default, status="declared",
                source="moves the entries of sequences of different lengths; padding aside")  # fmt: skip
def packing(call: Call) -> Local:
    name = "data" if "data" in call.args else "input"
    return Local(call.scale(name), {name: 1.0})

"""Calls of single ops as rules see them, and what sampled Jacobians say of the same calls.

An example gives the op's arguments: `T` for an activation of a tracked scale, `W` for a weight of norm 1, plain values
(also index tensors) as they are. Everything measured here uses only autograd and singular values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from modnorm_fx.conventions import TRACKED, Convention
from modnorm_fx.quadrature import Sign
from modnorm_fx.rules import Call, Operand, arguments, operands

torch.set_num_threads(1)  # small tensors: more threads only wait for each other


@dataclass(frozen=True, eq=False)
class T:
    """An activation. draw: gauss | sign (entries ±scale) | rows (last axis of RMS exactly scale) | constant |
    positive | pairs | complex (size of the modulus)."""

    shape: tuple[int, ...]
    scale: float = 1.0
    draw: str = "gauss"

    @property
    def dtype(self) -> torch.dtype:
        return torch.complex128 if self.draw == "complex" else torch.float64

    def start(self, g: torch.Generator) -> Tensor:
        return self.sample(g)

    def sample(self, g: torch.Generator) -> Tensor:
        x = torch.randn(self.shape, generator=g, dtype=torch.float64)
        if self.draw == "complex":
            return self.scale * torch.randn(self.shape, generator=g, dtype=torch.complex128)
        if self.draw == "sign":
            return self.scale * x.sign()
        if self.draw == "rows":
            return self.scale * x / x.square().mean(-1, keepdim=True).sqrt()
        if self.draw == "constant":
            return torch.full(self.shape, self.scale, dtype=torch.float64)
        if self.draw == "positive":
            return self.scale * x.abs()
        if self.draw == "pairs":  # as many positive entries as negative ones, of the same sizes
            half = x.flatten()[: x.numel() // 2].abs()
            return self.scale * torch.cat([half, -half]).reshape(self.shape) / half.square().mean().sqrt()
        return self.scale * x


def _orthogonal(g: torch.Generator, out: int, into: int) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(max(out, into), min(out, into), generator=g, dtype=torch.float64))
    return q if out >= into else q.T


@dataclass(frozen=True, eq=False)
class W:
    """A weight; `kind` says how it is used, hence what norm 1 means. `same_taps`: one matrix for all taps."""

    kind: str
    shape: tuple[int, ...]
    groups: int = 1
    same_taps: bool = False

    dtype = torch.float64

    @property
    def scale(self) -> float:
        """The norm it is declared to have: biases start at zero."""
        return 0.0 if self.kind == "bias" else 1.0

    def start(self, g: torch.Generator) -> Tensor:
        return self.scale * self.sample(g)

    def sample(self, g: torch.Generator) -> Tensor:
        """Of norm 1 by construction."""
        if self.kind == "linear":
            out, into = self.shape
            return math.sqrt(out / into) * _orthogonal(g, out, into)
        if self.kind == "linear_t":
            return W("linear", self.shape[::-1]).sample(g).T
        if self.kind == "bilinear":
            return W("linear", (self.shape[0], math.prod(self.shape[1:]))).sample(g).reshape(self.shape)
        if self.kind == "gates":
            piece = (self.shape[0] // self.groups, *self.shape[1:])
            return torch.cat([W("linear", piece).sample(g) for _ in range(self.groups)])
        if self.kind == "experts_t":
            return torch.stack([W("linear_t", self.shape[1:]).sample(g) for _ in range(self.shape[0])])
        if self.kind in ("conv", "conv_t"):
            taps, w = (
                math.prod(self.shape[2:]),
                torch.empty(*self.shape[:2], math.prod(self.shape[2:]), dtype=torch.float64),
            )
            for group in w.split(self.shape[0] // self.groups):
                a, b = group.shape[:2]
                for t in range(taps):
                    if t == 0 or not self.same_taps:
                        tap = (
                            W("linear", (b, a)).sample(g).T if self.kind == "conv_t" else W("linear", (a, b)).sample(g)
                        )
                    group[:, :, t] = tap / taps
            return w.reshape(self.shape)
        if self.kind in ("embedding", "bias", "table"):
            x = torch.randn(self.shape, generator=g, dtype=torch.float64)
            return x / x.square().mean(-1, keepdim=True).sqrt()
        if self.kind == "gain":
            return torch.randn(self.shape, generator=g, dtype=torch.float64).sign()
        raise AssertionError(self.kind)


@dataclass(frozen=True, eq=False)
class Example:
    """How to call an op.

    Attributes:
        args, kwargs: the call.
        check: what to hold the numbers to; by default the row's status. See test_aten_rules.
        scale: whether the output's scale is checked as well.
        features: feature axes of the output. of_first: those of the first operand, where the rule asks for them.
        averages: arguments (by position) whose rows sum to 1.
        run: the op to measure, where the row's own has no CPU kernel.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    check: str = ""
    scale: bool = True
    features: frozenset[int] = frozenset({-1})
    of_first: frozenset[int] = frozenset()
    averages: tuple[int | tuple[int, int], ...] = ()
    run: Callable[..., Any] | None = None


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple | list) else value


def sizes(value: Tensor) -> Tensor:
    """Entries, or moduli."""
    return value.abs() if value.is_complex() else value


def real(value: Tensor) -> Tensor:
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def build(op: Any, example: Example, convention: Convention = TRACKED) -> tuple[Call, dict[fx.Node, T | W]]:
    """The Call that a rule is given for an example."""
    graph, specs = fx.Graph(), {}

    def node(value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(v, T | W | Tensor) for v in value):
            return [node(v) for v in value]
        if not isinstance(value, T | W | Tensor):
            return value
        n = graph.placeholder(f"x{len(list(graph.nodes))}")
        n.meta["val"] = (
            value if isinstance(value, Tensor) else torch.empty(value.shape, dtype=value.dtype, device="meta")
        )
        if not isinstance(value, Tensor):
            specs[n] = value
        return n

    args = tuple(node(a) for a in example.args)
    call = graph.call_function(example.run if isinstance(op, str) else op, args, example.kwargs)
    g = torch.Generator().manual_seed(0)
    values = {n: spec.start(g) for n, spec in specs.items()}
    call.meta["val"] = (example.run or op)(*_filled(args, values), **example.kwargs)
    rank = first(call.meta["val"]).dim()
    key, named = arguments(call, nn.Module())
    weights = frozenset(o for o, n in operands(named) if isinstance(specs.get(n), W))
    features = {call: frozenset(a % rank for a in example.features if rank)}
    if example.of_first:
        features[args[0]] = frozenset(a % args[0].meta["val"].dim() for a in example.of_first)
    averages = frozenset(args[i[0]][i[1]] if isinstance(i, tuple) else args[i] for i in example.averages)
    constants = {n for _, n in operands(named) if n not in specs and n.meta["val"].is_floating_point()}
    measured = {n: float(n.meta["val"].square().mean().sqrt()) if convention.tracks_scales else 1.0 for n in constants}
    scales = (
        measured
        | {n: spec.scale if convention.tracks_scales else 1.0 for n, spec in specs.items()}
        | dict.fromkeys(averages, 1.0)
    )
    signs = {n: Sign.POSITIVE for n, spec in specs.items() if isinstance(spec, T) and spec.draw == "positive"}
    return Call(call, named, scales, features, convention, weights, averages, signs), specs


def _filled(args: Any, values: dict[fx.Node, Tensor]) -> Any:
    return fx.map_arg(args, lambda n: values[n] if n in values else n.meta["val"])


@dataclass
class Measured:
    """Of one operand: the typical sensitivity √(‖J‖_F²/n_y), that of each draw, and the bound σ_max(J)·√(n_x/n_y)."""

    typical: float = 0.0
    bound: float = 0.0
    ones: float = 0.0  #: RMS of the output's change when all entries move alike
    each: list[float] = field(default_factory=list)


def measure(
    call: Call, specs: dict[fx.Node, T | W], example: Example, draws: int
) -> tuple[float, dict[Operand, Measured]]:
    """RMS of the output, and for every activation operand what its Jacobian says."""
    g = torch.Generator().manual_seed(1)
    wanted = [(o, n) for o, n in operands(call.args) if isinstance(specs.get(n), T)]
    found = {o: Measured() for o, _ in wanted}
    run = example.run or call.node.target
    squares = []
    for draw in range(20 * draws):  # outputs are cheaper than Jacobians
        values = {n: spec.start(g) for n, spec in specs.items()}
        if draw >= draws or not wanted:
            squares.append(
                float(sizes(first(run(*_filled(call.node.args, values), **call.node.kwargs))).square().mean())
            )
            continue
        for _, n in wanted:
            values[n].requires_grad_()
        y = first(run(*_filled(call.node.args, values), **call.node.kwargs))
        squares.append(float(sizes(y.detach()).square().mean()))
        flat, sources = real(y).reshape(-1), [values[n] for _, n in wanted]
        unit = torch.eye(flat.numel(), dtype=flat.dtype)
        rows = [torch.autograd.grad(flat, sources, e, retain_graph=True, allow_unused=True) for e in unit]
        for at, (o, n) in enumerate(wanted):
            zero = torch.zeros_like(values[n])
            jacobian = torch.stack([(row[at] if row[at] is not None else zero).reshape(-1) for row in rows])
            n_x = jacobian.shape[1]
            n_y = y.numel()
            if jacobian.is_complex():  # a change whose modulus has RMS 1: each part has 1/√2
                jacobian = torch.view_as_real(jacobian).flatten(1) / math.sqrt(2)
            m = found[o]
            m.each.append(math.sqrt(float(jacobian.square().sum()) / n_y))
            m.bound = max(m.bound, float(torch.linalg.matrix_norm(jacobian, 2)) * math.sqrt(n_x / n_y))
            m.ones = max(m.ones, float(jacobian.sum(1).square().mean().sqrt()))
    for m in found.values():
        m.typical = math.sqrt(sum(v * v for v in m.each) / draws)
    return math.sqrt(sum(squares) / len(squares)), found


def rms_over(y: Tensor, features: frozenset[int]) -> Tensor:
    """The norm of an activation: largest RMS over features of a position."""
    axes = [a % y.dim() for a in features] if y.dim() else []
    return y.square().mean(axes).sqrt().max() if axes else y.abs().max()


@dataclass
class Moves:
    """Sizes of f(w + Δ) - f(w) for random Δ of norm 1: in the norm of activations, and as plain RMS."""

    norm: list[float] = field(default_factory=list)
    rms: list[float] = field(default_factory=list)


def moves_of(
    call: Call, specs: dict[fx.Node, T | W], example: Example, draws: int, kinds: type
) -> dict[Operand, Moves]:
    """For each operand that is a `kinds` (`W`, or `T` of ops linear in their signal, moved by 1 at every position)."""
    g = torch.Generator().manual_seed(2)
    out: dict[Operand, Moves] = {}
    run = example.run or call.node.target
    for draw in range(draws):
        values = {n: spec.start(g) for n, spec in specs.items()}
        for o, n in operands(call.args):
            spec = specs.get(n)
            if not isinstance(spec, kinds):
                continue
            if isinstance(spec, T):  # ±1 everywhere; once the same everywhere
                step = T(spec.shape, 1.0, "sign" if draw else "constant").sample(g)
            else:
                step = spec.sample(g)
            before = first(run(*_filled(call.node.args, values), **call.node.kwargs))
            after = first(run(*_filled(call.node.args, values | {n: values[n] + step}), **call.node.kwargs))
            moves = out.setdefault(o, Moves())
            moves.norm.append(float(rms_over(after - before, example.features)))
            moves.rms.append(float((after - before).square().mean().sqrt()))
    return out


def grid_moments(function, scale: float, n: int = 60_001) -> tuple[float, float]:
    """The same two numbers by the trapezoidal rule; the slope by central differences."""
    z = torch.linspace(-12, 12, n, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    step = 1e-6 * scale
    slope = (function(scale * z + step) - function(scale * z - step)) / (2 * step)
    return tuple(float(torch.trapezoid(density * v.square(), z).sqrt()) for v in (function(scale * z), slope))

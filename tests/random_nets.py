"""Random nets as programs: the same net as a module, and as scales and paths written down without any of our code."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from modnorm_fx.passes.feature_axes import feature_axes
from modnorm_fx.passes.propagate_scales import Scales, propagate_scales
from modnorm_fx.passes.propagate_sensitivity import Sensitivities, propagate_sensitivity
from modnorm_fx.passes.type_atoms import Weight
from staged import Staged, stage
from torch import Tensor, nn
from torch.nn import functional as F

from modnorm_fx.conventions import PAPER, TRACKED, Convention

WIDTH = 8
CONVENTIONS = (PAPER, TRACKED)
Step = tuple  # (op, operand, ...) by index of the value; value 0 is the input

indices = st.integers(0, 100)
steps = st.one_of(
    st.tuples(st.sampled_from(["linear", "relu", "norm", "gain", "bias"]), indices),
    st.tuples(st.just("scale"), indices, st.sampled_from([-2.0, -0.5, 0.3, 1.5])),
    st.tuples(st.sampled_from(["add", "mul", "join"]), indices, indices),
)
#: the last step joins everything that nothing else uses, so that all values reach the output
programs = st.lists(steps, min_size=2, max_size=9).map(lambda p: resolve([("linear", 0), *p]))


def resolve(program: list[Step]) -> list[Step]:
    """Operands become indices of earlier values; values without a user are added up at the end."""
    out: list[Step] = []
    for k, (op, *rest) in enumerate(program):
        count = 1 if op not in ("add", "mul", "join") else 2
        operands = [v % (k + 1) for v in rest[:count]]
        if op == "mul" and operands[0] == operands[1]:
            operands[1] = (operands[0] + 1) % (k + 1)
            op = op if operands[0] != operands[1] else "add"
        out.append((op, *operands, *rest[count:]))
    used = {v for op, *rest in out for v in (rest[:2] if op in ("add", "mul", "join") else rest[:1])}
    loose = [k for k in range(1, len(out) + 1) if k not in used]
    while len(loose) > 1:
        out.append(("add", loose.pop(), loose.pop()))
        loose.append(len(out))
    return out


class Net(nn.Module):
    """The program as a module; parameters are called ``p<step>``, ``b<step>``."""

    def __init__(self, program: list[Step]):
        super().__init__()
        self.program = program
        for k, (op, *_) in enumerate(program):
            shape = {"linear": (WIDTH, WIDTH), "gain": (WIDTH,), "bias": (WIDTH,), "join": (WIDTH, 2 * WIDTH)}.get(op)
            if shape:
                setattr(self, f"p{k}", nn.Parameter(torch.ones(shape)))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for k, (op, *a) in enumerate(self.program):
            p, v = getattr(self, f"p{k}", None), values[a[0]]
            match op:
                case "linear":
                    y = F.linear(v, p)
                case "relu":
                    y = F.relu(v)
                case "norm":
                    y = F.layer_norm(v, (WIDTH,))
                case "gain":
                    y = v * p
                case "bias":
                    y = v + p
                case "scale":
                    y = a[1] * v
                case "add":
                    y = v + values[a[1]]
                case "mul":
                    y = v * values[a[1]]
                case "join":
                    y = F.linear(torch.cat([v, values[a[1]]], -1), p)
            values.append(y)
        return values[-1]


@dataclass
class Paths:
    """The program as edges (from value, to value, sensitivity), and the gain of every parameter at its value."""

    scales: list[float] = field(default_factory=lambda: [1.0])
    edges: list[tuple[int, int, float]] = field(default_factory=list)
    gains: dict[str, tuple[int, float]] = field(default_factory=dict)

    def from_value(self, start: int) -> list[float]:
        """The product of the edges of every path to the output."""
        if start == len(self.scales) - 1:
            return [1.0]
        return [value * rest for a, b, value in self.edges if a == start for rest in self.from_value(b)]


def written_down(program: list[Step], convention: Convention) -> Paths:
    """Local rules by hand: arXiv 2405.14813 for ``paper``, expectations on independent terms for ``tracked``."""
    out, tracked, half = Paths(), convention is TRACKED, math.sqrt(0.5)
    for k, (op, *a) in enumerate(program):
        s = out.scales[a[0]]
        t = out.scales[a[1]] if op in ("add", "mul", "join") else 0.0
        values = {
            "linear": (s, [1.0], s),
            "relu": (s * half, [half], None),
            "norm": (1.0, [1 / s], None),
            "gain": (s, [1.0], s),
            "bias": (s, [1.0], 1.0),
            "scale": (s * abs(a[-1]), [abs(a[-1])], None),
            "add": (math.hypot(s, t), [1.0, 1.0], None),
            "mul": (s * t, [t, s], None),
            "join": (half * math.hypot(s, t), [half, half] if tracked else [1.0, 1.0], half * math.hypot(s, t)),
        }
        scale, slopes, gain = values[op]
        out.edges += [(v, k + 1, slope) for v, slope in zip(a, slopes, strict=False)]
        if gain is not None:
            out.gains[f"p{k}"] = (k + 1, gain if tracked else 1.0)
        out.scales.append(scale if tracked else 1.0)
    return out


def expected_gains(program: list[Step], convention: Convention) -> dict[str, float]:
    """Change of the output, relative to its scale, per unit of each weight's norm: all paths, one by one."""
    paths = written_down(program, convention)
    output = paths.scales[-1]
    return {name: gain * convention.add(paths.from_value(at)) / output for name, (at, gain) in paths.gains.items()}


@dataclass
class Facts:
    staged: Staged
    weights: tuple[Weight, ...]
    scales: Scales
    sensitivities: Sensitivities


def facts(
    model: nn.Module, convention: Convention, *inputs: Tensor, unknown: str = "error", staged: Staged | None = None
) -> Facts:
    """The inferring passes on a graph that no pass has rewritten (unless it was)."""
    staged = staged or stage(model, *(inputs or (torch.randn(3, WIDTH),)))
    flow = staged.flow()
    axes = feature_axes(staged.module, flow, rules=staged.rules)
    weights = tuple(staged.typed(unknown).values())
    scales = propagate_scales(
        staged.module, flow, weights, axes, rules=staged.rules, convention=convention, unknown=unknown
    )
    return Facts(
        staged, weights, scales, propagate_sensitivity(staged.module, flow, weights, scales, convention=convention)
    )

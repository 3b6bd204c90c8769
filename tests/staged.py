"""The stages of a conversion one by one, for tests of single passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from modnorm_fx.passes.bind_weights import bind_weights
from modnorm_fx.passes.computed_weights import computed_weights, parts_of_joined
from modnorm_fx.passes.feature_axes import feature_axes
from modnorm_fx.passes.flow import Flow, classify_flow
from modnorm_fx.passes.fuse_pointwise import fuse_pointwise
from modnorm_fx.passes.measure_constants import made_of_numbers
from modnorm_fx.passes.recognize_attention import recognize_attention
from modnorm_fx.passes.recognize_averages import recognize_averages
from modnorm_fx.passes.recognize_dots import recognize_dots
from modnorm_fx.passes.recognize_norms import recognize_norms
from modnorm_fx.passes.recognize_rotary import recognize_rotary
from modnorm_fx.passes.recognize_shares import recognize_shares
from modnorm_fx.passes.recognize_straight_through import recognize_straight_through
from modnorm_fx.passes.split_packed import split_packed
from modnorm_fx.passes.type_atoms import Weight, type_atoms
from modnorm_fx.passes.unstack_weights import unstack_weights
from modnorm_fx.passes.write_casts import write_casts
from torch import Tensor, fx, nn

from modnorm_fx import ATEN
from modnorm_fx.capture import Captured, capture
from modnorm_fx.conventions import TRACKED
from modnorm_fx.regions import Region
from modnorm_fx.rules import RuleTable

torch.set_num_threads(1)

#: the rewriting passes, in the pipeline's order
REWRITES = (
    "casts", "computed", "norms", "stacked", "straight_through", "rotary", "attention", "averages", "shares", "dots",
    "pointwise", "packed", "joined",
)  # fmt: skip


class Fn(nn.Module):
    """A function of signals as a model with a parameter (that it adds at the end, so that there is one)."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, *args: Tensor) -> Any:
        out = self.function(*args)
        return tuple(o + self.anchor for o in out) if isinstance(out, tuple | list) else out + self.anchor


class With(nn.Module):
    """A function of signals that also reads parameters (given as shapes) and modules of its own.

    ``With(f, w=(4, 3), layer=nn.Linear(3, 3))`` calls ``f(self, x)``.
    """

    def __init__(self, function: Callable[..., Any], **own: Any):
        super().__init__()
        self.function = function
        g = torch.Generator().manual_seed(0)
        for name, value in own.items():
            if isinstance(value, tuple):
                value = nn.Parameter(torch.randn(value, generator=g))
            setattr(self, name, value)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


@dataclass
class Staged:
    """A captured model whose graph the passes rewrite."""

    model: nn.Module
    inputs: tuple[Any, ...]
    captured: Captured
    rules: RuleTable

    @property
    def module(self) -> fx.GraphModule:
        return self.captured.graph_module

    def flow(self) -> Flow:
        return classify_flow(self.module, self.captured.inputs, rules=self.rules)

    def rewrite(self, *names: str) -> dict[str, int]:
        """Runs rewriting passes and says how often each fired."""
        run = {
            "casts": lambda: write_casts(self.module),
            "computed": lambda: computed_weights(
                self.module,
                self.captured.inputs,
                made_of_numbers(self.captured.inputs, self.captured.constants),
                rules=self.rules,
                convention=TRACKED,
            ),
            "norms": lambda: recognize_norms(self.module),
            "stacked": lambda: unstack_weights(self.module, self.flow()),
            "straight_through": lambda: recognize_straight_through(self.module, self.flow()),
            "rotary": lambda: recognize_rotary(self.module, self.flow()),
            "attention": lambda: recognize_attention(self.module, self.flow()),
            "averages": lambda: recognize_averages(self.module, self.flow()),
            "shares": lambda: recognize_shares(self.module, self.flow()),
            "dots": lambda: recognize_dots(self.module, self.flow(), rules=self.rules),
            "pointwise": lambda: fuse_pointwise(self.module, self.flow(), rules=self.rules),
            "packed": lambda: split_packed(self.module, self.flow(), rules=self.rules),
            "joined": lambda: parts_of_joined(self.module, rules=self.rules),
        }
        counts = {name: int(run[name]()) for name in names}
        self.module.graph.lint()
        self.module.recompile()
        return counts

    def regions(self) -> list[Region]:
        calls = [n for n in self.module.graph.nodes if n.op == "call_module"]
        return [self.module.get_submodule(str(n.target)) for n in calls]

    def kinds(self) -> list[str]:
        return [region.kind for region in self.regions()]

    def targets(self) -> list[Any]:
        return [n.target for n in self.module.graph.nodes if n.op == "call_function"]

    def typed(self, unknown: str = "error") -> dict[str, Weight]:
        """The weights after the passes that have run so far, by key."""
        flow = self.flow()
        uses = bind_weights(self.module, self.captured.inputs, flow, rules=self.rules)
        axes = feature_axes(self.module, flow, rules=self.rules)
        weights = type_atoms(self.module, uses, flow, axes, self.captured.shapes, rules=self.rules, unknown=unknown)
        return {w.key: w for w in weights}

    def error(self) -> float:
        """Largest difference between the graph's outputs and the model's, relative to the size of the output."""
        with torch.no_grad():
            wanted = [v for v in torch.utils._pytree.tree_leaves(self.model(*self.inputs)) if isinstance(v, Tensor)]
        found = [v for v in self.captured(self.model, *self.inputs) if isinstance(v, Tensor)]
        assert len(wanted) == len(found)
        return max(float((a - b).abs().max() / (b.abs().max() + 1e-12)) for a, b in zip(found, wanted, strict=True))


def stage(model: nn.Module | Callable[..., Any], *inputs: Any, rules: RuleTable = ATEN) -> Staged:
    """Captures a model, or a function of signals."""
    model = model if isinstance(model, nn.Module) else Fn(model)
    model.eval()
    return Staged(model, inputs, capture(model, inputs), rules)


def first_region(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Region, list[Tensor]]:
    """The first region that the passes find in a function, and the values of what it reads besides its input."""
    staged = stage(function, x)
    staged.rewrite(*REWRITES)
    call = next(n for n in staged.module.graph.nodes if n.op == "call_module")
    values: dict[fx.Node, Any] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    by_kind = {"user": x, "parameter": torch.zeros(())}
    constants = staged.captured.constants
    Keep(staged.module).run(
        *(constants[i.name] if i.kind == "constant" else by_kind[i.kind] for i in staged.captured.inputs)
    )
    return staged.module.get_submodule(str(call.target)), [values[n] for n in call.args[1:]]

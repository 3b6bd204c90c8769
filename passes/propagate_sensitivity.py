"""Pass: the sensitivity of the output to every signal, in one reverse sweep.

``S(output) = 1 / scale(output)``, so that a norm of 1 is a relative change of the output, and ``S(v) = Σ_{users u}
ℓ(u, v)·S(u)`` with the convention's sum: the paper's product over compositions and sum over tuples, unrolled to a sum
over paths. On graphs that fold to trees without Dag nodes this equals the tree's own recursion; both are computed and
compared.

Assumes scales. Promises ``S`` for every signal that reaches an output, and the gain ``ℓ_w·S`` of every use of a weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from modnorm_fx.conventions import Convention
from modnorm_fx.rules import arguments, operands

from .flow import Flow
from .propagate_scales import Scales
from .type_atoms import Weight


@dataclass(frozen=True)
class Sensitivities:
    """``of``: signal node -> S. ``gains``: (weight key, use index) -> change of the output per unit of the weight's
    norm."""

    of: dict[fx.Node, float]
    gains: dict[tuple[str, int], float]


def output_nodes(graph: fx.Graph, flow: Flow) -> list[fx.Node]:
    """Every distinct signal that the graph returns, in order."""
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    return list(dict.fromkeys(n for n in output.all_input_nodes if flow.signal(n)))


def stopped_at(weight: Weight, module: fx.GraphModule, scales: Scales, found: Sensitivities) -> list[fx.Node]:
    """The operations after a weight that pass none of its changes on (sign, round, a comparison made a number), though
    what comes after them reaches an output."""
    stops: list[fx.Node] = []
    todo = [node for node, _, _ in weight.uses]
    for node in todo:
        for user in node.users:
            if user.op != "output" and found.of.get(user, 0.0) > 0:
                _, args = arguments(user, module)
                if any(source is node and not scales.local[user].get(op) for op, source in operands(args)):
                    stops.append(user)
            elif user not in todo:
                todo.append(user)
    return list(dict.fromkeys(stops))


def propagate_sensitivity(
    module: fx.GraphModule, flow: Flow, weights: Sequence[Weight], scales: Scales, *, convention: Convention
) -> Sensitivities:
    """The reverse sweep."""
    paths: dict[fx.Node, list[float]] = defaultdict(list)
    for node in output_nodes(module.graph, flow):
        paths[node].append(1 / scales.scale[node] if scales.scale[node] else 1.0)
    found: dict[fx.Node, float] = {}
    for node in reversed(list(module.graph.nodes)):
        if node not in paths:
            continue
        found[node] = convention.add(paths[node])
        if node.op == "placeholder":
            continue
        _, args = arguments(node, module)
        for operand, source in operands(args):
            if flow.signal(source) and operand in scales.local[node]:
                paths[source].append(scales.local[node][operand] * found[node])
    gains = {
        (w.key, i): scales.local[node][operand] * found.get(node, 0.0)
        for w in weights
        for i, (node, operand, _) in enumerate(w.uses)
    }
    return Sensitivities(found, gains)

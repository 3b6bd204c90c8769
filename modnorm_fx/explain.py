"""Every stage of the conversion as text, for ``ModularNorm.explain`` and ``modnorm-fx explain``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from .capture import Captured, where
from .conventions import Convention
from .regions import Region

__all__ = ["STAGES", "Conversion"]

#: the stages, in order
STAGES = ("capture", "canonical", "atoms", "branches", "heads", "scales", "sensitivities", "mass", "tree", "timing")


@dataclass(frozen=True)
class Conversion:
    """How a norm came about, for those who keep count.

    Attributes:
        route: how the graph was captured, e.g. ``export(eval)``.
        outputs: names of the outputs that count.
        ops: (short name, status) of an operation on signals -> how often it occurs.
        sampled: where the operations without a rule are: ``name at module path (file:line: code)``.
        seconds: by pass.
    """

    route: str
    outputs: tuple[str, ...]
    ops: Mapping[tuple[str, str], int]
    sampled: tuple[str, ...]
    seconds: Mapping[str, float]


def conversion(captured: Captured, scales: Any, seconds: Mapping[str, float]) -> Conversion:
    """The record of a conversion, from what the forward sweep says of every signal."""
    module = captured.graph_module
    ops: Counter[tuple[str, str]] = Counter()
    sampled = []
    for node, status in scales.status.items():
        if node.op == "placeholder":
            continue
        name = _op(module, node)
        ops[name, status] += 1
        if status == "sampled":
            place = where(node)
            sampled.append(f"{name} at {place}" if place else name)
    return Conversion(captured.route, captured.outputs, dict(sorted(ops.items())), tuple(sampled), seconds)


def _op(module: fx.GraphModule, node: fx.Node) -> str:
    """A node's operation: the region's name, or that of the op without its overload."""
    if node.op == "call_module":
        region: Any = module.get_submodule(str(node.target))
        return str(region.facts.get("name", region.kind))
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else getattr(node.target, "__name__", str(node.target))


def graph(captured: Captured) -> str:
    """The captured graph as Python."""
    nodes = len(captured.graph_module.graph.nodes)
    head = f"# captured by {captured.route}: {nodes} nodes, {len(captured.shapes)} parameters\n"
    return head + captured.graph_module.print_readable(print_output=False)


def canonical(module: fx.GraphModule, found: Mapping[str, int]) -> str:
    """The rewritten graph, with what was recognised."""
    counts = ", ".join(f"{n} {what}" for what, n in found.items())
    lines = [f"# recognised: {counts}"]
    for node in module.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "call_module":
            region: Any = module.get_submodule(str(node.target))
            target = region.facts.get("name", region.kind)
        else:
            target = getattr(node.target, "__name__", node.target)
        lines.append(f"{node.name} = {target}({', '.join(map(str, node.args))})")
    return "\n".join(lines)


def atoms(weights: Sequence[Any]) -> str:
    """Every weight with its atom at each use, and where that is."""
    lines = []
    for w in weights:
        for node, operand, atom in w.uses:
            lines.append(f"{w.key:60} {atom.describe():32} {operand[0]} of {node.target}  {where(node) or ''}")
    return "\n".join(lines)


def branches(streams: Sequence[Any], convention: Convention) -> str:
    """Every residual stream: the weights that its branches end with, what they are declared to have, or why nothing."""
    lines = []
    for s in streams:
        place = where(s.first)
        lines.append(f"{s.count} branch{'es' * (s.count > 1)} on the stream from {s.first.name}" + f"  {place or ''}")
        if s.unwritten:
            lines.append(f"    left as they are, since no weight says how large {len(s.unwritten)} of them are:")
            lines += [f"    {node.name}  {where(node) or ''}" for node in s.unwritten]
        else:
            lines.append(f"    last weights, at {convention.branch(s.count):.3g} of their norm:")
            lines += [f"    {key}" for key in sorted({key for key, _ in s.writers})]
    return "\n".join(lines) or "no residual streams"


def heads(found: Any, convention: Convention) -> str:
    """Every matrix that makes queries or keys, of how many heads, and what its sensitivity is multiplied by for that;
    and the operands of attention behind which no such matrix was found."""
    lines = [
        f"{key}: {count} head{'s' * (count > 1)}, sensitivity × {convention.heads(count):.3g}"
        for key, count in sorted({(key, count) for (key, _), count in found.of.items()})
    ]
    lines += [f"left as it is: the {name} of {node.name}  {where(node) or ''}" for node, name in found.lost]
    return "\n".join(lines) or "no attention"


def scales(module: fx.GraphModule, facts: Any) -> str:
    """Scale, local sensitivities and status of every signal."""
    lines = [f"{'signal':36} {'scale':>10}  status    sensitivity to its operands"]
    for node, scale in facts.scale.items():
        local = ", ".join(
            f"{name if i is None else f'{name}[{i}]'} {value:.4g}" for (name, i), value in facts.local[node].items()
        )
        lines.append(f"{_label(module, node):36} {scale:10.4g}  {facts.status[node]:8}  {local}")
    return "\n".join(lines)


def sensitivities(module: fx.GraphModule, facts: Any) -> str:
    """Sensitivity of the output to every signal, from input to output."""
    rows = sorted(facts.of.items(), key=lambda item: item[0])
    return "\n".join(
        [f"{'signal':36} {'S':>10}", *(f"{_label(module, node):36} {s:10.4g}  {where(node) or ''}" for node, s in rows)]
    )


def mass(weights: Sequence[Any], places: Mapping[str, Any], masses: Mapping[str, float]) -> str:
    """Place and mass of every weight."""
    lines = [f"{'weight':60} {'mass':>10}  place"]
    for w in weights:
        place = " + ".join(f"{p.region} {p.block}".strip() for p in places[w.key])
        lines.append(f"{w.key:60} {masses[w.key]:10.4g}  {place}")
    return "\n".join(lines)


def timing(seconds: Mapping[str, float]) -> str:
    """Seconds per pass."""
    return "\n".join(
        [*(f"{name:24} {s:8.3f} s" for name, s in seconds.items()), f"{'total':24} {sum(seconds.values()):8.3f} s"]
    )


def _label(module: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        region = module.get_submodule(str(node.target))
        return f"{node.name} <{region.kind}>" if isinstance(region, Region) else node.name
    return node.name

"""Regions: a piece of the graph that a pass recognised as one operation, kept executable.

A hand-written RMSNorm is five ATen calls. Taken one by one, the product rule counts its input twice. A pass therefore
cuts such a piece out into a :class:`Region`, a submodule that runs exactly the ops it was cut from, so that the
rewritten graph computes the same numbers by construction and the rules see one call of one kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

__all__ = ["Region", "extract"]


class Region(torch.nn.Module):
    """A recognised piece of graph.

    Attributes:
        kind: what it is: ``rms_norm``, ``layer_norm``, ``rotary``, ``pointwise``, ...
        inputs: names of the arguments, in call order; the first one is the activation.
        facts: what the recogniser learned (axes, eps, ...).
        body: the ops, as they were.
    """

    def __init__(self, kind: str, inputs: Sequence[str], body: fx.GraphModule, facts: dict[str, Any]):
        super().__init__()
        self.kind, self.inputs, self.facts = kind, tuple(inputs), dict(facts)
        self.body = body

    def forward(self, *args: Any) -> Any:
        return self.body(*args)

    def extra_repr(self) -> str:
        return f"{self.kind}({', '.join(self.inputs)})"


def extract(
    module: fx.GraphModule,
    kind: str,
    inside: Iterable[fx.Node],
    output: fx.Node,
    inputs: dict[str, fx.Node],
    facts: dict[str, Any] | None = None,
) -> fx.Node:
    """Cuts ``inside`` (which ends in ``output``) out into a Region and calls it in place of ``output``.

    Nodes of ``inside`` that others use as well stay behind for them. ``inputs`` names the outer nodes the rules speak
    of, the activation first; other outer nodes that the piece reads are passed along as ``extra0``, ... Returns the
    call node, which takes over the output's meta.
    """
    members = sorted(set(inside))  # fx nodes compare by their place in the graph
    known = set(members) | set(inputs.values())
    others = sorted({n for node in members for n in node.all_input_nodes} - known)
    inputs = inputs | {f"extra{i}": node for i, node in enumerate(others)}
    body = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for name, node in inputs.items():
        env[node] = body.placeholder(name)
        env[node].meta = dict(node.meta)
    for node in members:
        env[node] = body.node_copy(node, lambda n: env[n])
    body.output(env[output])
    name = f"{kind}_{output.name}"
    module.add_submodule(name, Region(kind, list(inputs), fx.GraphModule(module, body, class_name=kind), facts or {}))
    with module.graph.inserting_after(output):
        call = module.graph.call_module(name, tuple(inputs.values()))
    call.meta = dict(output.meta)
    output.replace_all_uses_with(call)
    for node in reversed(members):
        if not node.users:
            module.graph.erase_node(node)
    return call

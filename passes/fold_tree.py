"""Pass: from the graph of signals to the norm tree.

The signals with their local sensitivities are a graph with one entry and one exit. Series and parallel reduction
turns chains into ``Compose`` and parallel paths into ``Tuple``; where that stalls, the smallest piece with one entry
and one exit becomes a ``Dag`` and reduction goes on. Repeated blocks in a chain become ``Power``.

Assumes scales and masses. Promises a tree whose recursion gives what the reverse sweep gives.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
from torch import fx

from modnorm_fx.regions import Region
from modnorm_fx.rules import arguments, operands
from modnorm_fx.tree import AtomNode, Bond, Compose, Dag, Node, Power, Tuple, compose, leaves, signature

from .flow import Flow
from .propagate_scales import Scales
from .propagate_sensitivity import Sensitivities, output_nodes
from .type_atoms import Weight

ENTRY, EXIT = "entry", "exit"
Vertex = fx.Node | str
IDENTITY = Compose(())


def fold_tree(
    module: fx.GraphModule,
    flow: Flow,
    weights: Sequence[Weight],
    scales: Scales,
    sensitivities: Sensitivities,
    masses: Mapping[str, float],
) -> Node:
    """The norm tree of the whole network."""
    graph = _signal_graph(module, flow, weights, scales, sensitivities, masses)
    return fold_repeats(_reduce(graph))


def _signal_graph(
    module: fx.GraphModule,
    flow: Flow,
    weights: Sequence[Weight],
    scales: Scales,
    sensitivities: Sensitivities,
    masses: Mapping[str, float],
) -> nx.MultiDiGraph:
    atoms: dict[fx.Node, list[AtomNode]] = defaultdict(list)
    for w in weights:
        for i, (node, operand, atom) in enumerate(w.uses):
            gain, status = scales.local[node][operand], scales.status[node]
            atoms[node].append(
                AtomNode(w.key, i, atom, gain, masses[w.key] / len(w.uses), scales.initial[w.key, i], status)
            )
    graph = nx.MultiDiGraph(order={w.key: i for i, w in enumerate(weights)})
    graph.add_node(ENTRY, module=IDENTITY, name="input")
    graph.add_node(EXIT, module=IDENTITY, name="outputs")
    for node in module.graph.nodes:
        if node not in sensitivities.of:
            continue
        key, args = arguments(node, module) if node.op != "placeholder" else ("input", {})
        graph.add_node(node, module=compose(*atoms[node]) if node in atoms else IDENTITY, name=_name(key, args))
        sources = 0
        if node.op != "placeholder":
            for operand, source in operands(args):
                if flow.signal(source) and operand in scales.local[node]:
                    value = scales.local[node][operand]
                    graph.add_edge(source, node, module=_bond(_name(key, args), value, scales.status[node]))
                    sources += 1
        if not sources:
            graph.add_edge(ENTRY, node, module=IDENTITY)
    for node in output_nodes(module.graph, flow):
        scale = scales.scale[node]
        graph.add_edge(node, EXIT, module=_bond("relative to output scale", 1 / scale if scale else 1.0, "declared"))
    return graph


def _bond(name: str, value: float, status: str) -> Node:
    return IDENTITY if value == 1.0 and status != "sampled" and name not in SHOWN else Bond(name, value, status)


#: bonds that are shown even where their sensitivity is 1: they are what a reader looks for
SHOWN = frozenset(
    {
        "layer_norm",
        "rms_norm",
        "batch_norm",
        "group_norm",
        "attention",
        "mean_subtract",
        "rotary",
    }
)


def _name(key: object, args: Mapping[str, Any]) -> str:
    """An op's short name for people: the overload's, without the variants of ATen, or what a region is named after."""
    region = args.get("region")
    if isinstance(region, Region) and "name" in region.facts:
        return str(region.facts["name"])
    schema = getattr(key, "_schema", None)
    text = schema.name.split("::")[-1] if schema is not None else getattr(key, "__name__", str(key))
    return next((short for long, short in SHORT if long in text), text)


SHORT = (("batch_norm", "batch_norm"), ("scaled_dot_product_attention", "attention"), ("softmax", "softmax"))


# --- series-parallel reduction --------------------------------------------------------------------------------------


def _reduce(graph: nx.MultiDiGraph) -> Node:
    todo = list(graph.nodes)
    for a, b in list(dict.fromkeys((a, b) for a, b, _ in graph.edges)):
        _merge_parallel(graph, a, b)
    while True:
        _reduce_series(graph, todo)
        if graph.number_of_nodes() == 2 and graph.number_of_edges() == 1:
            ((_, _, module),) = graph.edges(data="module")
            return module
        todo = _collapse_smallest(graph)


def _merge_parallel(graph: nx.MultiDiGraph, a: Vertex, b: Vertex) -> None:
    edges = graph.get_edge_data(a, b)
    if len(edges) < 2:
        return
    order = graph.graph["order"]
    parts = tuple(
        sorted(
            (data["module"] for data in edges.values()),
            key=lambda m: min((order[n.key] for n in leaves(m)), default=-1),
        )
    )
    graph.remove_edges_from([(a, b, k) for k in list(edges)])
    graph.add_edge(a, b, module=Tuple(parts, graph.nodes[b]["name"]))


def _reduce_series(graph: nx.MultiDiGraph, todo: list[Vertex]) -> None:
    waiting = set(todo)
    while todo:
        v = todo.pop()
        waiting.discard(v)
        if v in (ENTRY, EXIT) or v not in graph or graph.in_degree(v) != 1 or graph.out_degree(v) != 1:
            continue
        ((a, _, before),) = graph.in_edges(v, data="module")
        ((_, b, after),) = graph.out_edges(v, data="module")
        here = graph.nodes[v]["module"]
        graph.remove_node(v)
        graph.add_edge(a, b, module=compose(before, here, after))
        _merge_parallel(graph, a, b)
        for w in (a, b):
            if w not in waiting:
                todo.append(w)
                waiting.add(w)


def _collapse_smallest(graph: nx.MultiDiGraph) -> list[Vertex]:
    """Replaces the smallest pieces with one entry and one exit by Dag edges; returns the vertices to look at again."""
    order = {v: i for i, v in enumerate(nx.topological_sort(graph))}
    after = nx.immediate_dominators(graph.reverse(copy=False), EXIT)
    pieces = []
    for a in graph.nodes:
        if graph.out_degree(a) > 1:
            b = after[a]
            inside = _inside(graph, a, b)
            if inside and all(p == a or p in inside for v in inside for p in graph.predecessors(v)):
                pieces.append((len(inside), order[a], a, b, inside))
    touched: set[Vertex] = set()
    again: list[Vertex] = []
    for _, _, a, b, inside in sorted(pieces, key=lambda p: p[:2]):
        if inside & touched:
            continue
        touched |= inside
        vertices = [a, *sorted(inside, key=order.__getitem__), b]
        index = {v: i for i, v in enumerate(vertices)}
        edges = [
            (index[u], index[v], m)
            for u, v, m in graph.out_edges([a, *inside], data="module")
            if u in inside or v in inside
        ]
        modules = [IDENTITY, *(graph.nodes[v]["module"] for v in vertices[1:-1]), IDENTITY]
        graph.remove_nodes_from(inside)
        graph.add_edge(a, b, module=Dag(tuple(modules), tuple(sorted(edges, key=lambda e: e[:2]))))
        _merge_parallel(graph, a, b)
        again += [a, b]
    return again


def _inside(graph: nx.MultiDiGraph, a: Vertex, b: Vertex) -> set[Vertex]:
    inside, todo = set(), [v for v in graph.successors(a) if v != b]
    while todo:
        v = todo.pop()
        if v not in inside:
            inside.add(v)
            todo.extend(w for w in graph.successors(v) if w != b)
    return inside


# --- repeated blocks ------------------------------------------------------------------------------------------------


def fold_repeats(node: Node) -> Node:
    """Finds runs of equal blocks (up to names and numbers) in every chain and makes each a Power."""
    if isinstance(node, Tuple):
        return Tuple(tuple(fold_repeats(child) for child in node.parts), node.join)
    if isinstance(node, Dag):
        return Dag(
            tuple(fold_repeats(v) for v in node.vertices), tuple((a, b, fold_repeats(m)) for a, b, m in node.edges)
        )
    if not isinstance(node, Compose):
        return node
    parts = [fold_repeats(child) for child in node.parts]
    kinds: dict[tuple, int] = {}
    ids = [kinds.setdefault(_kind(part), len(kinds)) for part in parts]
    out: list[Node] = []
    i = 0
    while i < len(parts):
        period, count = _longest_run(ids, i)
        block = parts[i : i + period * count]
        if count > 1 and any(True for part in block for _ in leaves(part)):
            copies = tuple(_block(parts[i + k * period : i + (k + 1) * period]) for k in range(count))
            out.append(Power(copies))
            i += period * count
        else:
            out.append(parts[i])
            i += 1
    return compose(*out)


def _kind(part: Node) -> tuple:
    """What blocks of a stack share: their structure, and their weights' names but for the numbers in them."""
    return signature(part), tuple(re.sub(r"\d+", "#", leaf.key) for leaf in leaves(part))


def _block(parts: Sequence[Node]) -> Node:
    return parts[0] if len(parts) == 1 else Compose(tuple(parts))


def _longest_run(ids: Sequence[int], start: int) -> tuple[int, int]:
    """(period, count) of the repetition from ``start`` that covers most; the shortest period among equals."""
    best = (1, 1)
    rest = len(ids) - start
    for period in range(1, rest // 2 + 1):
        count = 1
        while (
            start + (count + 1) * period <= len(ids)
            and ids[start : start + period] == ids[start + count * period : start + (count + 1) * period]
        ):
            count += 1
        if count > 1 and period * count > best[0] * best[1]:
            best = (period, count)
    return best

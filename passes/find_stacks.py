"""Pass: where each weight sits: in the stem, in a block of a repeated stack, or in the head.

A stack is a run of numbered siblings of one class (``h.0, h.1, ...``; ``layer1, layer2, ...``); the outermost
numbering counts, so a stage of a convolutional net is one block. Numbered layers that are not containers (``fc1,
fc2`` or a ``Sequential`` of Linears) form a stack where consecutive ones hold weights of equal shapes and the model has
no stack of containers: beside one they are a part of the stem or the head (the MLP of DETR's boxes). A container
alone in a ``ModuleList`` or ``Sequential`` is a stack of one, so that depth 1 is treated as depth 2 is. What lies
between two stacks is one more block of the later one.

Assumes typed weights. Promises one :class:`Place` or more for every weight: a tied embedding is in the stem and in
the head. The total mass of all stacks then does not depend on depth.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from .type_atoms import Weight

_NUMBERED = re.compile(r"^(.*?)(\d+)$")


@dataclass(frozen=True)
class Place:
    """``region`` is stem, stacks or head; ``stack`` and ``block`` are module paths (empty outside of stacks)."""

    region: str
    stack: str = ""
    block: str = ""


def find_stacks(graph: fx.Graph, weights: Sequence[Weight], modules: Mapping[str, str]) -> dict[str, tuple[Place, ...]]:
    """Places of every weight, by its key."""
    blocks = _blocks(weights, modules)
    position = {node: i for i, node in enumerate(graph.nodes)}
    stacked = {w.key: blocks[w.parameter] for w in weights if w.parameter in blocks}
    starts: dict[str, int] = {}
    users: dict[fx.Node, set[str]] = defaultdict(set)
    for w in weights:
        if w.key in stacked:
            stack = stacked[w.key][0]
            for node, _, _ in w.uses:
                users[node].add(stack)
                starts[stack] = min(starts.get(stack, len(position)), position[node])
    if not stacked:
        return {w.key: (Place("net"),) for w in weights}
    above, below = _reach(graph, users)
    places: dict[str, tuple[Place, ...]] = {}
    for w in weights:
        if w.key in stacked:
            places[w.key] = (Place("stacks", *stacked[w.key]),)
            continue
        found = []
        for node, _, _ in w.uses:
            if above[node] and below[node]:
                stack = min(below[node], key=starts.__getitem__)
                found.append(Place("stacks", stack, f"{stack} (before)"))
            else:
                found.append(Place("head" if above[node] else "stem"))
        places[w.key] = tuple(dict.fromkeys(found))
    return places


def _blocks(weights: Sequence[Weight], modules: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """parameter -> (stack, block)."""
    matrices = {w.parameter for w in weights if any(atom.is_matrix for _, _, atom in w.uses)}
    shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for w in weights:
        for prefix in _prefixes(w.parameter):
            shapes[prefix].append(w.shape)
    held = Counter(prefix for name in matrices for prefix in _prefixes(name))
    siblings: dict[tuple[str, str], list[str]] = defaultdict(list)
    numbers: dict[str, int] = {}
    for path in held:
        match = _NUMBERED.match(path)
        if match and (path in modules or match[1].endswith(".")):  # in a ParameterList, not an LSTM's weight_ih_l0
            numbers[path] = int(match[2])
            siblings[match[1], modules.get(path, "parameter")].append(path)
    for paths in siblings.values():
        paths.sort(key=numbers.__getitem__)
    chosen: dict[str, str] = {}  # block -> stack
    for (stem, _), paths in siblings.items():
        name = stem.rstrip(".")
        for path in _repeated(paths, modules, shapes):
            chosen[path] = name
    for (stem, _), paths in siblings.items():
        alone = len(paths) == 1 and stem.endswith(".") and _holds_one(stem, modules)
        inside = any(other.startswith(paths[0] + ".") for other in chosen)
        if alone and not inside and _container(paths[0], modules) and held[paths[0]] < len(matrices):
            chosen[paths[0]] = stem.rstrip(".")
    if any(_container(path, modules) for path in chosen):
        chosen = {path: stack for path, stack in chosen.items() if _container(path, modules)}
    out = {}
    for w in weights:
        for prefix in _prefixes(w.parameter):  # outermost first
            if prefix in chosen:
                out[w.parameter] = (chosen[prefix], prefix)
                break
    return out


def _repeated(paths: list[str], modules: Mapping[str, str], shapes: Mapping[str, list[tuple[int, ...]]]) -> list[str]:
    """The members of a stack among numbered siblings of one class."""
    if _container(paths[0], modules):
        return paths if len(paths) > 1 else []
    runs: list[list[str]] = []
    for path in paths:
        if runs and shapes[runs[-1][-1]] == shapes[path]:
            runs[-1].append(path)
        else:
            runs.append([path])
    return [path for run in runs if len(run) > 1 for path in run]


def _holds_one(stem: str, modules: Mapping[str, str]) -> bool:
    """Whether ``stem`` is a list of modules with one member (a ``ModuleList`` may hold others of other classes)."""
    kind = modules.get(stem[:-1], "").rsplit(".", 1)[-1]
    return kind == "ModuleList" or (kind == "Sequential" and f"{stem}0" in modules and f"{stem}1" not in modules)


def _container(path: str, modules: Mapping[str, str]) -> bool:
    return any(other.startswith(path + ".") for other in modules)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _reach(
    graph: fx.Graph, users: Mapping[fx.Node, set[str]]
) -> tuple[dict[fx.Node, set[str]], dict[fx.Node, set[str]]]:
    """Stacks upstream of and downstream of every node."""
    above: dict[fx.Node, set[str]] = {}
    below: dict[fx.Node, set[str]] = {}
    nodes = list(graph.nodes)
    for node in nodes:
        above[node] = set(users.get(node, ())).union(*(above[s] for s in node.all_input_nodes))
    for node in reversed(nodes):
        below[node] = set(users.get(node, ())).union(*(below[u] for u in node.users))
    return above, below

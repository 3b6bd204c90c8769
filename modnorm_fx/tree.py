"""The norm tree: the paper's modules and the recursion over them, and nothing else.

Leaves are atoms (a weight at one use) and bonds (an op without weights). ``Compose`` applies its children one after
the other, ``Tuple`` applies them to the same input and joins, ``Power`` is a Compose of copies of one block, ``Dag``
holds the rare piece of a network that is neither. Every module has a mass and a sensitivity (arXiv 2405.14813,
section 3); ``allot`` hands a target norm down:

    Compose M_n ∘ ... ∘ M_1:  T·share(m_i, m) / (μ_n ··· μ_{i+1})  to M_i;   μ = Π μ_i;   m = Σ m_i
    Tuple (M_1, ..., M_n):    T·share(m_i, m)                      to M_i;   μ = add(μ_i); m = Σ m_i

with the convention's ``add`` and ``share`` (both linear in the paper). A Dag sweeps from its sink: ``S(v) =
add(μ_e·S(u))``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from .atoms import Atom
from .conventions import Convention

__all__ = [
    "Node",
    "AtomNode",
    "Bond",
    "Compose",
    "Tuple",
    "Power",
    "Dag",
    "Allotment",
    "allot",
    "compose",
    "leaves",
    "map_atoms",
    "signature",
]


@dataclass(frozen=True)
class Node:
    """A module of the norm tree."""

    @property
    def children(self) -> tuple[Node, ...]:
        return ()

    @cached_property
    def mass(self) -> float:
        return math.fsum(child.mass for child in self.children)

    def sensitivity(self, convention: Convention) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class AtomNode(Node):
    """A weight at one of its uses.

    Attributes:
        key: the leaf's key; ``use`` counts its uses (a tied weight has several).
        atom: its atom here.
        gain: change of this module's output per unit norm of the weight: the scale of what the weight multiplies; of
            queries and keys the change of one head's.
        own_mass: this use's share of the weight's mass.
        initial: the norm the weight is declared to have.
        status: status of the rule that gave the gain.
    """

    key: str
    use: int
    atom: Atom
    gain: float
    own_mass: float
    initial: float
    status: str

    @cached_property
    def mass(self) -> float:
        return self.own_mass

    def sensitivity(self, convention: Convention) -> float:
        """1: the op's own sensitivity to its input is the bond below the atom."""
        return 1.0


@dataclass(frozen=True)
class Bond(Node):
    """An op without weights: its name, its sensitivity to this input and the status of its rule."""

    name: str
    value: float
    status: str = "exact"

    def sensitivity(self, convention: Convention) -> float:
        return self.value


@dataclass(frozen=True)
class Compose(Node):
    """Children one after the other; the first child is applied first."""

    parts: tuple[Node, ...]

    @property
    def children(self) -> tuple[Node, ...]:
        return self.parts

    def sensitivity(self, convention: Convention) -> float:
        return math.prod(child.sensitivity(convention) for child in self.parts)


@dataclass(frozen=True)
class Power(Compose):
    """A Compose of ``count`` copies of one block, each with weights and numbers of its own. ``parts`` holds the
    copies."""


@dataclass(frozen=True)
class Tuple(Node):
    """Children applied to the same input, their outputs joined (added, concatenated, multiplied) by ``join``."""

    parts: tuple[Node, ...]
    join: str = "add"

    @property
    def children(self) -> tuple[Node, ...]:
        return self.parts

    def sensitivity(self, convention: Convention) -> float:
        return convention.add(child.sensitivity(convention) for child in self.parts)


@dataclass(frozen=True)
class Dag(Node):
    """A piece of the network that is not series-parallel.

    Attributes:
        vertices: a module at each vertex, in topological order; the first is the entry, the last the exit (both empty).
        edges: (from, to, module on the edge).
    """

    vertices: tuple[Node, ...]
    edges: tuple[tuple[int, int, Node], ...]

    @property
    def children(self) -> tuple[Node, ...]:
        return self.vertices + tuple(module for _, _, module in self.edges)

    def downstream(self, convention: Convention) -> list[float]:
        """Sensitivity of the exit to the *output* of each vertex."""
        found = [0.0] * len(self.vertices)
        found[-1] = 1.0
        for v in reversed(range(len(self.vertices) - 1)):
            found[v] = convention.add(
                module.sensitivity(convention) * self.vertices[b].sensitivity(convention) * found[b]
                for a, b, module in self.edges
                if a == v
            )
        return found

    def sensitivity(self, convention: Convention) -> float:
        return self.downstream(convention)[0]


def compose(*parts: Node) -> Node:
    """Compose, flattened: nested Composes open up, and a single part stands for itself."""
    flat: list[Node] = []
    for part in parts:
        flat.extend(part.parts if type(part) is Compose else (part,))
    return flat[0] if len(flat) == 1 else Compose(tuple(flat))


@dataclass(frozen=True)
class Allotment:
    """What the recursion hands an atom: its share of the budget and the sensitivity of the output to the atom's
    output."""

    node: AtomNode
    share: float
    sensitivity: float

    @property
    def gain(self) -> float:
        """Change of the network's output per unit of the weight's norm."""
        return self.sensitivity * self.node.gain


def allot(root: Node, convention: Convention) -> Iterator[Allotment]:
    """The paper's recursion from target norm 1 at the root, for every atom in order of application."""
    yield from _allot(root, 1.0, 1.0, convention)


def _allot(node: Node, share: float, sensitivity: float, convention: Convention) -> Iterator[Allotment]:
    """``sensitivity`` is that of the root's output to this node's output; share / sensitivity is the paper's target."""
    if isinstance(node, AtomNode):
        yield Allotment(node, share, sensitivity)
    elif isinstance(node, Compose):
        below: list[float] = []
        for child in reversed(node.parts):
            below.append(sensitivity)
            sensitivity *= child.sensitivity(convention)
        for child, s in zip(node.parts, reversed(below), strict=True):
            yield from _allot(child, share * convention.share(child.mass, node.mass), s, convention)
    elif isinstance(node, Tuple):
        for child in node.parts:
            yield from _allot(child, share * convention.share(child.mass, node.mass), sensitivity, convention)
    elif isinstance(node, Dag):
        below = node.downstream(convention)
        for v, vertex in enumerate(node.vertices):
            yield from _allot(
                vertex, share * convention.share(vertex.mass, node.mass), sensitivity * below[v], convention
            )
        for _, b, module in node.edges:
            s = sensitivity * below[b] * node.vertices[b].sensitivity(convention)
            yield from _allot(module, share * convention.share(module.mass, node.mass), s, convention)


def leaves(root: Node) -> Iterator[AtomNode]:
    """Every atom node, in order of application."""
    if isinstance(root, AtomNode):
        yield root
    for child in root.children:
        yield from leaves(child)


def map_atoms(root: Node, function: Callable[[AtomNode], AtomNode]) -> Node:
    """The same tree with every atom node replaced."""
    if isinstance(root, AtomNode):
        return function(root)
    if isinstance(root, Compose | Tuple):
        return replace(root, parts=tuple(map_atoms(child, function) for child in root.parts))
    if isinstance(root, Dag):
        return Dag(
            tuple(map_atoms(v, function) for v in root.vertices),
            tuple((a, b, map_atoms(m, function)) for a, b, m in root.edges),
        )
    return root


def signature(node: Node) -> tuple:
    """The module's structure without names of weights and numbers: equal for the blocks of a stack."""
    if isinstance(node, AtomNode):
        return ("atom", node.atom)
    if isinstance(node, Bond):
        return ("bond", node.name)
    if isinstance(node, Dag):
        return (
            "Dag",
            tuple(signature(v) for v in node.vertices),
            tuple((a, b, signature(m)) for a, b, m in node.edges),
        )
    return (type(node).__name__, tuple(signature(child) for child in node.children))

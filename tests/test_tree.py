"""The recursion on the tree against every path written out, and against the paper's own package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import modula.abstract
import modula.atom
import modula.bond
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modnorm_fx import tree as T
from modnorm_fx.atoms import Linear
from modnorm_fx.conventions import PAPER, TRACKED, Convention

CONVENTIONS = (PAPER, TRACKED)
factors = st.floats(0.1, 3.0)
masses = st.sampled_from([0.5, 1.0, 2.0, 5.0])


@dataclass
class Flat:
    """A network as vertices and edges: what the tree stands for, without any structure.

    Edge (a, b, value); a leaf's paths start at the vertex its output is.
    """

    edges: list[tuple[int, int, float]] = field(default_factory=list)
    at: list[tuple[T.AtomNode, int]] = field(default_factory=list)
    count: int = 1

    def vertex(self) -> int:
        self.count += 1
        return self.count - 1

    def add(self, node: T.Node, start: int) -> int:
        """Appends a module after vertex ``start``; returns the vertex of its output."""
        if isinstance(node, T.AtomNode):
            end = self.vertex()
            self.edges.append((start, end, 1.0))
            self.at.append((node, end))
            return end
        if isinstance(node, T.Bond):
            end = self.vertex()
            self.edges.append((start, end, node.value))
            return end
        if isinstance(node, T.Compose):
            for part in node.parts:
                start = self.add(part, start)
            return start
        if isinstance(node, T.Tuple):
            ends = [self.add(part, start) for part in node.parts]
            end = self.vertex()
            self.edges += [(e, end, 1.0) for e in ends]
            return end
        assert isinstance(node, T.Dag)
        inputs = [start] + [self.vertex() for _ in node.vertices[1:]]
        outputs = [self.add(v, i) for v, i in zip(node.vertices, inputs, strict=True)]
        self.edges += [(self.add(m, outputs[a]), inputs[b], 1.0) for a, b, m in node.edges]
        return outputs[-1]

    def paths(self, start: int, end: int) -> Iterator[float]:
        """The product of the edges of every path."""
        if start == end:
            yield 1.0
            return
        for a, b, value in self.edges:
            if a == start:
                for rest in self.paths(b, end):
                    yield value * rest


def brute_force(root: T.Node, convention: Convention) -> tuple[float, list[tuple[T.AtomNode, float]]]:
    """Sensitivity of the whole to its input, and to every atom's output, by enumerating paths."""
    flat = Flat()
    end = flat.add(root, 0)

    def total(values: Iterator[float]) -> float:
        values = list(values)
        return sum(values) if convention is PAPER else math.sqrt(sum(v * v for v in values))

    return total(flat.paths(0, end)), [(atom, total(flat.paths(at, end))) for atom, at in flat.at]


_numbers = itertools.count()


def atom(mass: float = 1.0, gain: float = 1.0) -> T.AtomNode:
    return T.AtomNode(f"w{next(_numbers)}", 0, Linear((2, 2)), gain, mass, 1.0, "exact")


PAIRS = {n: list(itertools.combinations(range(n), 2)) for n in (4, 5)}


@st.composite
def dags(draw, modules):
    """A Dag whose vertices are all reached and all lead to the exit; usually not series-parallel."""
    n = draw(st.integers(4, 5))
    pairs = {(i, i + 1) for i in range(n - 1)} | draw(st.sets(st.sampled_from(PAIRS[n])))
    inside = draw(st.lists(modules, min_size=n - 2, max_size=n - 2))
    edges = tuple((a, b, draw(modules)) for a, b in sorted(pairs))
    return T.Dag((T.Compose(()), *inside, T.Compose(())), edges)


def extend(modules):
    several = st.lists(modules, min_size=0, max_size=3).map(tuple)
    return st.one_of(
        several.map(T.Compose),
        several.map(T.Power),
        st.lists(modules, min_size=1, max_size=3).map(lambda parts: T.Tuple(tuple(parts))),
    )


plain = st.one_of(st.builds(atom, masses, factors), factors.map(lambda f: T.Bond("b", f)))
series_parallel = st.recursive(plain, extend, max_leaves=10)
anything = st.recursive(plain, lambda m: st.one_of(extend(m), dags(m)), max_leaves=4)
sized = settings(max_examples=60, deadline=None)


def with_atoms(root: T.Node) -> T.Node:
    return root if root.mass > 0 else T.compose(root, atom())


@sized
@given(st.one_of(series_parallel, anything).map(with_atoms), st.sampled_from(CONVENTIONS))
def test_recursion_is_the_sum_over_paths(root: T.Node, convention: Convention):
    whole, atoms = brute_force(root, convention)
    assert root.sensitivity(convention) == pytest.approx(whole)
    found = list(T.allot(root, convention))
    assert len(found) == len(atoms) == sum(1 for _ in T.leaves(root))
    expected = {node.key: s for node, s in atoms}
    for part in found:
        assert part.sensitivity == pytest.approx(expected[part.node.key])
        assert part.gain == pytest.approx(expected[part.node.key] * part.node.gain)


@sized
@given(anything.map(with_atoms), st.sampled_from(CONVENTIONS))
def test_shares_telescope_and_add_up_to_one(root: T.Node, convention: Convention):
    found = list(T.allot(root, convention))
    total = math.fsum(part.node.mass for part in found)
    assert root.mass == pytest.approx(total)
    for part in found:
        assert part.share == pytest.approx(convention.share(part.node.mass, total))
    assert convention.add(part.share for part in found) == pytest.approx(1.0)


@sized
@given(st.lists(anything, min_size=1, max_size=4).map(tuple), st.sampled_from(CONVENTIONS))
def test_power_is_a_compose(parts: tuple[T.Node, ...], convention: Convention):
    power, chain = T.Power(parts), T.Compose(parts)
    assert power.sensitivity(convention) == chain.sensitivity(convention)
    assert list(T.allot(power, convention)) == list(T.allot(chain, convention))
    assert T.signature(power) != T.signature(chain)  # but they are told apart when read


@sized
@given(st.lists(anything, min_size=2, max_size=4), st.randoms(), st.sampled_from(CONVENTIONS))
def test_order_of_branches_changes_nothing(parts, random, convention: Convention):
    shuffled = list(parts)
    random.shuffle(shuffled)
    allots = [T.allot(T.Tuple(tuple(order)), convention) for order in (parts, shuffled)]
    of = [{part.node.key: (part.share, part.sensitivity) for part in allot} for allot in allots]
    assert of[0].keys() == of[1].keys()
    for key in of[0]:
        assert of[0][key] == pytest.approx(of[1][key])


@sized
@given(series_parallel.map(with_atoms), st.sampled_from(CONVENTIONS))
def test_a_tree_as_one_dag_edge_is_the_tree(root: T.Node, convention: Convention):
    dag = T.Dag((T.Compose(()), T.Compose(())), ((0, 1, root),))
    assert dag.sensitivity(convention) == pytest.approx(root.sensitivity(convention))
    for a, b in zip(T.allot(dag, convention), T.allot(root, convention), strict=True):
        assert (a.share, a.sensitivity) == (pytest.approx(b.share), pytest.approx(b.sensitivity))


def test_the_smallest_net_that_is_not_series_parallel():
    """The bridge: entry -> a, b; a -> b; a, b -> exit."""
    a, b = atom(), atom()
    values = {(0, 1): 2.0, (0, 2): 3.0, (1, 2): 5.0, (1, 3): 7.0, (2, 3): 11.0}
    edges = tuple((*pair, T.Bond("b", value)) for pair, value in values.items())
    dag = T.Dag((T.Compose(()), a, b, T.Compose(())), edges)
    assert dag.sensitivity(PAPER) == 2 * 7 + 2 * 5 * 11 + 3 * 11
    assert dag.sensitivity(TRACKED) == pytest.approx(math.sqrt((2 * math.hypot(7, 55)) ** 2 + 33**2))
    assert {p.node.key: p.sensitivity for p in T.allot(dag, PAPER)} == {a.key: 7 + 55, b.key: 11}


@sized
@given(st.lists(plain, max_size=6), st.integers(0, 6))
def test_compose_flattens(parts, at):
    nested = T.compose(T.compose(*parts[:at]), T.compose(), T.compose(T.compose(*parts[at:])))
    assert nested == (parts[0] if len(parts) == 1 else T.Compose(tuple(parts)))
    kept = T.Power(tuple(parts))
    assert T.compose(kept, *parts).children[:1] == (kept,) if parts else True  # a Power stays a part


@sized
@given(anything.map(with_atoms))
def test_map_atoms_keeps_the_structure(root: T.Node):
    doubled = T.map_atoms(root, lambda n: replace(n, own_mass=2 * n.own_mass))
    assert T.signature(doubled) == T.signature(root)
    assert doubled.mass == pytest.approx(2 * root.mass)
    assert T.map_atoms(doubled, lambda n: replace(n, own_mass=n.own_mass / 2)) == root


def test_signature_forgets_names_and_numbers_only():
    a, b = atom(1.0, 2.0), atom(3.0, 4.0)
    assert T.signature(a) == T.signature(b)
    assert T.signature(T.Bond("relu", 0.5)) == T.signature(T.Bond("relu", 0.7)) != T.signature(T.Bond("gelu", 0.5))
    assert T.signature(replace(a, atom=Linear((2, 3)))) != T.signature(a)
    assert T.signature(T.Tuple((a, b))) != T.signature(T.Compose((a, b)))


# --- modula -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """The same module in modula and as a tree."""

    net: modula.abstract.Module
    tree: T.Node

    def tared(self, mass: float) -> Pair:
        self.net.tare(absolute=mass)
        factor = mass / self.tree.mass
        return Pair(self.net, T.map_atoms(self.tree, lambda n: replace(n, own_mass=n.own_mass * factor)))


def linear(mass: float) -> Pair:
    return Pair(modula.atom.Linear(2, 2, mass=mass), atom(mass))


def scaled(factor: float, pair: Pair) -> Pair:
    return Pair(factor * pair.net, T.Compose((pair.tree, T.Bond("scale", abs(factor)))))


def after(last: Pair, first: Pair) -> Pair:
    return Pair(last.net @ first.net, T.Compose((first.tree, last.tree)))


def summed(*pairs: Pair) -> Pair:
    net = modula.abstract.Add() @ tuple(p.net for p in pairs)
    return Pair(net, T.Tuple(tuple(p.tree for p in pairs)))


def power(pair: Pair, n: int) -> Pair:
    def copy(node: T.Node) -> T.Node:
        return T.map_atoms(node, lambda a: replace(a, key=f"w{next(_numbers)}"))

    return Pair(pair.net**n, T.Power(tuple(copy(pair.tree) for _ in range(n))))


def relu() -> Pair:
    return Pair(modula.bond.ReLU(), T.Bond("relu", 1 / math.sqrt(2)))


def identity() -> Pair:
    return Pair(modula.bond.Identity(), T.Compose(()))


@st.composite
def pairs(draw, depth: int = 3) -> Pair:
    """Every combinator of modula; parts of zero mass only where modula can handle them (beside a part with mass)."""
    if depth == 0:
        return linear(draw(masses))
    below = pairs(depth - 1)
    kind = draw(st.sampled_from(["after", "sum", "residual", "scale", "power", "tare", "bond"]))
    if kind == "after":
        return after(draw(below), draw(below))
    if kind == "sum":
        return summed(*draw(st.lists(below, min_size=2, max_size=3)))
    if kind == "residual":
        share = draw(st.floats(0.1, 0.9))
        return summed(scaled(1 - share, identity()), scaled(share, draw(below)))
    if kind == "scale":
        return scaled(draw(st.sampled_from([-2.0, -0.3, 0.7, 3.0])), draw(below))
    if kind == "power":
        return power(draw(below), draw(st.integers(1, 3)))
    if kind == "tare":
        return draw(below).tared(draw(masses))
    return after(draw(below), relu())


@settings(max_examples=100, deadline=None)
@given(pairs())
def test_targets_are_modulas(pair: Pair):
    expected = oracle.targets(pair.net)
    found = list(T.allot(pair.tree, PAPER))
    assert pair.tree.mass == pytest.approx(pair.net.mass)
    assert pair.tree.sensitivity(PAPER) == pytest.approx(pair.net.sensitivity)
    assert [p.share / p.sensitivity for p in found] == pytest.approx(expected)

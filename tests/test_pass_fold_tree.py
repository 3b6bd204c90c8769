"""The norm tree of random nets: its recursion against all paths; what becomes Compose, Tuple, Power and Dag."""

import math

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modnorm_fx.passes.fold_tree import fold_repeats, fold_tree
from random_nets import CONVENTIONS, Facts, Net, expected_gains, facts, programs
from torch import nn

from modnorm_fx import tree as T
from modnorm_fx.conventions import PAPER, TRACKED, Convention


def tree(found: Facts, masses: dict[str, float] | None = None) -> T.Node:
    live = [w for w in found.weights if any(found.sensitivities.gains[w.key, i] > 0 for i in range(len(w.uses)))]
    masses = masses or {w.key: 1.0 for w in live}
    return fold_tree(found.staged.module, found.staged.flow(), live, found.scales, found.sensitivities, masses)


def count(node: T.Node, kind: type) -> int:
    return (type(node) is kind) + sum(count(child, kind) for child in node.children)


@settings(max_examples=10, deadline=None)
@given(programs)
def test_the_recursion_gives_the_sum_over_paths(program):
    for convention in CONVENTIONS:
        root = tree(facts(Net(program), convention))
        gains = {part.node.key: part.gain for part in T.allot(root, convention)}
        expected = expected_gains(program, convention)
        assert gains == pytest.approx(expected)
        shares = [part.share for part in T.allot(root, convention)]
        assert convention.add(shares) == pytest.approx(1.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(3, 9), st.data(), st.sampled_from(CONVENTIONS))
def test_reduction_of_random_graphs(n: int, data, convention: Convention):
    """Any graph with one entry and one exit: the folded tree's sensitivity is the sum over its paths."""
    from modnorm_fx.passes import fold_tree as module

    graph = nx.MultiDiGraph(order={})
    names = [module.ENTRY, *range(1, n - 1), module.EXIT]
    for name in names:
        graph.add_node(name, module=module.IDENTITY, name="add")
    edges = {(i, i + 1) for i in range(n - 1)}
    edges |= data.draw(
        st.sets(st.tuples(st.integers(0, n - 2), st.integers(1, n - 1)).filter(lambda e: e[0] < e[1]), max_size=12)
    )
    edges = [(a, b, data.draw(st.floats(0.2, 3.0))) for a, b in sorted(edges)]
    edges += [(a, b, 2.0) for a, b, _ in edges[: data.draw(st.integers(0, 2))]]  # parallel edges
    for a, b, value in edges:
        graph.add_edge(names[a], names[b], module=T.Bond("b", value))

    def paths(v: int) -> list[float]:
        return [1.0] if v == n - 1 else [value * rest for a, b, value in edges if a == v for rest in paths(b)]

    folded = module._reduce(graph)
    assert folded.sensitivity(convention) == pytest.approx(convention.add(paths(0)))


def test_series_parallel_nets_have_no_dag():
    program = [("linear", 0), ("relu", 1), ("linear", 2), ("add", 1, 3), ("norm", 4), ("linear", 5), ("add", 4, 6)]
    root = tree(facts(Net(program), TRACKED))
    assert count(root, T.Dag) == 0 and count(root, T.Tuple) == 2


def test_the_bridge_is_a_dag():
    """x -> a, b = f(a); output from both and from x."""
    program = [("linear", 0), ("linear", 0), ("add", 1, 2), ("mul", 1, 3), ("add", 4, 2)]
    root = tree(facts(Net(program), TRACKED))
    assert count(root, T.Dag) == 1
    gains = {part.node.key: part.gain for part in T.allot(root, TRACKED)}
    assert gains == pytest.approx(expected_gains(program, TRACKED))


def test_several_inputs_and_learned_sources():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.latent = nn.Parameter(torch.ones(3, 8))

        def forward(self, x, y):
            return self.a(x) + self.b(y) + nn.functional.layer_norm(self.latent, (8,))

    found = facts(Joined(), TRACKED, torch.randn(3, 8), torch.randn(3, 8))
    gains = {part.node.key: part.gain for part in T.allot(tree(found), TRACKED)}
    assert gains == pytest.approx(dict.fromkeys(("a.weight", "b.weight", "latent"), 1 / math.sqrt(3)))


# --- repeated blocks --------------------------------------------------------------------------------------------------


class Trunk(nn.Module):
    def __init__(self, depth: int, odd: bool = False):
        super().__init__()
        self.stem = nn.Linear(8, 8, bias=False)
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=i == 1 and odd) for i in range(depth))
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(nn.functional.layer_norm(x, (8,)))
        return self.head(x)


@pytest.mark.parametrize("depth", [2, 3, 10])
def test_blocks_become_a_power(depth: int):
    root = tree(facts(Trunk(depth), TRACKED))
    (power,) = [n for n in walk(root) if type(n) is T.Power]
    assert len(power.parts) == depth
    assert [leaf.key for leaf in T.leaves(power)] == [f"layers.{i}.weight" for i in range(depth)]


def test_one_block_is_no_power():
    assert count(tree(facts(Trunk(1), TRACKED)), T.Power) == 0


def test_a_block_that_differs_ends_the_run():
    root = tree(facts(Trunk(5, odd=True), TRACKED))
    assert [len(n.parts) for n in walk(root) if type(n) is T.Power] == [3]


def test_folding_changes_no_number():
    found = facts(Trunk(6), TRACKED)
    root = tree(found)
    flat = T.map_atoms(root, lambda a: a)
    for convention in CONVENTIONS:
        assert [(p.node.key, p.gain) for p in T.allot(root, convention)] == [
            (p.node.key, p.gain) for p in T.allot(flat, convention)
        ]
    assert fold_repeats(root) == root


def walk(node: T.Node):
    yield node
    for child in node.children:
        yield from walk(child)


def test_a_deep_chain_does_not_exhaust_the_stack():
    program = [("linear", i) for i in range(300)]
    root = tree(facts(Net(program), PAPER))
    assert len(list(T.allot(root, PAPER))) == 300

"""Random nets of ordinary modules: norms of the leaves, the budget, names, order of branches, and scales as measured.

That the recursion on the tree and the sum over the graph's paths agree is checked by every conversion (InternalError).
"""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from net_grammar import TOKENS, WIDTH, Block, Net, blocks, expected_norms, kinds, permuted
from torch import nn

from modnorm_fx import convert
from modnorm_fx.conventions import PAPER, TRACKED
from modnorm_fx.norm import ModularNorm
from modnorm_fx.norm_json import to_json

X = torch.randn(4, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
often = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
seldom = settings(often, max_examples=12)


def converted(net: nn.Module, convention: str = "tracked") -> ModularNorm:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert(net.eval(), (X,), convention=convention)


@often
@given(blocks, st.sampled_from(["tracked", "paper"]))
def test_norms_and_budget(block: Block, convention: str) -> None:
    net = Net(block)
    norm = converted(net, convention)
    rule = TRACKED if convention == "tracked" else PAPER
    expected = expected_norms(net)
    weights = {name: torch.randn(p.shape) for name, p in net.named_parameters() if name not in norm.unused}
    for leaf in norm.leaves:  # how large each is, by the module that owns it
        part = leaf.read(weights[leaf.weight])
        assert leaf.atom.norm(part).item() == pytest.approx(expected[leaf.key](part.numpy()), rel=1e-4), leaf.key
    assert {leaf.key for leaf in norm.leaves} == expected.keys() - {k for k in expected if k not in norm.slices}
    assert all(math.isfinite(leaf.target) and leaf.target > 0 for leaf in norm.leaves)

    assert math.fsum(leaf.mass for leaf in norm.leaves) == pytest.approx(norm.mass)  # the budget
    parts = [leaf.target * leaf.sensitivity * leaf.scale for leaf in norm.leaves]
    assert rule.add(parts) == pytest.approx(1.0)  # a(output): what a unit step of all leaves moves the output by

    norm.normalize_(weights)
    assert norm.norm(weights).item() == pytest.approx(1.0, rel=1e-4)
    for leaf in norm.leaves:
        part = leaf.read(weights[leaf.weight])
        assert expected[leaf.key](part.numpy()) == pytest.approx(leaf.target, rel=1e-4), leaf.key
    zeros = {name: torch.zeros_like(w) for name, w in weights.items()}
    norm.normalize_(zeros)
    assert not any(z.any() for z in zeros.values())


@seldom
@given(blocks, st.sampled_from(["tracked", "paper"]))
def test_twice_is_the_same_bytes(block: Block, convention: str) -> None:
    net = Net(block)
    once, again = (json.dumps(to_json(converted(net, convention))) for _ in range(2))
    assert once == again


@seldom
@given(blocks, st.sampled_from(["tracked", "paper"]))
def test_names_do_not_matter(block: Block, convention: str) -> None:
    one, other = converted(Net(block), convention), converted(Net(block, prefix="renamed_"), convention)
    assert [k.replace("renamed_", "") for k in other.targets] == list(one.targets)
    assert list(other.targets.values()) == pytest.approx(list(one.targets.values()), rel=1e-9)


@seldom
@given(st.lists(blocks, min_size=2, max_size=3), st.sampled_from(["tracked", "paper"]))
def test_order_of_branches_does_not_matter(branches: list[Block], convention: str) -> None:
    def named(block: Block, before: str) -> Block:
        return (block[0], before + block[1], *(named(b, before) for b in block[2:]))

    block = ("sum", "top", *(named(b, "xyz"[i]) for i, b in enumerate(branches)))
    one, other = converted(Net(block), convention), converted(Net(permuted(block)), convention)
    assert one.targets.keys() == other.targets.keys()
    assert [other.targets[k] for k in one.targets] == pytest.approx(list(one.targets.values()), rel=1e-9)


AVERAGES = {"squeeze", "packed_attention", "written_attention"}


@often
@given(blocks)
def test_scales_are_those_of_noise(block: Block) -> None:
    """After `initialize_`, on Gaussian inputs, what each matrix reads has the RMS that was tracked, within a factor
    of 2. Averages over positions are declared to keep the scale, since positions of real inputs agree; those of noise
    do not, and lose up to the root of their number."""
    net = Net(block)
    norm = converted(net)
    norm.initialize_(net, torch.Generator().manual_seed(0))
    measured: dict[str, list[float]] = {}
    for path, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d):
            module.register_forward_pre_hook(
                lambda _, args, path=path: measured.setdefault(path, []).append(args[0].square().mean().sqrt().item())
            )
    with torch.no_grad():
        net(torch.randn(64, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)))
    loss = math.sqrt(TOKENS) if kinds(block) & AVERAGES else 1.0
    for leaf in norm.leaves:
        sizes = measured.get(leaf.weight.removesuffix(".weight"), [])
        if len(sizes) == 1 and leaf.weight.endswith(".weight"):
            assert leaf.scale / (2 * loss) < sizes[0] < 2 * leaf.scale, leaf.key

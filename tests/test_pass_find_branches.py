"""Residual branches and their last weights, by hand, on the shapes that models come in."""

import re

import pytest
import torch
import torch.nn.functional as F
from modnorm_fx.models_zoo import build
from modnorm_fx.passes.find_branches import find_branches, written
from random_nets import facts
from torch import nn

from modnorm_fx import convert
from modnorm_fx.conventions import PAPER, TRACKED

X = torch.randn(2, 6, 16)


def branches(model: nn.Module, *inputs) -> dict[str, int]:
    """Weight -> number of branches of the stream it writes to."""
    found = facts(model, TRACKED, *(inputs or (X,)), unknown="sample")
    staged = found.staged
    raw = find_branches(staged.module.graph, staged.flow(), found.weights, rules=staged.rules)
    return {key: count for (key, _), count in written(raw).items()}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def branch(self, x):
        return self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x):
        return x + self.branch(x)


class Net(nn.Module):
    """A stem, blocks and a head; ``step`` says how a block meets the stream."""

    def __init__(self, depth=3, step=lambda block, x: block(x), block=Block):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        self.blocks, self.step = nn.ModuleList(block() for _ in range(depth)), step

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = self.step(block, x)
        return self.head(self.norm(x))


LAST = [f"blocks.{i}.down.weight" for i in range(3)]


class Scaled(Block):
    def __init__(self):
        super().__init__()
        self.layer_scale = nn.Parameter(torch.ones(16))


class Parallel(Block):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(16, 16)


class Gated(Block):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 1)


STEPS = {
    "after the stream": (Block, lambda b, x: b.branch(x) + x, LAST),
    "by a number": (Block, lambda b, x: x + 0.5 * b.branch(x) / 3, LAST),
    "subtracted": (Block, lambda b, x: x - b.branch(x), LAST),
    "moved": (Block, lambda b, x: x + b.branch(x.transpose(1, 2).mT.roll(1, 1)).roll(-1, 1), LAST),
    "dropped": (Block, lambda b, x: x + F.dropout(b.branch(x).to(torch.float64), 0.5, False).float(), LAST),
    "rectified": (Block, lambda b, x: F.relu(x + b.branch(x)), LAST),
    "scaled": (Scaled, lambda b, x: x + b.layer_scale * b.branch(x), [f"blocks.{i}.layer_scale" for i in range(3)]),
    "parallel": (
        Parallel,
        lambda b, x: x + b.branch(x) + b.other(x),
        None,  # read as two branches, see below
    ),
    "summed": (
        Parallel,
        lambda b, x: x + (b.branch(x) + b.other(x)),
        [f"blocks.{i}.{name}.weight" for i in range(3) for name in ("down", "other")],
    ),
    "gated": (Gated, lambda b, x: x + b.branch(x) * b.gate(x).sigmoid(), LAST),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv1d(6, 6, 1, bias=False), nn.BatchNorm1d(6)),
        lambda b, x: x + b(x),
        [f"blocks.{i}.1.weight" for i in range(3)],
    ),
}


@pytest.mark.parametrize("name", [name for name in STEPS if name != "parallel"])
def test_ways_to_write_a_branch(name: str):
    block, step, last = STEPS[name]
    assert branches(Net(3, step, block)) == dict.fromkeys(last, 3)


def test_two_sums_of_one_block_are_two_branches():
    """Also where both read the stream before the first, as the blocks of GPT-J do."""
    found = branches(Net(3, STEPS["parallel"][1], Parallel))
    assert found == {f"blocks.{i}.{name}.weight": 6 for i in range(3) for name in ("down", "other")}


def test_a_norm_layer_on_the_stream_ends_it():
    assert branches(Net(3, lambda b, x: b.norm(x + b.down(F.gelu(b.up(x)))))) == dict.fromkeys(LAST, 1)


def test_a_projected_shortcut_ends_a_stream():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.shortcut, self.main = Net(2), Net(3), nn.Linear(4, 16), nn.Linear(4, 16)

        def forward(self, x):
            x = self.first(x)
            return self.second(self.shortcut(x) + self.main(F.gelu(x)))

    found = branches(Two())
    assert found == {f"first.blocks.{i}.down.weight": 2 for i in range(2)} | {
        f"second.blocks.{i}.down.weight": 3 for i in range(3)
    }


@pytest.mark.parametrize(
    "step",
    [
        lambda b, x: x + F.gelu(b.branch(x)),  # what its scale is depends on more than a weight
        lambda b, x: x + b.branch(x) * torch.tanh(x),
        lambda b, x: x + F.layer_norm(b.branch(x), (16,)),
        lambda b, x: b.branch(x),
        lambda b, x: b.branch(x) + b.down(b.up(x)),  # no term is the stream
    ],
)
def test_what_is_no_branch_that_a_weight_writes(step):
    assert branches(Net(3, step)) == {}


def test_a_stream_with_one_branch_that_no_weight_writes_is_left_alone():
    """The others would be drowned by it."""
    steps = iter([lambda b, x: x + b.branch(x), lambda b, x: x + b.branch(x).sin(), lambda b, x: x + b.branch(x)])
    assert branches(Net(3, lambda b, x: next(steps)(b, x))) == {}


FAMILIES = {
    "hf:gpt2-tiny": {"attn.c_proj.weight": 4, "mlp.c_proj.weight": 4},
    "hf:llama-tiny": {"o_proj.weight": 4, "mlp.down_proj.weight": 4},
    "hf:gptj-tiny": {"out_proj.weight": 2, "fc_out.weight": 2},
    "hf:mixtral-tiny": {"o_proj.weight": 4, "experts.down_proj": 4},
    "hf:bert-tiny": {},
    "hf:gemma2-tiny": {},  # gains 1 + g behind each branch
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str):
    """Where more than four branches share a stream, their last weights are declared smaller; here by hand."""
    norm = convert(build(name, device="meta", layers=8))
    n = {part: 4 * count for part, count in FAMILIES[name].items()}
    for leaf in norm.leaves:
        count = next((n[part] for part in n if leaf.weight.endswith(part)), 4)
        if leaf.atom.is_matrix and not re.search("embed|wte|wpe", leaf.weight):
            assert leaf.initial == pytest.approx(2 / count**0.5), leaf.key


def test_what_is_done_with_each_stream_can_be_read():
    steps = iter([lambda b, x: x + b.branch(x), lambda b, x: x + b.branch(x).sin()])
    text = convert(Net(2, lambda b, x: next(steps)(b, x)), (X,)).explain("branches")
    assert "2 branches" in text and "left as they are, since no weight says how large 1 of them are:" in text
    assert re.search(r"\n    sin\S*  .*test_pass_find_branches.py:\d+", text)
    text = convert(Net(16), (X,)).explain("branches")
    assert "16 branches" in text and "at 0.5 of their norm" in text and "blocks.15.down.weight" in text


def size_of_stream(depth: int) -> float:
    """RMS of what the last norm layer reads, as the net runs."""
    model = Net(depth)
    norm = convert(model, (X,))
    norm.initialize_(model, torch.Generator().manual_seed(0))
    seen = []
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randn(64, 6, 16, generator=torch.Generator().manual_seed(1)))
    return seen[0].detach().square().mean().sqrt().item()


def test_a_deep_stream_is_as_large_as_one_of_four_branches():
    sizes = {depth: size_of_stream(depth) for depth in (1, 4, 16, 64)}
    assert sizes[16] == pytest.approx(sizes[4], rel=0.1) and sizes[64] == pytest.approx(sizes[4], rel=0.1)
    assert sizes[1] < 0.9 * sizes[4]


def test_paper_leaves_branches_alone():
    assert [PAPER.branch(n) for n in (1, 4, 100)] == [1.0, 1.0, 1.0]

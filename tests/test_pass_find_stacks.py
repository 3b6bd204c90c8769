"""Stem, stacks and head, by hand, on the shapes that models come in."""

import pytest
import torch
import torch.nn.functional as F
from modnorm_fx.passes.find_stacks import Place, find_stacks
from random_nets import facts
from torch import nn

from modnorm_fx.conventions import TRACKED

X = torch.randn(2, 6, 16)


def places(model: nn.Module, *inputs) -> dict[str, list[str]]:
    """Weight -> its places, as ``region:stack:block``."""
    found = facts(model, TRACKED, *(inputs or (X,)), unknown="sample")
    raw = find_stacks(found.staged.module.graph, found.weights, found.staged.captured.modules)
    assert set(raw) == {w.key for w in found.weights} and all(raw.values())
    return {key: [":".join(filter(None, (p.region, p.stack, p.block))) for p in ps] for key, ps in raw.items()}


class Block(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, depth: int, container=nn.ModuleList):
        super().__init__()
        self.stem, self.head, self.norm = nn.Linear(16, 16), nn.Linear(16, 4), nn.LayerNorm(16)
        blocks = [Block() for _ in range(depth)]
        self.blocks = container(blocks) if container is nn.ModuleList else container(*blocks)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_trunk(depth: int):
    found = places(Net(depth))
    assert found["stem.weight"] == ["stem"] and found["stem.bias"] == ["stem"]
    assert found["norm.weight"] == found["head.weight"] == ["head"]
    for i in range(depth):
        assert found[f"blocks.{i}.up.weight"] == [f"stacks:blocks:blocks.{i}"]
        assert found[f"blocks.{i}.norm.bias"] == [f"stacks:blocks:blocks.{i}"]


def test_a_sequential_of_blocks_is_a_stack():
    assert places(Net(3, nn.Sequential))["blocks.2.down.weight"] == ["stacks:blocks:blocks.2"]


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
def test_one_block_is_a_stack_of_one_in_either_container(container):
    found = places(Net(1, container))
    assert found["blocks.0.up.weight"] == ["stacks:blocks:blocks.0"] and found["head.weight"] == ["head"]


def test_equal_layers_beside_a_stack_of_blocks_are_no_stack():
    """The MLP that predicts DETR's boxes is a head."""

    class Boxes(Net):
        def __init__(self):
            super().__init__(2)
            self.boxes = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)])

        def forward(self, x):
            x = super().forward(x)
            for layer in self.boxes:
                x = torch.relu(layer(x))
            return x

    found = places(Boxes())
    assert {found[f"boxes.{i}.weight"][0] for i in range(3)} == {"head"}
    assert found["blocks.1.up.weight"] == ["stacks:blocks:blocks.1"]


def test_one_block_among_other_layers_is_no_stack():
    model = nn.Sequential(nn.Linear(16, 16), Block(), nn.LayerNorm(16), nn.Linear(16, 4))
    assert set(map(tuple, places(model).values())) == {("net",)}


def test_layers_of_unequal_shapes_are_no_stack():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4))
    assert set(map(tuple, places(model).values())) == {("net",)}


def test_equal_layers_in_a_row_are_a_stack():
    model = nn.Sequential(nn.Linear(8, 16), *(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 4))
    found = places(model, torch.randn(3, 8))
    assert found["0.weight"] == ["stem"] and found["4.weight"] == ["head"]
    assert [found[f"{i}.weight"][0].split(":")[0] for i in (1, 2, 3)] == ["stacks"] * 3


def test_stages_are_blocks_of_one_stack():
    """``layer1, layer2`` of a residual net, with blocks inside: the outermost numbering counts."""

    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
            self.layer1, self.layer2 = nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block(), Block())

        def forward(self, x):
            return self.head(self.layer2(self.layer1(self.stem(x))))

    found = places(Stages())
    assert found["layer1.1.up.weight"][0].endswith(":layer1")
    assert found["layer2.2.up.weight"][0].endswith(":layer2")
    assert found["layer1.0.up.weight"][0].split(":")[1] == found["layer2.0.up.weight"][0].split(":")[1]


def test_what_lies_between_two_stacks_belongs_to_the_later_one():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.ModuleList(Block() for _ in range(2))
            self.bridge = nn.Linear(16, 16)
            self.decoder = nn.ModuleList(Block() for _ in range(3))
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            for block in self.encoder:
                x = block(x)
            x = self.bridge(x)
            for block in self.decoder:
                x = block(x)
            return self.head(x)

    found = places(Pair())
    assert found["bridge.weight"] == ["stacks:decoder:decoder (before)"]
    assert found["encoder.0.up.weight"] == ["stacks:encoder:encoder.0"]
    assert found["head.weight"] == ["head"]


def test_a_tied_embedding_is_in_the_stem_and_in_the_head():
    class Tied(Net):
        def __init__(self):
            super().__init__(2)
            self.token = nn.Embedding(11, 16)
            del self.stem, self.head

        def forward(self, i):
            x = self.token(i)
            for block in self.blocks:
                x = block(x)
            return F.linear(self.norm(x), self.token.weight)

    found = places(Tied(), torch.zeros(2, 6, dtype=torch.long))
    assert found["token.weight"] == ["stem", "head"]


def test_a_shared_block_is_in_one_place():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(16, 16), Block(), nn.Linear(16, 4)

        def forward(self, x):
            x = self.stem(x)
            for _ in range(4):
                x = self.block(x)
            return self.head(x)

    assert set(map(tuple, places(Shared()).values())) == {("net",)}


def test_places_compare_by_value():
    assert Place("stacks", "a", "b") == Place("stacks", "a", "b") != Place("stacks", "a", "c")


def test_the_layers_of_a_recurrent_net_are_parameters_of_one_module_and_no_stack():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.head = nn.Linear(4, 6), nn.GRU(6, 6, 2, bidirectional=True), nn.Linear(12, 3)

        def forward(self, x):
            return self.head(self.rnn(self.embed(x))[0])

    assert set().union(*places(Net(), torch.randn(5, 2, 4)).values()) == {"net"}

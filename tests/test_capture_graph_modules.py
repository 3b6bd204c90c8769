"""Models that are graphs already, of torch.fx and torch.export: the graph is that of the model they were made of."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import assert_same_outputs
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from modnorm_fx import convert
from modnorm_fx.capture import capture

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A parameter and a buffer of its own, parts within parts, a tie, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.GELU(), nn.Linear(8, 16)))
        self.head = nn.Linear(8, 8)
        self.head.weight = self.body[0].weight
        self.gain = nn.Parameter(torch.ones(16))
        self.register_buffer("mask", torch.linspace(0, 1, 16))
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(self.head(x)) * self.gain * self.mask
        return {"y": self.out(h), "h": h}


MADE = {
    "symbolic_trace": torch.fx.symbolic_trace,
    "export": lambda model: torch.export.export(model, (X,)).module(),
    "export, any batch": lambda model: torch.export.export(
        model, (X,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}
    ).module(),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_it_converts_as_the_model_does(make) -> None:
    model = Net()
    graph = make(model)
    before, hooks = copy.deepcopy(graph.state_dict()), dict(graph._forward_hooks)
    captured = capture(graph, (X,))
    assert captured.outputs == ("y", "h")
    assert_same_outputs(captured, graph, (X,), {})
    norm, expected = convert(graph, (X,)), convert(model, (X,))
    assert sorted(norm.targets.values()) == pytest.approx(sorted(expected.targets.values()))
    assert norm.unused == () and set(norm.shapes) == {name for name, _ in graph.named_parameters()}
    assert graph._forward_hooks == hooks and all(torch.equal(v, before[k]) for k, v in graph.state_dict().items())


def test_names_and_places_are_those_of_the_model() -> None:
    model = Net()
    graph = torch.fx.symbolic_trace(model)
    found, expected = convert(graph, (X,)), convert(model, (X,))
    assert {found.aliases.get(name, name): target for name, target in expected.targets.items()} == found.targets
    places = [(n.meta.get("nn_module_stack") or {}) for n in capture(graph, (X,)).graph_module.graph.nodes]
    assert {path for stack in places for path, _ in stack.values()} >= {"body.0", "body.1.1", "out"}


def test_a_hook_of_a_graph_is_part_of_it() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    graph.register_forward_hook(lambda module, args, value: value * 3)
    assert_same_outputs(capture(graph, (X,)), graph, (X,), {})


def test_features_extracted_by_torchvision() -> None:
    images = torch.randn(2, 3, 32, 32)
    model = create_feature_extractor(resnet18(num_classes=4), ["layer2", "fc"])
    captured = capture(model, (images,))
    assert captured.outputs == ("layer2", "fc")
    assert_same_outputs(captured, model.eval(), (images,), {})

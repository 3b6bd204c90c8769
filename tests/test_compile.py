"""The torch.compile backend: the norm it finds is that of `convert`, and what runs is what inductor or eager runs."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from modnorm_fx.models_zoo import build
from torch import Tensor, nn

import modnorm_fx as mn
from modnorm_fx.compile import backend, compiled_norm
from modnorm_fx.errors import ModnormError

EAGER = {"then": "eager"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, width: int, stops: bool):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.stops = stops

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.up(self.norm(x)))
        if self.stops:
            torch._dynamo.graph_break()
        return x + self.down(y)


class Net(nn.Module):
    def __init__(self, stops: bool = False):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([Block(8, stops), Block(8, False)])
        self.head = nn.Linear(8, 3)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.mask


def targets(norm: mn.ModularNorm) -> dict[str, float]:
    return {leaf.key: leaf.target for leaf in norm.leaves}


@pytest.mark.parametrize("spec", ["hf:gpt2-tiny", "hf:llama-tiny"])
def test_the_norm_of_a_model_in_one_piece_is_that_of_convert(spec: str) -> None:
    model = build(spec)
    model.config.use_cache = False
    compiled = torch.compile(model, backend="modnorm_fx", options=EAGER)
    compiled(input_ids=torch.zeros(2, 16, dtype=torch.long))
    assert targets(compiled_norm(compiled)) == pytest.approx(targets(mn.convert(model)), rel=1e-12)


def test_options_of_convert_are_passed_on() -> None:
    model = Net()
    compiled = torch.compile(model, backend="modnorm_fx", options=EAGER)
    x = torch.randn(5, 4)
    compiled(x)
    options = {"convention": "paper", "masses": {"stacks": 3.0}}
    assert targets(compiled_norm(compiled, **options)) == pytest.approx(targets(mn.convert(model, (x,), **options)))


def test_inductor_compiles_what_dynamo_captured_and_gradients_are_those_of_eager() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(5, 4)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="modnorm_fx")
    out = compiled(x)
    torch.testing.assert_close(out, eager(x))
    out.square().sum().backward()
    eager(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    norm = compiled_norm(compiled)
    optimizer = mn.ModularOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), norm, lr=0.1)
    optimizer.step()
    assert not torch.equal(model.head.weight, eager.head.weight)


def test_a_model_compiled_in_place_and_compiled_again_for_other_shapes() -> None:
    model = Net()
    model.compile(backend="modnorm_fx", options=EAGER)
    for batch in (5, 7, 9):
        model(torch.randn(batch, 4))
    assert targets(mn.compiled_norm(model)) == pytest.approx(targets(mn.convert(Net(), (torch.randn(5, 4),))))


def test_pieces_on_both_sides_of_a_graph_break_make_one_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 8), Block(8, stops=True), nn.Linear(8, 3))
    compiled = torch.compile(model[1], backend="modnorm_fx", options=EAGER)
    compiled(torch.randn(5, 8))
    norm = compiled_norm(compiled)
    assert {leaf.key for leaf in norm.leaves} == {name for name, _ in model[1].named_parameters()}
    assert all(leaf.target > 0 for leaf in norm.leaves)
    # the pieces one after the other: norm and up have all that is behind them, as the tree's recursion says
    shares = sum(norm.convention.share(leaf.mass, norm.tree.mass) ** 2 for leaf in norm.leaves)
    assert shares == pytest.approx(1.0)


def test_parameters_in_no_graph_are_named() -> None:
    model = Net(stops=True)
    compiled = torch.compile(model, backend="modnorm_fx", options=EAGER)
    compiled(torch.randn(5, 4))
    with pytest.warns(UserWarning, match="in no graph that dynamo captured"):
        norm = compiled_norm(compiled)
    assert set(norm.unused) | {leaf.weight for leaf in norm.leaves} == {name for name, _ in model.named_parameters()}


def test_a_model_that_has_not_run_is_refused() -> None:
    compiled = torch.compile(Net(), backend="modnorm_fx", options=EAGER)
    with pytest.raises(ModnormError, match="No graph of Net was captured") as error:
        compiled_norm(compiled)
    assert "Call the model compiled with backend='modnorm_fx' once" in str(error.value)


def test_torchs_own_modules_are_not_compiled_in_place_by_torch_which_is_said() -> None:
    """Torch's doing, whatever the backend: none of its graphs arrives. What the text advises works."""
    model, x, seen = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)), torch.randn(5, 4), []
    model.compile(backend=lambda graph, inputs: seen.append(graph) or graph)
    model(x)
    assert not seen
    model.compile(backend="modnorm_fx", options=EAGER)
    model(x)
    with pytest.raises(ModnormError, match=r"No graph of Sequential was captured: compiled in place") as error:
        compiled_norm(model)
    assert "compiled = torch.compile(model, backend='modnorm_fx')" in str(error.value)
    compiled = torch.compile(model, backend="modnorm_fx", options=EAGER)
    compiled(x)
    assert targets(compiled_norm(compiled)) == pytest.approx(targets(mn.convert(copy.deepcopy(model), (x,))))


def test_options_of_inductor_are_refused_for_other_backends() -> None:
    compiled = torch.compile(Net(), backend="modnorm_fx", options={"then": "eager", "max_autotune": True})
    with pytest.raises(Exception, match="options and mode are inductor's"):
        compiled(torch.randn(5, 4))


def test_another_backend_may_be_a_function() -> None:
    seen = []

    def mine(graph, inputs):
        seen.append(len(inputs))
        return graph.forward

    model, x = Net(), torch.randn(5, 4)
    compiled = torch.compile(model, backend=lambda graph, inputs: backend(graph, inputs, then=mine))
    torch.testing.assert_close(compiled(x), model(x))
    assert seen


def test_what_was_captured_dies_with_the_model() -> None:
    model = Net()
    compiled = torch.compile(model, backend="modnorm_fx", options=EAGER)
    compiled(torch.randn(5, 4))
    compiled_norm(compiled)
    gone = weakref.ref(model.head.weight)
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None

"""Copies: whatever is traced, the model, the random states and the caches stay as they were; values are not needed."""

from __future__ import annotations

import copy
import functools
import random
import threading
from typing import Any

import numpy
import pytest
import tiny_models
import torch
from tiny_models import MODELS, Branching, Plain, X, assert_same_outputs, only_route
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from modnorm_fx import _copies, _failures, _trace
from modnorm_fx.capture import capture
from modnorm_fx.errors import CaptureError
from modnorm_fx.inputs import example_inputs

# --- the model stays as it was ----------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that capture could have disturbed, comparable with ==."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    state: list[Any] = [(name, id(t), t._version, t.requires_grad, t.device.type, id(t.grad)) for name, t in tensors]
    state += [t.detach().flatten().tolist() for _, t in tensors if not t.is_meta and not isinstance(t, FakeTensor)]
    for path, module in model.named_modules():
        hooks = {name: list(value) for name, value in vars(module).items() if name.endswith("hooks")}
        state.append((path, type(module), module.training, list(vars(module)), hooks))
        leaves = [leaf for leaf in pytree.tree_leaves(vars(module)) if isinstance(leaf, FakeTensor)]
        state.append(sorted(id(leaf) for leaf in leaves))
    if hasattr(model, "config"):
        state.append(model.config.to_dict())
        state.append(model.config.use_cache)
    state += [hash(str(draw)) for draw in (torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state())]
    return [*state, torch.is_grad_enabled()]


@pytest.mark.parametrize("name", ["gpt2", "timm_resnet", "in_place", "branching", "tied"])
def test_the_model_and_the_random_states_stay_as_they_were(name: str) -> None:
    make, args, kwargs = MODELS[name]
    model = make().train()
    list(model.modules())[-1].eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[-1].grad = torch.ones_like(parameters[-1])
    calls: list[str] = []
    model.register_forward_hook(lambda module, given, output: calls.append("forward"))
    parameters[-1].register_hook(lambda grad: calls.append("backward"))
    before, inputs = snapshot(model), copy.deepcopy((args, kwargs))
    capture(model, args, kwargs)
    assert snapshot(model) == before
    assert "backward" not in calls
    torch.testing.assert_close((args, kwargs), inputs)


def test_a_failed_capture_changes_nothing_either() -> None:
    model = Plain().train()
    before = snapshot(model)
    with pytest.raises(CaptureError):
        capture(model, (torch.ones(2, 5),))
    assert snapshot(model) == before


def test_models_that_draw_random_numbers_leave_the_state_alone() -> None:
    class Noisy(Plain):
        def forward(self, x: Tensor) -> Tensor:
            torch.manual_seed(3)
            return super().forward(x) + torch.randn_like(x) * random.random() * numpy.random.rand()

    model = Noisy()
    for route in ("export(eval)", "make_fx(eval)"):
        before = snapshot(model)
        with only_route(route):
            capture(model, (X,))
        assert snapshot(model) == before


def test_hooks_are_part_of_the_model_and_cannot_leave_tensors_in_it() -> None:
    model = Plain()
    model.seen = []

    def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        model.last = output  # the original, even when the hook runs on the copy
        model.seen.append(output)
        return output * 2

    model.register_forward_hook(hook)
    before = snapshot(model)
    captured = capture(model, (X,))
    assert snapshot(model) == before
    assert not hasattr(model, "last") and model.seen == []
    assert_same_outputs(captured, model, (X,), {})


def test_hooks_cannot_leave_tensors_in_the_model_while_inputs_are_tried() -> None:
    model = tiny_models.gpt2()
    model.register_forward_hook(lambda module, given, output: setattr(model, "last", output.logits))
    before = snapshot(model)
    example_inputs(model)
    assert snapshot(model) == before


def test_caches_of_functions_hold_no_traced_tensor_afterwards() -> None:
    @functools.lru_cache
    def positions(length: int) -> Tensor:
        return torch.arange(length) / length

    class Positions(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + positions(x.shape[-1]))

    model = Positions()
    captured = capture(model, (X,))
    assert not isinstance(positions(4), FakeTensor)
    assert_same_outputs(captured, model, (X,), {})


def test_inference_mode_outside() -> None:
    with torch.inference_mode():
        captured = capture(Plain(), (X,))
        assert torch.is_inference_mode_enabled()
    assert captured.route == "export(eval)"


# --- models without values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "timm_resnet", "tied", "in_place", "branching"])
def test_meta_and_fake_models_give_the_same_graph(name: str) -> None:
    make, args, kwargs = MODELS[name]
    expected = capture(make(), args, kwargs)
    with torch.device("meta"):
        on_meta = make()
    fake, _ = _copies.fake_copy(make())
    for model in (on_meta, fake):
        before = snapshot(model)
        captured = capture(model, args, kwargs)
        assert snapshot(model) == before
        assert captured.route == expected.route
        assert captured.graph_module.code == expected.graph_module.code


def test_inputs_without_values() -> None:
    expected = capture(Plain(), (X,)).graph_module.code
    with FakeTensorMode():
        fake = torch.empty(2, 4)
    for x in (X.to("meta"), fake, X.requires_grad_(False).double().float()):
        assert capture(Plain(), (x,)).graph_module.code == expected


def test_a_model_larger_than_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1_000_000, 1_000_000) for _ in range(3)))
    captured = capture(model, (torch.empty(2, 1_000_000, device="meta"),))
    assert captured.route == "export(eval)" and captured.unused == ()


def test_a_large_model_that_needs_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_copies, _failures, _trace):
        monkeypatch.setattr(module, "MAX_REAL_BYTES", 0)
    with pytest.raises(CaptureError) as caught:
        capture(Branching(), (X,))
    text = str(caught.value)
    assert text.startswith("Branching could not be traced to a graph.")
    for routes in (
        "export(eval), export(train): ",
        "make_fx(eval), make_fx(train), make_fx(below autograd): a copy with",
    ):
        assert f"\n    {routes}" in text
    assert text.endswith("or move what branches on values out of forward")
    assert caught.value.__cause__ is not None


# --- models that cannot be copied -------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Sequential(Plain())
    model[0].lock = threading.Lock()
    with pytest.raises(CaptureError) as caught:
        capture(model, (X,))
    assert caught.value.what == "The model cannot be copied, and only a copy of it may be traced."
    assert caught.value.where == "0.lock"


def test_lazy_modules() -> None:
    with pytest.raises(CaptureError, match="parameters without a shape"):
        capture(nn.LazyLinear(4), (X,))


def test_layers_are_kept_whatever_a_module_calls_its_configuration() -> None:
    class Config:
        layerdrop = 0.0

        def __init__(self) -> None:
            self.encoder_layerdrop = 0.5

        def to_dict(self) -> dict[str, Any]:
            return vars(self)

    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net.config = Config()
    net[0].config = {"layerdrop": 0.5}  # a dict is no configuration of transformers
    net[1].layerdrop = 0.25
    _copies.keep_layers(net)
    assert net.config.encoder_layerdrop == 0.0 and net[1].layerdrop == 0.0

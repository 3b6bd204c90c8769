"""Capture: the graph computes what the model computes, the model stays as it was, and errors say what went wrong."""

from __future__ import annotations

import contextlib
import copy
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import tiny_models
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from modnorm_fx import _copies
from modnorm_fx import capture as capture_module
from modnorm_fx.capture import Captured, capture, where
from modnorm_fx.errors import CaptureError, ModelMismatchError, WeightError

aten = torch.ops.aten
IDS = torch.arange(24).view(2, 12)
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


class Plain(nn.Module):
    """Residual blocks with a norm; nothing special."""

    def __init__(self, width: int = 4, blocks: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.nn.functional.gelu(block(self.norm(x)))
        return x


class Tied(nn.Module):
    """An embedding whose table is also the head, and a linear used under two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embed(ids))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class InPlace(nn.Module):
    """Writes through a view, into a buffer and into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        y = self.linear(x).relu_()
        y[:, :2] += y[:, 2:]
        self.calls += 1
        return y * self.calls


class Branching(nn.Module):
    """Depends on values, as export cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.isfinite().all() else x


class Caching(nn.Module):
    """Keeps what it computed of a parameter in evaluation, as many vision models do."""

    def __init__(self, empties: bool):
        super().__init__()
        self.table, self.linear, self.cache = nn.Parameter(torch.randn(4)), nn.Linear(4, 4), None
        self.empties = empties

    def train(self, mode: bool = True) -> Caching:
        self.cache = None if mode and self.empties else self.cache
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.cache is None:
            self.cache = self.table * 2
        return self.linear(x) + (self.table * 2 if self.training else self.cache)


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale, self.listed = nn.Linear(4, 4), torch.full((4,), 3.0), [torch.arange(4.0)]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale + self.listed[0]


class Wrapped(nn.Module):
    """Runs parts under settings that export keeps in sub-graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        with torch.autocast("cpu", enabled=False):
            x = torch.utils.checkpoint.checkpoint(self.linear, x, use_reentrant=False)
        with torch.enable_grad():
            x = self.linear(x)
        return {"features": [x, None, 3], "best": x.argmax(-1)}


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "gpt2": (tiny_models.gpt2, (), {"input_ids": IDS}),
    "llama": (tiny_models.llama, (IDS,), {}),
    "bert": (tiny_models.bert, (), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS).tril()}),
    "t5": (tiny_models.t5, (), {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}),
    "vit": (tiny_models.vit, (), {"pixel_values": IMAGE}),
    "timm_resnet": (tiny_models.timm_resnet, (IMAGE,), {}),
    "timm_vit": (tiny_models.timm_vit, (IMAGE,), {}),
    "timm_convnext": (tiny_models.timm_convnext, (IMAGE,), {}),
    "timm_mixer": (tiny_models.timm_mixer, (IMAGE,), {}),
    "plain": (Plain, (X,), {}),
    "tied": (Tied, (), {"ids": IDS % 11}),
    "attention": (Attention, (torch.randn(2, 5, 8),), {}),
    "in_place": (InPlace, (X,), {}),
    "constants": (Constants, (X,), {}),
    "wrapped": (Wrapped, (X,), {}),
    "branching": (Branching, (X,), {}),
}


def eager(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What the model returns in evaluation, on copies of everything."""
    args, kwargs = copy.deepcopy((args, kwargs))
    model = copy.deepcopy(model).eval()
    if hasattr(model, "config"):
        kwargs["use_cache"] = False
        model.config.use_cache = False
    kwargs = {
        name: value
        for name, value in kwargs.items()
        if name != "use_cache" or not isinstance(model, tiny_models.transformers.ViTForImageClassification)
    }
    with torch.no_grad():
        return pytree.tree_leaves(model(*args, **kwargs))


def assert_same_outputs(captured: Captured, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    expected, got = eager(model, args, kwargs), captured(model, *args, **kwargs)
    assert len(expected) == len(got)
    for one, other in zip(expected, got, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(other, one)
        else:
            assert other == one


def targets(captured: Captured) -> list[Any]:
    return [node.target for node in captured.graph_module.graph.nodes if node.op == "call_function"]


@contextlib.contextmanager
def only_route(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(capture_module, "ROUTES", {name: capture_module.ROUTES[name]})
    yield


# --- the graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_computes_what_the_model_computes(name: str) -> None:
    make, args, kwargs = MODELS[name]
    model = make()
    captured = capture(model, args, kwargs)
    assert captured.route == ("make_fx(eval)" if name == "branching" else "export(eval)")
    assert captured.unused == ()
    assert_same_outputs(captured, model, args, kwargs)


@pytest.mark.parametrize("name", ["gpt2", "timm_resnet", "tied", "attention", "in_place", "constants", "wrapped"])
def test_make_fx_gives_the_same_outputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, args, kwargs = MODELS[name]
    model = make()
    with only_route("make_fx(eval)", monkeypatch):
        captured = capture(model, args, kwargs)
    assert captured.route == "make_fx(eval)"
    assert_same_outputs(captured, model, args, kwargs)
    assert_is_functional_and_annotated(captured)


@pytest.mark.parametrize("name", ["gpt2", "llama", "timm_convnext", "in_place", "wrapped"])
def test_the_graph_is_functional_and_every_node_knows_its_place(name: str) -> None:
    make, args, kwargs = MODELS[name]
    assert_is_functional_and_annotated(capture(make(), args, kwargs))


def assert_is_functional_and_annotated(captured: Captured) -> None:
    graph = captured.graph_module.graph
    graph.lint()
    order = ["parameter", "buffer", "constant", "user"]
    kinds = [entry.kind for entry in captured.inputs]
    assert kinds == sorted(kinds, key=order.index)
    assert [entry.node for entry in captured.inputs] == list(graph.find_nodes(op="placeholder"))
    names = [(entry.kind, entry.name) for entry in captured.inputs]
    assert len(set(names)) == len(names)
    assert [name for kind, name in names if kind == "parameter"] == list(captured.shapes)
    for node in graph.nodes:
        assert node.op in ("placeholder", "call_function", "output")
        if node.op == "call_function":
            assert node.users, f"{node} is dead"
            assert "val" in node.meta
            assert node.meta["nn_module_stack"] and node.meta["stack_trace"], node
            if isinstance(node.target, torch._ops.OpOverload):
                assert not node.target._schema.is_mutable
                assert "assert" not in node.target.name()
            else:
                assert not isinstance(node.target, torch._ops.HigherOrderOperator)


def test_atoms_stay_whole() -> None:
    gpt2 = targets(capture(tiny_models.gpt2(), kwargs={"input_ids": IDS}))
    assert {aten.addmm.default, aten.linear.default, aten.layer_norm.default, aten.embedding.default} < set(gpt2)
    assert gpt2.count(aten.scaled_dot_product_attention.default) == 2
    assert aten.dropout.default not in gpt2
    assert targets(capture(Plain(blocks=1), (X,))).count(aten.gelu.default) == 1


def test_the_same_graph_as_run_decompositions_gives() -> None:
    model = tiny_models.llama().eval()
    with torch.no_grad():
        program = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False).run_decompositions({})
    theirs = [node.target for node in program.graph.nodes if node.op == "call_function"]
    ours = targets(capture(model, (IDS,)))
    for target in (aten.linear.default, aten.scaled_dot_product_attention.default, aten.mul.Tensor, aten.rsqrt.default):
        assert ours.count(target) == theirs.count(target)
    assert set(ours) <= set(theirs)


def test_tied_parameters_are_one_placeholder_under_their_first_name() -> None:
    captured = capture(Tied(), kwargs={"ids": IDS % 11})
    assert captured.aliases == {
        "second.weight": "first.weight",
        "second.bias": "first.bias",
        "head.weight": "embed.weight",
    }
    parameters = {entry.name: entry.node for entry in captured.inputs if entry.kind == "parameter"}
    assert list(parameters) == list(captured.shapes) == ["embed.weight", "first.weight", "first.bias"]
    assert {user.target for user in parameters["embed.weight"].users} == {aten.embedding.default, aten.linear.default}
    assert len(parameters["first.weight"].users) == 2


def test_facts_about_the_model() -> None:
    captured = capture(Plain(), (X,))
    assert captured.shapes["blocks.0.weight"] == (4, 4)
    assert captured.modules["norm"] == "torch.nn.modules.normalization.LayerNorm"
    assert captured.modules[""].endswith("test_capture.Plain")
    assert [entry.name for entry in captured.inputs if entry.kind == "user"] == ["x"]


def test_arguments_of_any_shape() -> None:
    class Options(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, xs: list[Any], flag: bool, *rest: Tensor, scale: float = 1.0, mask: Tensor | None = None):
            y = self.linear(xs[0]) + xs[1]["k"] + rest[0]
            return y * scale if flag else y

    model, args, kwargs = Options(), ([X, {"k": X + 1}], True, X + 2), {"scale": 3.0, "mask": None}
    captured = capture(model, args, kwargs)
    assert [entry.name for entry in captured.inputs if entry.kind == "user"] == ["xs[0]", "xs[1]['k']", "args[2]"]
    assert_same_outputs(captured, model, args, kwargs)


def test_constants_are_kept_and_made_up_ones_are_not() -> None:
    captured = capture(Constants(), (X,))
    assert sorted(value.sum().item() for value in captured.constants.values()) == [6.0, 12.0]
    with torch.device("meta"):
        model = Constants()
    on_meta = capture(model, (X,))
    assert on_meta.route == "export(eval)"
    assert [value.device.type for value in on_meta.constants.values()] == ["meta", "meta"]


def test_training_statistics_are_not_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    with only_route("export(train)", monkeypatch):
        captured = capture(model, (X,))
    assert captured.route == "export(train)"
    (outputs,) = next(iter(captured.graph_module.graph.find_nodes(op="output"))).args
    assert len(outputs) == 1
    assert aten.dropout.default in targets(captured)


def test_parametrised_weights() -> None:
    for parametrise in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        model = parametrise(nn.Linear(4, 4))
        captured = capture(model, (X,))
        assert captured.unused == ()
        assert_same_outputs(captured, model, (X,), {})


# --- where ------------------------------------------------------------------------------------------------------------


def node_of(captured: Captured, target: Any) -> fx.Node:
    return next(node for node in captured.graph_module.graph.nodes if node.target is target)


@pytest.mark.parametrize("route", ["export(eval)", "make_fx(eval)"])
def test_where_names_the_module_and_the_users_line(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Plain.forward.__code__.co_firstlineno + 2
    with only_route(route, monkeypatch):
        captured = capture(Plain(), (X,))
    code = "x = x + torch.nn.functional.gelu(block(self.norm(x)))"
    assert where(node_of(captured, aten.gelu.default)) == f"test_capture.py:{line}: {code}"
    assert where(node_of(captured, aten.linear.default)) == f"blocks.0 (test_capture.py:{line}: {code})"
    assert where(captured.inputs[0].node) is None


def test_where_prefers_the_models_file() -> None:
    captured = capture(tiny_models.gpt2(), kwargs={"input_ids": IDS})
    place = where(node_of(captured, aten.scaled_dot_product_attention.default))
    assert place.startswith("transformer.h.0.attn (modeling_gpt2.py:")
    assert "attn_output, attn_weights = attention_interface(" in place


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
    state += [torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())]
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
        capture(model, (torch.randn(2, 5),))
    assert snapshot(model) == before


def test_models_that_draw_random_numbers_leave_the_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(Plain):
        def forward(self, x: Tensor) -> Tensor:
            torch.manual_seed(3)
            return super().forward(x) + torch.randn_like(x) * random.random() * numpy.random.rand()

    model = Noisy()
    for route in ("export(eval)", "make_fx(eval)"):
        before = snapshot(model)
        with monkeypatch.context() as patch, only_route(route, patch):
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


def test_caches_of_functions_hold_no_traced_tensor_afterwards() -> None:
    @_copies.lru_cache
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
    for context in (torch.device("meta"), FakeTensorMode()):
        model = make()
        with context:
            for module in model.modules():
                for held in (module._parameters, module._buffers):
                    for key, value in held.items():
                        if value is not None:
                            device = "meta" if isinstance(context, torch.device) else "cpu"
                            empty = torch.empty_like(value, device=device)
                            held[key] = nn.Parameter(empty) if isinstance(value, nn.Parameter) else empty
        model.tie_weights() if hasattr(model, "tie_weights") else None
        if name == "tied":
            model.head.weight = model.embed.weight
            model.second = model.first
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
    monkeypatch.setattr(capture_module, "MAX_REAL_BYTES", 0)
    monkeypatch.setattr(_copies, "MAX_REAL_BYTES", 0)
    with pytest.raises(CaptureError) as caught:
        capture(Branching(), (X,))
    text = str(caught.value)
    assert text.startswith("Branching could not be traced to a graph.")
    for route in ("export(eval): ", "export(train): ", "make_fx(eval): a copy with values takes"):
        assert f"\n    {route}" in text
    assert caught.value.__cause__ is not None


# --- parameters that vanish -------------------------------------------------------------------------------------------


def test_caches_of_evaluation_do_not_swallow_parameters() -> None:
    for empties, route in ((True, "export(eval)"), (False, "export(train)")):
        model = Caching(empties).eval()
        model(X)  # fills the cache, with a tensor that carries a gradient and so refuses deepcopy
        captured = capture(model, (X,))
        assert (captured.route, captured.unused) == (route, ())
        assert model.cache is not None and not isinstance(model.cache, FakeTensor)
        assert_same_outputs(captured, Caching(empties).requires_grad_(False), (X,), {})


def test_unused_parameters() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)
            self.router, self.experts = nn.Linear(4, 3), nn.Embedding(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + self.experts(self.router(x).argmax(-1))

    captured = capture(Parts(), (X,))
    assert captured.unused == ("spare.weight", "spare.bias", "router.weight", "router.bias")
    assert captured.route == "export(eval)"
    assert [entry.name for entry in captured.inputs if entry.kind == "parameter"] == list(captured.shapes)


def test_the_mode_that_reaches_more_parameters_wins() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.auxiliary = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = self.body(x)
            return (x, self.auxiliary(x)) if self.training else (x,)

    captured = capture(Auxiliary(), (X,))
    assert (captured.route, captured.unused) == ("export(train)", ())


# --- errors -----------------------------------------------------------------------------------------------------------


def test_the_models_own_error() -> None:
    class Strict(Plain):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] != 3:
                raise ValueError(f"I want three rows, not {x.shape[0]}")
            return super().forward(x)

    line = Strict.forward.__code__.co_firstlineno + 2
    with pytest.raises(CaptureError) as caught:
        capture(Strict(), (X,))
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.what == "Strict does not run on these inputs."
    assert caught.value.why == "ValueError: I want three rows, not 2"
    assert caught.value.where.endswith(
        f'test_capture.py:{line}: raise ValueError(f"I want three rows, not {{x.shape[0]}}")'
    )
    with pytest.raises(CaptureError, match="does not run on these inputs.*\n.*unexpected keyword argument 'y'"):
        capture(Plain(), kwargs={"y": X})


def test_no_parameters() -> None:
    with pytest.raises(WeightError, match="ReLU has no parameters"):
        capture(nn.ReLU(), (X,))


def test_no_parameter_reaches_the_output() -> None:
    class Detour(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    with pytest.raises(WeightError, match="No parameter of Detour reaches its outputs"):
        capture(Detour(), (X,))


def test_integer_outputs() -> None:
    class Labels(Plain):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(x)
            return y.argmax(-1), y > 0

    with pytest.raises(CaptureError, match="Labels returns no floating-point tensor"):
        capture(Labels(), (X,))


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


def test_a_closure_over_the_original() -> None:
    model = Plain()
    forward = model.forward
    model.forward = lambda x: forward(x) * 2
    with pytest.raises(CaptureError, match="is used through a closure that refers to the original model"):
        capture(model, (X,))


def test_running_with_another_model_or_other_arguments() -> None:
    captured = capture(Plain(), (X,))
    with pytest.raises(ModelMismatchError, match="needs the parameter 'blocks.0.weight'"):
        captured(nn.Linear(4, 4), X)
    with pytest.raises(ModelMismatchError, match="needs the user 'x'"):
        captured(Plain())


# --- transformers' caches ---------------------------------------------------------------------------------------------


def test_the_key_value_cache_is_switched_off_in_the_copy_only() -> None:
    model = tiny_models.gpt2()
    model.config.use_cache = True
    for kwargs in ({"input_ids": IDS}, {"input_ids": IDS, "use_cache": True}):
        (outputs,) = next(iter(capture(model, None, kwargs).graph_module.graph.find_nodes(op="output"))).args
        assert len(outputs) == 1
    assert model.config.use_cache is True and kwargs["use_cache"] is True


def test_inputs_are_made_up_where_the_library_says_what_they_are() -> None:
    captured = capture(tiny_models.t5())
    assert [entry.name for entry in captured.inputs if entry.kind == "user"] == [
        "input_ids",
        "attention_mask",
        "decoder_input_ids",
    ]
    with pytest.raises(CaptureError, match="No example inputs are known for Plain"):
        capture(Plain())

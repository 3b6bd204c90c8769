"""Capture: the graph computes what the model computes, names its parts, and errors say what went wrong."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import IDS, MODELS, Branching, Caching, Constants, Plain, Tied, X, assert_same_outputs, only_route
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from modnorm_fx import _copies, _failures, _trace
from modnorm_fx.capture import Captured, capture, where
from modnorm_fx.errors import CaptureError, ModelMismatchError, WeightError

aten = torch.ops.aten


def targets(captured: Captured) -> list[Any]:
    return [node.target for node in captured.graph_module.graph.nodes if node.op == "call_function"]


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
def test_make_fx_gives_the_same_outputs(name: str) -> None:
    make, args, kwargs = MODELS[name]
    model = make()
    with only_route("make_fx(eval)"):
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
    gpt2 = targets(capture(tiny_models.gpt2(2), kwargs={"input_ids": IDS}))
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
    assert captured.modules[""].endswith("tiny_models.Plain")
    assert [entry.name for entry in captured.inputs if entry.kind == "user"] == ["x"]
    assert capture(Plain(), X).graph_module.code == captured.graph_module.code


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


def test_training_statistics_are_not_outputs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    with only_route("export(train)"):
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
def test_where_names_the_module_and_the_users_line(route: str) -> None:
    line = Plain.forward.__code__.co_firstlineno + 2
    with only_route(route):
        captured = capture(Plain(), (X,))
    code = "x = x + torch.nn.functional.gelu(block(self.norm(x)))"
    assert where(node_of(captured, aten.gelu.default)) == f"tiny_models.py:{line}: {code}"
    assert where(node_of(captured, aten.linear.default)) == f"blocks.0 (tiny_models.py:{line}: {code})"
    assert where(captured.inputs[0].node) is None


def test_where_prefers_the_models_file() -> None:
    captured = capture(tiny_models.gpt2(), kwargs={"input_ids": IDS})
    place = where(node_of(captured, aten.scaled_dot_product_attention.default))
    assert place.startswith("transformer.h.0.attn (modeling_gpt2.py:")
    assert "attn_output, attn_weights = attention_interface(" in place


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


# --- what people write ------------------------------------------------------------------------------------------------


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


@torch.library.custom_op("modnorm_fx_tests::without_fake", mutates_args=())
def without_fake(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("modnorm_fx_tests::with_fake", mutates_args=())
def with_fake(x: Tensor) -> Tensor:
    return x * 2


with_fake.register_fake(torch.empty_like)


class Around(nn.Module):
    """Two linear maps around a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


def plain(x: Tensor) -> Tensor:
    return x.tanh()


@pytest.mark.parametrize(
    "function, route",
    [
        (Double.apply, "export(eval)"),
        (lambda x: with_fake(x), "export(eval)"),
        (lambda x: without_fake(x), "make_fx(eval)"),
    ],
)
def test_functions_of_the_users_own(function: Any, route: str) -> None:
    model = Around(function)
    captured = capture(model, (X,))
    assert (captured.route, captured.unused) == (route, ())
    assert_same_outputs(captured, model, (X,), {})


def test_operators_that_a_module_holds_need_no_copy() -> None:
    for operator in (with_fake, torch.ops.aten.tanh, torch.ops.aten.tanh.default):
        assert capture(Around(operator), (X,)).unused == ()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripts_are_refused() -> None:
    for script in (torch.jit.script(nn.Linear(4, 4)), torch.jit.trace(nn.Linear(4, 4), X)):
        with pytest.raises(CaptureError, match="convert the Python model that it was made from"):
            capture(script, (X,))


def compiled_in_place() -> nn.Module:
    model = Around(plain)
    model.compile()
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.compile(Around(plain)),
        compiled_in_place,
        lambda: nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Linear(4, 4))),
        lambda: nn.DataParallel(Around(plain)),
        lambda: nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4))),
    ],
    ids=["compile", "Module.compile", "a part compiled", "DataParallel", "a part scripted"],
)
def test_wrapped_models(make: Any) -> None:
    model = make()
    captured = capture(model, (X,))
    assert captured.unused == ()
    (got,) = captured(model, X)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(got, model(X))


def test_dropout_that_is_off_returns_its_input_and_is_written_into() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            self.drop(y).mul_(3)
            return y + 1

    captured, model = capture(Writes(), (X,)), Writes()
    assert captured.route == "export(eval)"
    assert_same_outputs(captured, model, (X,), {})


class Detector(nn.Module):
    """Takes images of different sizes; in training returns losses, in evaluation the boxes above a threshold: none."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        scores = [self.head(self.body(image).relu()) for image in images]
        if not self.training:
            return [{"boxes": s[s.max(-1).values > 1e9]} for s in scores]
        assert targets is not None, "targets in training"
        wanted = [torch.where(target["labels"] >= 0)[0] for target in targets]
        return {"loss": sum((s[:, 0][w] - 1).square().sum() for s, w in zip(scores, wanted, strict=True))}


def test_models_that_return_something_only_in_training() -> None:
    images = [X, torch.randn(3, 4)]
    targets = [{"labels": torch.tensor([1, -1])}, {"labels": torch.tensor([1, 2, -1])}]
    captured = capture(Detector(), (images, targets))
    assert (captured.route, captured.outputs, captured.unused) == ("make_fx(train)", ("loss",), ())
    model = Detector()
    (loss,) = captured(model, images, targets)
    torch.testing.assert_close(loss, model.train()(images, targets)["loss"])


def test_models_that_find_nothing_say_so() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Detector(), ([X],))
    assert (
        "make_fx(eval), make_fx(below autograd): every floating-point output is empty on these inputs"
        in caught.value.why
    )
    assert "AssertionError: targets in training" in caught.value.why


# --- errors -----------------------------------------------------------------------------------------------------------


def test_failures_of_the_routes_name_the_users_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_copies, _failures, _trace):
        monkeypatch.setattr(module, "MAX_REAL_BYTES", 0)
    with pytest.raises(CaptureError) as caught:
        capture(Branching(), (X,))
    assert "export(eval), export(train): GuardOnDataDependentSymNode" in caught.value.why
    assert "tiny_models.py:" in caught.value.why and "        at " in caught.value.why
    assert "fewer or narrower layers" in caught.value.do
    with pytest.raises(CaptureError) as caught:
        capture(Around(without_fake), (X,))
    assert "give the operator modnorm_fx_tests::without_fake a fake kernel" in caught.value.do


def test_operators_without_a_kernel() -> None:
    library = torch.library.Library("modnorm_fx_tests", "FRAGMENT")
    library.define("no_kernel(Tensor x) -> Tensor")
    with pytest.raises(CaptureError) as caught:
        capture(Around(torch.ops.modnorm_fx_tests.no_kernel), (X,))
    assert "modnorm_fx_tests::no_kernel cannot run here" in caught.value.do
    assert "convert a part of the model (model.first, model.second)" in caught.value.do


def test_modules_without_a_forward() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(4, 4)

    for inputs in ((X,), None):
        with pytest.raises(CaptureError, match="Holder has no forward method") as caught:
            capture(Holder(), inputs)
        assert caught.value.do == "convert a part of the model (model.part)"


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

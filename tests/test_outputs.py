"""Outputs: their names, which of them count, and the choice among them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import X, assert_same_outputs
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modnorm_fx import convert
from modnorm_fx._outputs import matching, named_leaves
from modnorm_fx.capture import capture
from modnorm_fx.errors import CaptureError, WeightError

Point = namedtuple("Point", "x y")


@dataclass
class Parts:
    logits: Tensor
    masks: Tensor | None = None
    boxes: list[Tensor] = field(default_factory=list)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, names",
    [
        (X, ["output"]),
        ((X, [X, None]), ["[0]", "[1][0]", "[1][1]"]),
        ({"logits": X, "aux": [{"boxes": X, "a b": 1}]}, ["logits", "aux[0].boxes", "aux[0]['a b']"]),
        (OrderedDict(out=X, aux=X), ["out", "aux"]),
        (Point(X, (X,)), ["x", "y[0]"]),
        ({0: X}, ["[0]"]),
        ([], []),
    ],
)
def test_names_are_paths_as_they_are_written(value: Any, names: list[str]) -> None:
    assert [name for name, _ in named_leaves(value)] == names
    assert [leaf for _, leaf in named_leaves(value)] == pytree.tree_leaves(value)


def test_dataclasses_and_distributions_are_opened() -> None:
    assert [name for name, _ in named_leaves(Parts(X, None, [X, X]))] == ["logits", "masks", "boxes[0]", "boxes[1]"]
    leaves = dict(named_leaves({"policy": torch.distributions.Normal(X, X.exp())}))
    assert list(leaves) == ["policy.loc", "policy.scale"]
    assert torch.equal(leaves["policy.loc"], X)


def test_outputs_of_transformers_have_the_names_of_their_attributes() -> None:
    model = tiny_models.clip().eval()
    captured = capture(model)
    assert captured.outputs[:2] == ("logits_per_image", "logits_per_text")
    assert "text_model_output.pooler_output" in captured.outputs


def test_a_name_stands_for_everything_below_it() -> None:
    names = ["logits", "aux[0].logits", "aux[0].boxes", "aux[1].boxes", "auxiliary"]
    assert matching(names, "logits") == [0]
    assert matching(names, "aux") == [1, 2, 3]
    assert matching(names, ["aux[1]", "logits"]) == [0, 3]
    with pytest.raises(CaptureError) as caught:
        matching(names, ["logits", "boxes"])
    assert str(caught.value).startswith("The model returns no output named 'boxes' on these inputs.")
    assert "logits, aux[0].logits, aux[0].boxes, aux[1].boxes, auxiliary" in caught.value.why


# --- which count ------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """A body and two heads, and values that no loss can use."""

    def __init__(self, returned: tuple[str, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(4, 2)
        self.returned = returned

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.body(x)
        every = {
            "left": self.left(h).relu(),
            "right": [self.right(h)],
            "ids": h.argmax(-1),
            "grid": x * 2,
            "empty": h[:0],
            "count": 3,
            "none": None,
        }
        return {name: every[name] for name in self.returned}


EVERY = ("left", "ids", "grid", "empty", "count", "none", "right")


def test_floats_that_depend_on_a_parameter_count() -> None:
    captured = capture(Heads(EVERY), (X,))
    assert captured.outputs == ("left", "right[0]")
    assert_same_outputs(captured, Heads(EVERY), (X,), {})


@pytest.mark.parametrize("outputs, names", [("right", ("right[0]",)), (["right[0]", "left"], ("left", "right[0]"))])
def test_chosen_outputs_are_the_only_ones(outputs: Any, names: tuple[str, ...]) -> None:
    captured = capture(Heads(EVERY), (X,), outputs=outputs)
    assert captured.outputs == names
    assert captured.unused == (("left.weight", "left.bias") if len(names) == 1 else ())
    assert_same_outputs(captured, Heads(EVERY), (X,), {})


@pytest.mark.parametrize("outputs", [("left",), ("right",), ("left", "right")])
def test_the_norm_is_that_of_a_model_that_returns_only_the_chosen_outputs(outputs: tuple[str, ...]) -> None:
    def numbers(model: nn.Module, **options: Any) -> dict[str, tuple[float, float]]:
        return {leaf.key: (leaf.target, leaf.mass) for leaf in convert(model, (X,), **options).leaves}

    other = {"left", "right"} - set(outputs)
    if other:
        with pytest.warns(UserWarning, match=rf"no selected output \({outputs[0]}.*: {other.pop()}.weight"):
            chosen = numbers(Heads(EVERY), outputs=outputs)
        with pytest.warns(UserWarning, match="2 parameters reach no output of the model"):
            expected = numbers(Heads(outputs))
    else:
        chosen, expected = numbers(Heads(EVERY), outputs=outputs), numbers(Heads(outputs))
    assert chosen == expected


def test_choices_that_leave_nothing() -> None:
    with pytest.raises(CaptureError, match="None of the chosen outputs is a floating-point tensor: ids, none"):
        capture(Heads(EVERY), (X,), outputs=["ids", "none"])
    with pytest.raises(WeightError, match="No parameter of Heads reaches its outputs"):
        capture(Heads(EVERY), (X,), outputs="grid")
    with pytest.raises(CaptureError, match="no output named 'logits'"):
        convert(Heads(EVERY), (X,), outputs="logits")


def test_objects_that_cannot_be_looked_into() -> None:
    class Result:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Opaque(nn.Linear):
        def forward(self, x: Tensor) -> Result:
            return Result(super().forward(x))

    with pytest.raises(CaptureError, match="objects that cannot be looked into: Result"):
        capture(Opaque(4, 4), (X,))

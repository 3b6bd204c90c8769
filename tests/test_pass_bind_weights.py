"""Where parameters are used: slices, arrangements and maps, checked by reading the parameter with them."""

import pytest
import torch
import torch.nn.functional as F
from modnorm_fx.passes.bind_weights import WeightUse, bind_weights, resolve
from modnorm_fx.passes.measure_constants import made_of_numbers, measure_constants
from staged import REWRITES, With, stage
from torch import Tensor, nn

from modnorm_fx import ATEN, convert
from modnorm_fx.atoms import Slice
from modnorm_fx.errors import WeightError

X = torch.randn(2, 6, 16)


def uses(model: nn.Module, *inputs: Tensor) -> list[WeightUse]:
    staged = stage(model, *(inputs or (X,)))
    staged.rewrite(*REWRITES)
    return [resolve(u) for u in bind_weights(staged.module, staged.captured.inputs, staged.flow(), rules=ATEN)]


def operand(use: WeightUse, parameter: Tensor) -> Tensor:
    """The operand that the use describes, built from the parameter."""
    for part in use.slices:
        parameter = part.read(parameter)
    assert tuple(parameter.shape) == use.shape
    return parameter.contiguous().as_strided(use.view.shape, use.view.stride())


#: name -> (what is done to w before x @ w.T, shape of w); every one is a chain of views
VIEWS = {
    "whole": (lambda w: w, (8, 16)),
    "transposed": (lambda w: w.t(), (16, 8)),
    "transposed twice": (lambda w: w.t().t(), (8, 16)),
    "rows": (lambda w: w[4:12], (20, 16)),
    "columns": (lambda w: w[:, 8:24], (8, 32)),
    "rows of the transpose": (lambda w: w.t()[4:12], (16, 20)),
    "chunk": (lambda w: w.chunk(3, 0)[1], (24, 16)),
    "split along columns": (lambda w: w.split([4, 16], 1)[1], (8, 20)),
    "unbind": (lambda w: w.unbind(0)[1], (3, 8, 16)),
    "select": (lambda w: w[2], (3, 8, 16)),
    "flattened": (lambda w: w.flatten(1), (8, 4, 4)),
    "viewed": (lambda w: w.view(8, 16), (2, 4, 16)),
    "viewed from a vector": (lambda w: w.view(8, 16), (128,)),
    "unsqueezed": (lambda w: w.unsqueeze(0).squeeze(0), (8, 16)),
    "cast": (lambda w: w.double().float(), (8, 16)),
    "rows of rows": (lambda w: w[4:16][2:10], (20, 16)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(name: str):
    make, shape = VIEWS[name]
    model = With(lambda s, x: F.linear(x, make(s.w)), w=shape)
    (use,) = uses(model)
    assert use.parameter == "w" and use.operand == ("weight", None) and use.through == ()
    assert torch.equal(operand(use, model.w), make(model.w))


def test_slices_of_slices_are_one():
    assert [u.slices for u in uses(With(lambda s, x: F.linear(x, s.w[4:16][2:10]), w=(20, 16)))] == [
        (Slice(0, 6, 14, 20),)
    ]


def test_two_blocks_are_two_weights():
    found = uses(With(lambda s, x: F.linear(x, s.w[:8]) * F.linear(x, s.w[8:]), w=(16, 16)))
    assert [u.slices for u in found] == [(Slice(0, 0, 8, 16),), (Slice(0, 8, 16, 16),)]


def test_a_tied_weight_is_used_twice():
    model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 11, bias=False))
    model[1].weight = model[0].weight
    found = uses(model, torch.zeros(2, 6, dtype=torch.long))
    assert [(u.parameter, u.slices, u.is_whole) for u in found] == [("0.weight", (), True)] * 2


THROUGH = {
    "1 + w": (lambda w: 1 + w, ("add",)),
    "exp": (lambda w: torch.exp(w), ("exp",)),
    "-exp": (lambda w: -torch.exp(w), ("exp", "neg")),
    "half, cast": (lambda w: (w / 2).float(), ("div",)),
    "1 - sigmoid": (lambda w: 1 - torch.sigmoid(w), ("sigmoid", "rsub")),
}


AFFINE = {
    "1 + w": lambda w: 1 + w,
    "1 - w": lambda w: 1 - w,
    "w - 3": lambda w: w - 3,
    "-(2 + w/4)": lambda w: -(2 + w / 4),
    "a tensor of numbers": lambda w: torch.tensor(3.0) * w,
    "added twice": lambda w: torch.add(w, 2.0, alpha=3),
    "after a curve": lambda w: 2 + 5 * torch.exp(w),
}


@pytest.mark.parametrize("name", AFFINE)
def test_numbers_on_the_way_are_one_affine_map(name: str):
    make = AFFINE[name]
    staged = stage(With(lambda s, x: x * make(s.w), w=(16,)), X)
    flow, inputs = staged.flow(), staged.captured.inputs
    constants = measure_constants(staged.module, flow, made_of_numbers(inputs, staged.captured.constants))
    (use,) = bind_weights(staged.module, inputs, flow, rules=ATEN, constants=constants)
    w = torch.randn(16)
    curved = torch.exp(w) if name == "after a curve" else w
    assert torch.allclose(use.affine.shift + use.affine.factor * curved, make(w))


@pytest.mark.parametrize("name", THROUGH)
def test_reparametrisations_are_named_in_order(name: str):
    make, names = THROUGH[name]
    (use,) = uses(With(lambda s, x: x * make(s.w), w=(16,)))
    assert use.through == names


def test_broadcasting_is_stride_zero():
    (use,) = uses(With(lambda s, x: torch.cat([s.token.expand(2, -1, -1), x], 1), token=(1, 1, 16)))
    assert use.shape == (1, 1, 16) and use.view.shape == (2, 1, 16) and use.view.stride(0) == 0


def test_packed_layers_give_slices():
    model = With(lambda s, x: (lambda a, b: a * torch.sigmoid(b))(*s.layer(x).chunk(2, -1)), layer=nn.Linear(16, 32))
    found = {(u.parameter, u.slices, u.shape) for u in uses(model)}
    low, high = Slice(0, 0, 16, 32), Slice(0, 16, 32, 32)
    assert found == {
        ("layer.weight", (low,), (16, 16)),
        ("layer.weight", (high,), (16, 16)),
        ("layer.bias", (low,), (16,)),
        ("layer.bias", (high,), (16,)),
    }


CUTS = {"rows": lambda w: w[4:], "columns": lambda w: w[:, 2:18], "transpose": lambda w: w.t()[4:]}


@pytest.mark.parametrize("name", CUTS)
def test_packed_layers_of_slices(name: str):
    """A fused projection whose weight is itself a part of a parameter, as in cross attention."""
    cut = CUTS[name]
    model = With(lambda s, x: (lambda a, b: a * torch.sigmoid(b))(*F.linear(x, cut(s.w)).chunk(2, -1)), w=(20, 20))
    whole = cut(model.w)
    found = uses(model, torch.randn(2, 6, whole.shape[1]))
    assert len(found) == 2
    assert torch.equal(torch.cat([operand(u, model.w) for u in found]), whole)


def test_rearranged_beyond_following_is_refused_by_name():
    model = With(lambda s, x: x * s.w.t().reshape(16), w=(4, 4))
    with pytest.raises(WeightError) as caught:
        uses(model)
    assert "'w'" in str(caught.value) and "aten.mul.Tensor" in str(caught.value)


def test_slices_of_one_of_several_matrices():
    """An expert picked by its number, whose gate and up are then cut apart."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = nn.Parameter(torch.randn(3, 12, 8))

        def forward(self, x):
            gate, up = F.linear(x, self.both[1]).chunk(2, dim=-1)
            return torch.sigmoid(gate) * up

    model = Experts()
    with pytest.warns(UserWarning, match="Only parts of both reach"):
        norm = convert(model, (torch.randn(5, 8),))
    assert [leaf.key for leaf in norm.leaves] == ["both[1:2][:, 0:6]", "both[1:2][:, 6:12]"]
    marked = torch.arange(3.0 * 12 * 8).reshape(3, 12, 8)
    for leaf, wanted in zip(norm.leaves, (marked[1, :6], marked[1, 6:]), strict=True):
        assert torch.equal(leaf.read(marked).flatten(), wanted.flatten())
        assert "Linear 8→6" in leaf.atom.describe()

"""Views as data: what sizes, strides and offsets say, against the indices themselves."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from modnorm_fx.passes.layout import Arrangement, canonical, feature_slice, follow, replay, sliced
from staged import With, stage
from torch import Tensor, fx

from modnorm_fx import ATEN
from modnorm_fx.atoms import Experts, Linear, Reshaped, Slice
from modnorm_fx.rules import shape_of

aten = torch.ops.aten
X = torch.randn(2, 6)


def entries(view: torch.Tensor) -> list[int]:
    """The storage indices a meta view covers, by counting."""
    storage = torch.arange(view.untyped_storage().nbytes() // view.element_size())
    return storage.as_strided(view.shape, view.stride(), view.storage_offset()).reshape(-1).tolist()


@st.composite
def views(draw):
    """A contiguous tensor, and a view of it made by a few slices, permutations and unflattenings."""
    whole = torch.empty(draw(st.sampled_from([(12,), (4, 6), (6, 4), (2, 3, 4), (8, 1, 3)])), device="meta")
    view = whole
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["narrow", "permute", "unflatten", "select", "step", "unsqueeze"]))
        axis = draw(st.integers(0, max(view.dim() - 1, 0)))
        size = view.shape[axis] if view.dim() else 0
        if kind == "narrow" and size > 1:
            start = draw(st.integers(0, size - 1))
            view = view.narrow(axis, start, draw(st.integers(1, size - start)))
        elif kind == "permute":
            view = view.permute(draw(st.permutations(range(view.dim()))))
        elif kind == "unflatten" and size % 2 == 0 and size:
            view = view.unflatten(axis, (2, size // 2))
        elif kind == "select" and view.dim() > 1:
            view = view.select(axis, draw(st.integers(0, size - 1)))
        elif kind == "step" and size > 2:
            view = view[(slice(None),) * axis + (slice(draw(st.integers(0, 1)), None, 2),)]
        elif kind == "unsqueeze":
            view = view.unsqueeze(axis)
    return whole, view


@settings(max_examples=300, deadline=None)
@given(views())
def test_canonical_covers_the_same_entries(pair):
    _, view = pair
    dims = canonical(view)
    sizes, strides = [n for n, _ in dims], [s for _, s in dims]
    rebuilt = torch.empty(0, device="meta").set_(view.untyped_storage(), view.storage_offset(), sizes, strides)
    assert sorted(entries(rebuilt)) == sorted(entries(view))
    assert list(strides) == sorted(strides, reverse=True)


@settings(max_examples=300, deadline=None)
@given(views())
def test_sliced_says_what_is_covered_or_nothing(pair):
    whole, view = pair
    found = sliced(view, whole)
    covered = sorted(entries(view))
    if found is None:
        blocks = [
            sorted(entries(whole.narrow(axis, start, length)))
            for axis, size in enumerate(whole.shape)
            for start in range(size)
            for length in range(1, size - start + 1)
        ]
        assert covered not in blocks  # it gives up only where there is no block along one axis
    else:
        part = whole
        for s in found:
            part = s.read(part)
        assert sorted(entries(part)) == covered


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([(5, 12), (12,), (3, 12, 2), (2, 2, 24)]), st.data())
def test_feature_slice_says_which_features(shape, data):
    """Features along axis 1 of [.., 12, ..] as split_packed asks for them; any view that keeps all positions."""
    axis = {(5, 12): 1, (12,): 0, (3, 12, 2): 1, (2, 2, 24): 2}[shape]
    output = torch.empty(shape, device="meta")
    features = shape[axis]
    view = output.unflatten(axis, data.draw(st.sampled_from([(features,), (4, features // 4), (2, 2, features // 4)])))
    for a in reversed(range(axis, axis + view.dim() - len(shape) + 1)):
        start = data.draw(st.integers(0, view.shape[a] - 1))
        view = view.narrow(a, start, data.draw(st.integers(1, view.shape[a] - start)))
    view = view.permute(data.draw(st.permutations(range(view.dim()))))
    stride = output.stride(axis)
    covered = sorted({(i // stride) % features for i in entries(view)})
    found = feature_slice(view, stride, features)
    if found == "all":
        assert covered == list(range(features))
    elif found != "irregular":
        assert sorted(found.read(torch.arange(features)).tolist()) == covered
        assert found.axis == 0
    else:  # then it is indeed not of the form start <= i % period < stop
        regular = [
            [i for i in range(features) if start <= i % period < stop]
            for period in range(1, features + 1)
            if features % period == 0
            for start in range(period)
            for stop in range(start + 1, period + 1)
        ]
        assert covered not in regular


def test_feature_slice_by_hand():
    output = torch.empty(2, 6, 48, device="meta")
    assert feature_slice(output, 1, 48) == "all"
    assert feature_slice(output[..., 16:32], 1, 48) == Slice(0, 16, 32, 48)
    assert feature_slice(output.view(2, 6, 4, 12)[..., 4:8], 1, 48) == Slice(0, 4, 8, 12)
    assert feature_slice(output.view(2, 6, 3, 4, 4).permute(2, 0, 3, 1, 4)[1], 1, 48) == Slice(0, 16, 32, 48)
    assert feature_slice(output[..., 1::2], 1, 48) == Slice(0, 1, 2, 2)
    assert feature_slice(output.view(2, 6, 4, 3, 4)[..., :2, :, :2], 1, 48) == "irregular"
    assert feature_slice(output[..., :1].expand(2, 6, 5), 1, 48) == "irregular"


def node(op, *args, **kwargs):
    graph = fx.Graph()
    x = graph.placeholder("x")
    return graph.call_function(op, (x, *args), kwargs)


def test_replay_runs_views_and_looks_through_copies():
    x = torch.empty(4, 6, device="meta")
    assert replay(node(aten.t.default), x, ATEN).stride() == (1, 6)
    assert replay(node(aten.clone.default), x, ATEN) is x
    assert [p.storage_offset() for p in replay(node(aten.split.Tensor, 2, 0), x, ATEN)] == [0, 12]
    assert replay(node(aten.unsqueeze.default, 0), x, ATEN).shape == (1, 4, 6)


@pytest.mark.parametrize("call", [(aten.relu.default,), (aten.view.default, [24])], ids=["function", "copy"])
def test_replay_refuses_what_is_no_view(call):
    x = torch.empty(6, 4, device="meta").t()  # view([24]) of a transpose would have to copy
    assert replay(node(*call), x, ATEN) is None


#: what is done to a tensor of shape (4, 6) and, second, to another value; the entries arrive place by place
ARRIVALS = {
    "as it is": lambda w, v: w * v,
    "views": lambda w, v: w.t().reshape(3, 2, 4) * 2,
    "a copy": lambda w, v: w.t().reshape(4, 6) + v,
    "two copies": lambda w, v: w.t().reshape(4, 6).t().reshape(8, 3),
    "over its own norm": lambda w, v: w / w.norm(dim=1, keepdim=True),
    "standardised": lambda w, v: F.batch_norm(w.reshape(1, 4, 6), None, None, training=True).reshape(4, 6) * v,
    "a block": lambda w, v: torch.cat([w, v]),
    "rows": lambda w, v: w.sum(1, keepdim=True) * v,
    "mixed": lambda w, v: (w - w.t().reshape(4, 6)) * v,
    "a product": lambda w, v: w @ v.t(),
}
MIXED = ("rows", "mixed", "a product")


@pytest.mark.parametrize("name", ARRIVALS)
def test_follow(name: str):
    """Where entry i of the tensor arrives, checked by the derivative of every place of the value."""
    make = ARRIVALS[name]
    staged = stage(With(lambda s, x: make(s.w, s.v) + x.sum(), w=(4, 6), v=(4, 6)), X)
    nodes = list(staged.module.graph.nodes)
    start = next(e.node for e in staged.captured.inputs if e.name == "w")
    value = next(n for n in nodes if n.op == "output").all_input_nodes[0].args[0]  # what x.sum() is added to
    found = follow(nodes, start, Arrangement.of((4, 6)), ATEN).get(value)
    if name in MIXED:
        assert found is None
        return
    assert found is not None and found.is_whole
    v = torch.rand(4, 6) + 0.5
    draws = [torch.autograd.functional.jacobian(lambda t: make(t, v), torch.randn(4, 6)) for _ in range(50)]
    jacobian = torch.stack(draws).mean(0).reshape(-1, 24)  # statistics move a place either way
    seen: list[Tensor] = []

    def place(size, view):
        seen.append(torch.arange(math.prod(size)).as_strided(view.shape, view.stride()))
        return Linear(tuple(view.shape)[:2]) if view.dim() == 2 else Experts(tuple(view.shape))

    atom = found.wrap((4, 6), place)
    entries = torch.arange(24.0).reshape(4, 6)
    while isinstance(atom, Reshaped):
        entries = atom.read(entries)
        atom = atom.inner
    arrived = entries.flatten()[seen[0].flatten()].long()
    largest = jacobian[: len(arrived)].abs().argmax(1)
    assert torch.equal(largest, arrived)


def test_follow_marks_what_is_broadcast_and_added():
    staged = stage(With(lambda s, x: F.linear(x, s.g * s.w + s.b), w=(4, 6), g=(4, 1), b=(4, 1)), X)
    nodes = list(staged.module.graph.nodes)
    names = {e.name: e.node for e in staged.captured.inputs}
    operand = next(n for n in nodes if n.target is torch.ops.aten.linear.default).args[1]
    found = {n: follow(nodes, names[n], Arrangement.of(shape_of(names[n])), ATEN)[operand] for n in "wgb"}
    assert {n: (a.is_whole, a.added) for n, a in found.items()} == {
        "w": (True, False),
        "g": (False, False),
        "b": (False, True),
    }

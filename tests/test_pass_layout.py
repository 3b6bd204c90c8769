"""Views as data: what sizes, strides and offsets say, against the indices themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modnorm_fx.passes.layout import canonical, feature_slice, replay, sliced
from torch import fx

from modnorm_fx import ATEN
from modnorm_fx.atoms import Slice

aten = torch.ops.aten


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

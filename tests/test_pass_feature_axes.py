"""Feature axes through the ops that move them, by hand and against a reshape by brute force."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from modnorm_fx.passes.feature_axes import feature_axes, regroup
from staged import REWRITES, With, stage
from torch import nn

from modnorm_fx import ATEN

X = torch.randn(2, 6, 16)
IMAGE = torch.randn(2, 3, 8, 8)
IDS = torch.zeros(2, 6, dtype=torch.long)


def axes_of_output(model, *inputs) -> set[int]:
    staged = stage(model, *inputs)
    staged.rewrite(*REWRITES)
    axes = feature_axes(staged.module, staged.flow(), rules=ATEN)
    (output,) = (n for n in staged.module.graph.nodes if n.op == "output")
    return set(axes[output.all_input_nodes[0]])


def lin(function):
    return With(lambda s, x: function(s.linear(x)), linear=nn.Linear(16, 16))


def conv(function):
    return With(lambda s, x: function(s.conv(x)), conv=nn.Conv2d(3, 16, 3, padding=1))


def heads(t):
    return t.view(2, 6, 4, 4).transpose(1, 2)


SEQUENCES = {
    "linear": (lambda t: t, {2}),
    "heads": (lambda t: t.view(2, 6, 4, 4), {2, 3}),
    "heads moved": (heads, {1, 3}),
    "heads merged": (lambda t: heads(t).transpose(1, 2).reshape(2, 6, 16), {2}),
    "flattened positions": (lambda t: t.reshape(12, 16), {1}),
    "transposed": (lambda t: t.transpose(1, 2), {1}),
    "first token": (lambda t: t[:, 0], {1}),
    "mean over tokens": (lambda t: t.mean(1), {1}),
    "mean over features, kept": (lambda t: t.mean(-1, keepdim=True) * t, {2}),
    "unsqueezed": (lambda t: t.unsqueeze(1), {3}),
    "joined along tokens": (lambda t: torch.cat([t, t], 1), {2}),
    "joined along features": (lambda t: torch.cat([t, t], -1), {2}),
    "stacked": (lambda t: torch.stack([t, t], 1), {3}),
    "function": (lambda t: F.gelu(t) * torch.sigmoid(t), {2}),
    "norm": (lambda t: F.layer_norm(t, (16,)), {2}),
    "einsum": (lambda t: torch.einsum("bld,bmd->bdl", t, t), {1}),
    "einsum over features": (lambda t: torch.einsum("bld,bmd->blm", t, t), {2}),
    "norm over tokens": (lambda t: t.norm(dim=1), {1}),
    "largest of tokens": (lambda t: t.max(1).values, {1}),
    "running sum": (lambda t: t.cumsum(1), {2}),
    "pairs": (lambda t: torch.view_as_complex(t.view(2, 6, 8, 2)) * 1j, {2}),
    "attention": (lambda t: F.scaled_dot_product_attention(heads(t), heads(t), heads(t)), {1, 3}),
    "attention written out": (lambda t: (heads(t) @ heads(t).mT).softmax(-1) @ heads(t), {1, 3}),
}
IMAGES = {
    "convolution": (lambda t: t, {1}),
    "batch norm": (lambda t: F.batch_norm(t, None, None, training=True), {1}),
    "pooled": (lambda t: F.avg_pool2d(t, 2), {1}),
    "pooled and flattened": (lambda t: F.adaptive_avg_pool2d(t, 1).flatten(1), {1}),
    "tokens": (lambda t: t.flatten(2).transpose(1, 2), {2}),
    "windows": (lambda t: F.unfold(t, 2), {1}),
    "folded windows": (lambda t: F.fold(F.unfold(t, 2), (8, 8), 2), {1}),
    "channels last": (lambda t: t.permute(0, 2, 3, 1), {3}),
    "flattened with pixels": (lambda t: t.flatten(1), {1}),
    "mean over pixels": (lambda t: t.mean((2, 3)), {1}),
    "joined along channels": (lambda t: torch.cat([t, t], 1), {1}),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name: str):
    function, expected = SEQUENCES[name]
    assert axes_of_output(lin(function), X) == expected


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str):
    function, expected = IMAGES[name]
    assert axes_of_output(conv(function), IMAGE) == expected


def test_inputs_that_feed_a_convolution_have_channels():
    assert axes_of_output(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 16, 1), nn.Flatten(2)), IMAGE) == {1}
    assert axes_of_output(nn.Sequential(nn.Embedding(10, 4)), IDS) == {2}


def test_one_dimensional_convolutions():
    class Wave(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(16, 8, 3, padding=1)

        def forward(self, x):
            return self.conv(x.transpose(1, 2)).transpose(1, 2)

    assert axes_of_output(Wave(), X) == {2}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_regroup_marks_what_the_features_index(shape, data):
    """By brute force: an axis of the result is a feature axis if moving along it can change a feature index."""
    count = math.prod(shape)
    axes = data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    after, rest = [], count
    while rest > 1 and len(after) < 4:
        after.append(data.draw(st.sampled_from([d for d in range(1, rest + 1) if rest % d == 0])))
        rest //= after[-1]
    after.append(rest)
    found = regroup(tuple(shape), tuple(after), frozenset(axes))
    index = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"))
    features = index[sorted(axes)].reshape(len(axes), *after)
    moving = {a for a in range(len(after)) if after[a] > 1 and bool((features.diff(dim=a + 1) != 0).any())}
    real = {a for a in found if after[a] > 1}
    assert moving <= real  # never misses one; where features and positions mix in an axis, it counts as features
    assert all(0 <= a < len(after) for a in found)

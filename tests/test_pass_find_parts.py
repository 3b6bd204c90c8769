"""Streams whose places are taken apart and joined again: gains against measured changes, and the same model written
in several ways."""

import pytest
import torch
import torch.nn.functional as F
from modnorm_fx.passes.feature_axes import feature_axes
from modnorm_fx.passes.find_parts import find_parts
from staged import REWRITES, With, stage
from torch import Tensor, nn

from modnorm_fx import convert

WIDTH, PLACES, DEPTH = 16, 9, 8
X = torch.randn(4, PLACES, WIDTH, generator=torch.Generator().manual_seed(0))
EVEN = torch.arange(PLACES) % 2 == 0


def linears(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))


def gains(model: nn.Module, *inputs: Tensor, **options) -> dict[str, float]:
    """Relative change of the output per unit of each weight's norm."""
    return {leaf.key: leaf.sensitivity * leaf.scale for leaf in convert(model, inputs or (X,), **options).leaves}


def assert_measured(model: nn.Module, *names: str, inputs: tuple[Tensor, ...] = (X,), rel: float = 0.3) -> None:
    """Gains against the relative change of the output by a random step of norm 1, weights having the declared norms."""
    norm, g = convert(model, inputs), torch.Generator().manual_seed(1)
    norm.initialize_(model, generator=g)
    found = {leaf.key: leaf.sensitivity * leaf.scale for leaf in norm.leaves}
    with torch.no_grad():
        before = model(*inputs)
        for name in names:
            weight = model.get_parameter(name)
            kept, step = weight.clone(), torch.linalg.qr(torch.randn(weight.shape, generator=g))[0]
            weight += 1e-3 * step
            assert found[name] == pytest.approx(float((model(*inputs) - before).norm() / before.norm()) / 1e-3, rel=rel)
            weight.copy_(kept)


# --- one model, written in several ways -------------------------------------------------------------------------------


def by_cat(x, f):
    return torch.cat([x[:, :1], x[:, 1:] + f(x[:, 1:])], 1)


def by_split(x, f):
    first, rest = x.split([1, PLACES - 1], 1)
    return torch.cat([first, rest + f(rest)], 1)


def both(x, f):
    return torch.cat([x[:, :1] + f(x[:, :1]), x[:, 1:] + f(x[:, 1:])], 1)


def by_slice(x, f):
    x = x.clone()
    x[:, 1:] += f(x[:, 1:])
    return x


def by_first(x, f):
    x = x.clone()
    x[:, 0] = x[:, 0] + f(x[:, 0])
    return x


def by_stride(x, f):
    x = x.clone()
    x[:, ::2] += f(x[:, ::2])
    return x


def by_mask(x, f):
    x = x.clone()
    x[:, EVEN] += f(x[:, EVEN])
    return x


def by_where(x, f):
    return torch.where(EVEN[None, :, None], x + f(x), x)


def by_index_copy(x, f):
    index = EVEN.nonzero()[:, 0]
    return x.index_copy(1, index, x[:, index] + f(x[:, index]))


def by_scatter(x, f):
    index = EVEN.nonzero().expand(len(x), -1, WIDTH)
    picked = x.gather(1, index)
    return x.scatter(1, index, picked + f(picked))


def by_masked_scatter(x, f):
    mask = EVEN[None, :, None].expand_as(x)
    return x.masked_scatter(mask, x[:, EVEN] + f(x[:, EVEN]))


WAYS = [
    by_cat, by_split, both, by_slice, by_first, by_stride, by_mask, by_where, by_index_copy, by_scatter,
    by_masked_scatter,
]  # fmt: skip


class Stream(nn.Module):
    """A stem, and layers that take its stream apart."""

    def __init__(self, layer, depth: int = DEPTH):
        super().__init__()
        self.stem, self.layers, self.layer = nn.Linear(WIDTH, WIDTH, bias=False), linears(depth), layer

    def forward(self, x):
        x = self.stem(x)
        for f in self.layers:
            x = self.layer(x, f)
        return x


@pytest.mark.parametrize("layer", WAYS)
def test_a_stream_that_is_taken_apart_in_each_layer_does_not_compound(layer) -> None:
    """√2 a layer was 16 in front of eight; what is measured is 1, as for a stream that is whole."""
    assert_measured(Stream(layer), "stem.weight")


@pytest.mark.parametrize("layer", [by_mask, by_where])
def test_layers_of_some_places(layer) -> None:
    """Places that an index picks are like any others: the measured change, in every layer."""
    assert_measured(Stream(layer, 4), "layers.0.weight", "layers.3.weight", rel=0.4)


def test_two_ways_to_write_one_model_have_one_norm() -> None:
    for one, *others in ((by_cat, by_slice, by_split), (by_mask, by_index_copy, by_scatter)):
        expected = gains(Stream(one, 3))
        assert all(gains(Stream(other, 3)) == pytest.approx(expected, rel=1e-6) for other in others)


class Experts(nn.Module):
    """DeepSeek's published loop: the tokens of each expert are read, and written again."""

    def __init__(self, count: int, write):
        super().__init__()
        torch.manual_seed(0)  # the gate decides how many tokens each has
        self.gate, self.experts, self.write = nn.Linear(WIDTH, count, bias=False), linears(count), write

    def forward(self, x):
        scores, chosen = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            at, which = torch.where(chosen == k)
            y = self.write(y, at, expert(x[at]) * scores[at, which, None])
        return y


def read_and_write(y, at, z):
    y[at] += z
    return y


def test_experts_in_a_loop_as_by_index_add() -> None:
    x = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(0))
    found, added = (
        convert(Experts(16, write), (x,)).targets for write in (read_and_write, lambda y, at, z: y.index_add(0, at, z))
    )
    assert found == pytest.approx(added, rel=1e-6)
    assert min(found.values()) > 0.3  # the first of 16 experts had 1e-3, of 32 3e-6


def choose(y, mask, z):
    return torch.where(mask[:, None], z, y)


def put(y, mask, z):
    y = y.clone()
    y[mask] = z[mask]
    return y


@pytest.mark.parametrize("write", [choose, put])
def test_parts_that_are_put_together_one_after_the_other_are_alike(write) -> None:
    """Each of four layers makes a quarter of the places: measured 1/2 for each, whichever comes first."""
    x = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(0))

    def forward(m, x):
        y = torch.zeros_like(x)
        for k, layer in enumerate(m.layers):
            y = write(y, torch.arange(32) % 4 == k, layer(x))
        return y

    model = With(forward, layers=linears(4))
    found = gains(model, x)
    assert all(found[f"layers.{i}.weight"] == pytest.approx(found["layers.0.weight"], rel=1e-6) for i in range(4))
    assert_measured(model, *found, inputs=(x,), rel=0.4)


# --- what stays as it was ---------------------------------------------------------------------------------------------


def test_parts_of_different_signals_count_as_a_whole() -> None:
    """A class token and its patches: the head may read the token alone."""

    def forward(m, x):
        return m.head(torch.cat([m.token.expand(len(x), -1, -1), m.patches(x)], 1))

    found = gains(With(forward, token=(1, 1, WIDTH), patches=linears(1)[0], head=linears(1)[0]))
    assert found["token"] == found["patches.weight"] == 1.0


def test_a_layer_of_one_place_keeps_its_effect_where_a_slice_picks_it() -> None:
    """A class token that has a layer of its own and is read alone at the end."""

    def forward(m, x):
        for own, f in zip(m.own, m.layers, strict=True):
            x = torch.cat([x[:, :1] + own(x[:, :1]), x[:, 1:] + f(x[:, 1:])], 1)
        return x[:, 0]

    assert_measured(With(forward, own=linears(3), layers=linears(3)), "own.0.weight", "own.2.weight")


def test_prompts_that_replace_places_of_a_stream() -> None:
    """VPT-deep: each layer's own prompts between the class token and the patches; the kept places are as one part."""

    def forward(m, x):
        for prompt, f in zip(m.prompts, m.layers, strict=True):
            x = torch.cat([x[:, :1], prompt.expand(len(x), -1, -1), x[:, 1:]], 1)
            x = x + f(x)
            x = torch.cat([x[:, :1], x[:, 3:]], 1)
        return x

    prompts = nn.ParameterList(nn.Parameter(torch.randn(1, 2, WIDTH)) for _ in range(8))
    model = With(lambda m, x: forward(m, m.stem(x)), stem=linears(1)[0], prompts=prompts, layers=linears(8))
    assert_measured(model, "stem.weight")


def test_the_states_of_a_loop_leave_each_other_as_they_are() -> None:
    """Written one after the other into an empty tensor: as when they are stacked, each moves its own place."""

    def loop(x):
        h, y = torch.zeros(len(x), WIDTH), torch.zeros_like(x)
        for t in range(PLACES):
            h = torch.tanh(x[:, t] + h)
            y[:, t] = h
        return y

    found = parts(loop)
    assert found and all(share == {"src": pytest.approx(1 / PLACES)} for share in found.values())


def test_the_papers_convention_adds_all_paths() -> None:
    found = gains(Stream(by_cat, 1), convention="paper")
    assert found["stem.weight"] == 3.0  # the first place, the others, and the layer


# --- what the pass finds ----------------------------------------------------------------------------------------------


def parts(function, *inputs: Tensor) -> dict[str, dict[str, float]]:
    staged = stage(function, *(inputs or (X,)))
    staged.rewrite(*REWRITES)
    flow = staged.flow()
    found = find_parts(staged.module, flow, feature_axes(staged.module, flow, rules=staged.rules), rules=staged.rules)
    return {node.name: {name: share for (name, _), share in own.items()} for node, own in found.items()}


def test_shares_of_slices_and_of_joins() -> None:
    f = torch.tanh
    shares = [share for own in parts(lambda x: by_cat(x, f)).values() for share in own.values()]
    assert sorted(set(shares)) == [pytest.approx(1 / 9), pytest.approx(8 / 9)]  # of slices; the join has none
    (where,) = parts(lambda x: by_where(x, f)).values()
    assert where == {"self": 0.5, "other": 0.5}
    (copied,) = parts(lambda x: by_index_copy(x, f)).values()
    assert copied == {"self": pytest.approx(4 / 9), "source": pytest.approx(5 / 9)}


@pytest.mark.parametrize("function", [
    lambda x: torch.cat([x.mean(1, keepdim=True), x], 1),  # an average of all places
    lambda x: torch.cat([x[..., :1], x[..., 1:].tanh()], -1),  # features: by cat's own rule
    lambda x: torch.cat([x[:, :4], x[:, 4:8].tanh()], 1),  # parts of equal size, by cat's own rule
    lambda x: torch.cat([F.scaled_dot_product_attention(x[:, :1], x, x), x], 1),  # attention mixes places
    lambda x: F.pad(x, (0, 0, 1, -1)) * 0.5 + x * 0.5,
])  # fmt: skip
def test_leaves_others_alone(function) -> None:
    assert parts(function) == {}


def test_different_inputs_share_nothing() -> None:
    assert parts(lambda x, y: torch.cat([x, y.tanh()], 1), X, X[:, :2]) == {}
    assert parts(lambda x, y: torch.where(EVEN[None, :, None], x, y), X, X + 1) == {}


def test_a_cache_that_is_filled_with_one_signal_is_no_join_of_parts() -> None:
    def fill(x, y):
        cache = torch.zeros(len(x), 32, WIDTH)
        cache[:, :PLACES] = x
        cache[:, PLACES : PLACES + 2] = y
        return cache

    assert parts(fill, X, X[:, :2]) == {}


def test_the_share_of_a_group_is_of_its_own_places() -> None:
    """What lies between two parts of a signal takes nothing from them."""

    def forward(x, y):
        return torch.cat([x[:, :1], y, x[:, 1:]], 1)

    found = [share for own in parts(forward, X, X[:, :2]).values() for share in own.values()]
    assert sorted(found) == [pytest.approx(1 / 9), pytest.approx(8 / 9)]

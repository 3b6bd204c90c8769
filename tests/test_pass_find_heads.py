"""Heads of attention, by hand, on the ways in which models make queries and keys; what a step may do to one head."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from modnorm_fx.models_zoo import build
from modnorm_fx.models_zoo.training import given_inputs
from modnorm_fx.passes.feature_axes import feature_axes
from modnorm_fx.passes.find_heads import Heads, find_heads
from staged import REWRITES, stage
from torch import nn

from modnorm_fx import ModularOptimizer, convert
from modnorm_fx.atoms import Linear
from modnorm_fx.conventions import PAPER, TRACKED

WIDTH, HEADS, SIZE = 16, 4, 4
X = torch.randn(2, 6, WIDTH)


def found(model: nn.Module, *inputs) -> Heads:
    staged = stage(model, *(inputs or (X,)))
    staged.rewrite(*REWRITES)
    flow = staged.flow()
    axes = feature_axes(staged.module, flow, rules=staged.rules)
    return find_heads(staged.module, flow, tuple(staged.typed().values()), axes, rules=staged.rules)


def counts(model: nn.Module, *inputs) -> dict[str, int]:
    """Weight -> heads of the queries or keys that it makes."""
    return {key: count for (key, _), count in found(model, *inputs).of.items()}


def split(x, heads=HEADS):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """``of(module, x)`` gives the queries, keys and values, `[batch, heads, places, features]`."""

    def __init__(self, of, keys=WIDTH, attend=F.scaled_dot_product_attention, **layers):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, keys, bias=False)
        self.v, self.o = nn.Linear(WIDTH, keys, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.of, self.attend = of, attend
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.o(joined(self.attend(*self.of(self, x))))


def plain(m, x):
    return split(m.q(x)), split(m.k(x)), split(m.v(x))


def written_out(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v


def by_einsum(q, k, v):
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / 2, -1), v)


def flattened(q, k, v):
    """Batch and heads as one axis."""
    flat = written_out(*(t.flatten(0, 1) for t in (q, k, v)))
    return flat.unflatten(0, (q.shape[0], q.shape[1]))


def rotated(m, x):
    angle = torch.arange(6.0)[:, None] * torch.ones(SIZE)

    def turn(t):
        half = torch.cat((-t[..., SIZE // 2 :], t[..., : SIZE // 2]), -1)
        return t * angle.cos() + half * angle.sin()

    q, k, v = plain(m, x)
    return turn(q), turn(k), v


def normalised(m, x):
    q, k, v = plain(m, x)
    return m.norm(q), m.norm(k), v


def shared_keys(m, x):
    """Two heads of keys and values for four of queries, copied as transformers does it."""

    def copied(t):
        t = split(t, 2)
        return t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(t.shape[0], HEADS, *t.shape[2:])

    return split(m.q(x)), copied(m.k(x)), copied(m.v(x))


def copied_keys(copy):
    """The same, by a function of `[batch, heads, places, features]`."""
    return lambda m, x: (split(m.q(x)), copy(split(m.k(x), 2)), copy(split(m.v(x), 2)))


def one_key(m, x):
    """One head of keys and values for all."""
    return split(m.q(x)), split(m.k(x), 1), split(m.v(x), 1)


def in_two_parts(m, x):
    """Features of a head from two matrices, the second's the same for all heads."""
    more = m.more(x)[:, None].expand(-1, HEADS, -1, -1)
    return torch.cat((split(m.q(x)), more), -1), torch.cat((split(m.k(x)), more), -1), split(m.v(x))


def strided(m, x):
    """The features of a head are not neighbours."""
    q, k, v = (t.unflatten(-1, (SIZE, HEADS)).permute(0, 3, 1, 2) for t in (m.q(x), m.k(x), m.v(x)))
    return q, k, v


BOTH = {"q.weight": HEADS, "k.weight": HEADS}
WAYS = {
    "plain": (lambda: Attention(plain), BOTH),
    "written out": (lambda: Attention(plain, attend=written_out), BOTH),
    "einsum": (lambda: Attention(plain, attend=by_einsum), BOTH),
    "flattened": (lambda: Attention(plain, attend=flattened), BOTH),
    "rotated": (lambda: Attention(rotated), BOTH),
    "normalised": (lambda: Attention(normalised, norm=nn.LayerNorm(SIZE)), BOTH),
    "strided": (lambda: Attention(strided), BOTH),
    "one head": (lambda: Attention(lambda m, x: (m.q(x)[:, None], m.k(x)[:, None], m.v(x)[:, None])),
                 {"q.weight": 1, "k.weight": 1}),
    "shared keys": (lambda: Attention(shared_keys, 2 * SIZE), {"q.weight": HEADS, "k.weight": 2}),
    "interleaved keys": (lambda: Attention(copied_keys(lambda t: t.repeat_interleave(2, 1)), 2 * SIZE),
                         {"q.weight": HEADS, "k.weight": 2}),
    "repeated keys": (lambda: Attention(copied_keys(lambda t: t.repeat(1, 2, 1, 1)), 2 * SIZE),
                      {"q.weight": HEADS, "k.weight": 2}),
    "keys repeated on a new axis": (
        lambda: Attention(copied_keys(lambda t: t.transpose(0, 1).repeat(2, 1, 1, 1, 1).flatten(0, 1).transpose(0, 1)),
                          2 * SIZE), {"q.weight": HEADS, "k.weight": 2}),
    "one key": (lambda: Attention(one_key, SIZE), {"q.weight": HEADS, "k.weight": 1}),
    "two parts": (lambda: Attention(in_two_parts, more=nn.Linear(WIDTH, 2, bias=False)), BOTH | {"more.weight": 1}),
    "queries as keys": (lambda: Attention(lambda m, x: (split(m.q(x)), split(m.q(x)), split(m.v(x)))),
                        {"q.weight": HEADS}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_heads_of_queries_and_keys(way):
    make, expected = WAYS[way]
    result = found(make())
    assert {key: count for (key, _), count in result.of.items()} == expected
    assert not result.lost


def test_copies_of_keys_have_one_norm_however_they_are_made():
    expected = convert(Attention(shared_keys, 2 * SIZE), (X,)).targets
    for copy in (lambda t: t.repeat_interleave(2, 1), lambda t: t.repeat(1, 2, 1, 1)):
        assert convert(Attention(copied_keys(copy), 2 * SIZE), (X,)).targets == pytest.approx(expected)


def test_features_that_are_repeated_are_not_those_of_a_head():
    """Half the features of each head, twice: the matrix makes no whole heads, and is named."""
    result = found(Attention(copied_keys(lambda t: t.repeat(1, 2, 1, 1)), 2 * SIZE, attend=lambda q, k, v:
                             F.scaled_dot_product_attention(q, k[..., :2].repeat(1, 1, 1, 2), v)))  # fmt: skip
    assert {key for key, _ in result.of} == {"q.weight"} and [name for _, name in result.lost] == ["key"]


def test_a_packed_matrix_is_read_in_its_parts():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4).unbind(0)
            return joined(F.scaled_dot_product_attention(q, k, v))

    assert counts(Packed()) == {"qkv.weight[0:16]": HEADS, "qkv.weight[16:32]": HEADS}
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    assert sorted(counts(layer, X, X, X).values()) == [HEADS, HEADS]


def test_a_matrix_that_makes_values_too_is_left_and_named():
    """A norm layer of all three keeps the matrix from being split; one sensitivity must serve its three parts."""

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(3 * WIDTH)

        def forward(self, x):
            q, k, v = (split(t) for t in self.norm(self.qkv(x)).chunk(3, -1))
            return joined(F.scaled_dot_product_attention(q, k, v))

    result = found(Normalised())
    assert not result.of and [name for _, name in result.lost] == ["query", "key"]
    shared = found(Attention(lambda m, x: (split(m.q(x)), *[split(m.k(x))] * 2)))
    assert {key for key, _ in shared.of} == {"q.weight"} and [name for _, name in shared.lost] == ["key"]


def test_queries_that_no_matrix_makes_are_named():
    result = found(Attention(lambda m, x: (split(x), split(m.k(x)), split(m.v(x)))))
    assert {key for key, _ in result.of} == {"k.weight"} and [name for _, name in result.lost] == ["query"]


def test_what_writes_a_stream_makes_no_queries_of_it():
    """Queries that are the stream itself: its writers do more than make them."""

    def of(m, x):
        x = m.stem(x)
        x = x + m.down(torch.relu(m.up(x)))
        return split(x), split(m.k(x)), split(m.v(x))

    layers = {name: nn.Linear(WIDTH, WIDTH) for name in ("stem", "up", "down")}
    result = found(Attention(of, **layers))
    assert {key for key, _ in result.of} == {"k.weight"} and [name for _, name in result.lost] == ["query"]


def test_a_low_rank_change_is_followed_beside_the_matrix():
    """LoRA: both matrices that end in the queries make them, the one that begins does not."""
    lora = {"down": nn.Linear(WIDTH, 2, bias=False), "up": nn.Linear(2, WIDTH, bias=False)}
    model = Attention(lambda m, x: (split(m.q(x) + 0.5 * m.up(m.down(x))), split(m.k(x)), split(m.v(x))), **lora)
    assert counts(model) == BOTH | {"up.weight": HEADS}


def test_attention_between_features_has_no_heads_to_count():
    """XCiT: logits of pairs of features, summed over places."""
    across = lambda q, k, v: F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT  # noqa: E731
    result = found(Attention(plain, attend=across))
    assert not result.of and [name for _, name in result.lost] == ["query", "key"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hf:gpt2-tiny", {f"transformer.h.0.attn.c_attn.weight[:, {part}]": 4 for part in ("0:64", "64:128")}),
        ("hf:gpt_neox-tiny", {
            "gpt_neox.layers.0.attention.query_key_value.weight.unflatten(0, (-1, 48))[:, 0:16]": 4,
        }),
        ("hf:deepseek_v3-tiny", {
            "model.layers.0.self_attn.q_b_proj.weight": 4,
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight[16:24]": 1,
            "model.layers.0.self_attn.kv_b_proj.weight.unflatten(0, (-1, 32))[:, 0:16]": 4,
        }),
        ("timm:levit_128s", {"stages.1.downsample.attn_downsample.q.ln.linear.weight": 8}),
    ],
)  # fmt: skip
def test_models_as_they_are(spec, expected):
    model = build(spec)
    args, kwargs = given_inputs(model)
    lines = convert(model, args, kwargs).explain("heads").splitlines()
    for key, count in expected.items():
        assert any(line.startswith(f"{key}: {count} head") for line in lines)


# What it is for -------------------------------------------------------------------------------------------------------


def test_only_queries_and_keys_of_several_heads_change():
    """The targets of a model with four heads and of the same with one, whose logits have the same scale."""

    def of(heads):
        return convert(
            Attention(lambda m, x: (split(m.q(x), heads), split(m.k(x), heads), split(m.v(x), heads))), (X,)
        ).targets

    one, four = of(1), of(HEADS)
    assert four == pytest.approx(one | {key: one[key] / 2 for key in ("q.weight", "k.weight")})


def test_the_papers_convention_measures_all_heads_together():
    model = Attention(plain)
    assert PAPER.heads(HEADS) == 1.0
    targets = convert(model, (X,), convention="paper").targets
    for key in ("q.weight", "k.weight"):  # logits move by scale·d_head, that is √d_head, per unit: section 3.3
        assert targets["v.weight"] / targets[key] == pytest.approx(math.sqrt(SIZE))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_a_step_moves_no_head_by_more_than_its_bound(heads, size, seed):
    """By singular values: the most that a step of norm 1 moves the features of one head, for inputs of RMS 1, is
    √heads. A step within one head reaches it."""
    generator = torch.Generator().manual_seed(seed)
    width = heads * size
    atom = Linear((width, width))
    w = torch.randn(width, width, generator=generator)
    atom.normalize_(w, 1.0)
    gains = [torch.linalg.matrix_norm(part, 2) * math.sqrt(width / size) for part in w.split(size)]  # RMS to RMS
    assert max(gains) <= TRACKED.heads(heads) * (1 + 1e-5)
    one = torch.zeros(width, width)
    one[0] = torch.randn(width, generator=generator)
    atom.normalize_(one, 1.0)
    assert torch.linalg.matrix_norm(one[:size], 2) * math.sqrt(width / size) == pytest.approx(
        TRACKED.heads(heads), rel=1e-4
    )


def test_a_dual_step_reaches_the_bound_in_every_head():
    """The dual of a random gradient moves each head's queries by √heads times the norm of the step, which the target
    is divided by."""
    model = Attention(plain)
    norm = convert(model, (X,))
    before = model.q.weight.detach().clone()
    optimizer = ModularOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), norm, lr=1.0, mode="dualize")
    model.q.weight.grad = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    step = before - model.q.weight.detach()
    gains = [float(torch.linalg.matrix_norm(part, 2)) * math.sqrt(WIDTH / SIZE) for part in step.split(SIZE)]
    assert gains == pytest.approx([norm.targets["q.weight"] * 2] * HEADS, rel=0.02)

"""Packed projections: which layouts are taken apart, into which slices, and that the parts compute the same."""

import pytest
import torch
import torch.nn.functional as F
from modnorm_fx.passes.cuts import MOST_PARTS
from modnorm_fx.passes.split_packed import split_packed
from staged import Staged, With, stage
from torch import Tensor, nn

from modnorm_fx import ATEN, convert
from modnorm_fx.atoms import Slice
from modnorm_fx.slices import take_slice

B, T, D, HEADS, SIZE = 2, 6, 16, 4, 4
X = torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def heads(t: Tensor, n: int = HEADS) -> Tensor:
    return t.unflatten(-1, (n, -1)).transpose(1, 2)


def chunked(t):
    return attend(*map(heads, t.chunk(3, -1)))


def split(t):
    return attend(*map(heads, t.split(D, -1)))


def sliced(t):
    return attend(heads(t[..., :D]), heads(t[..., D : 2 * D]), heads(t[..., 2 * D :]))


def gpt_neox(t):
    return attend(*(u.transpose(1, 2) for u in t.view(B, T, HEADS, 3 * SIZE).split(SIZE, -1)))


def bloom(t):
    t = t.view(B, T, HEADS, 3, SIZE)
    return attend(*(t[..., i, :].transpose(1, 2) for i in range(3)))


def timm(t):
    return attend(*t.reshape(B, T, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0))


def timm_by_index(t):
    t = t.reshape(B, T, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
    return attend(t[0], t[1], t[2])


def sam(t):
    """Batch and heads are one axis, which takes a copy."""
    t = t.reshape(B, T, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).reshape(3, B * HEADS, T, SIZE)
    return F.scaled_dot_product_attention(*t.unbind(0)).unflatten(0, (B, HEADS)).transpose(1, 2).flatten(2)


def sam_by_index(t):
    q, k, v = t.reshape(B, T, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).reshape(3, B * HEADS, T, SIZE)
    return q * k + v


def nested(t):
    a, b = t.chunk(2, -1)
    return a.chunk(2, -1)[0] * torch.relu(a.chunk(2, -1)[1]) + b.chunk(2, -1)[0] * torch.relu(b.chunk(2, -1)[1])


THIRDS = [(0, D, 3 * D), (D, 2 * D, 3 * D), (2 * D, 3 * D, 3 * D)]
PER_HEAD = [(0, SIZE, 3 * SIZE), (SIZE, 2 * SIZE, 3 * SIZE), (2 * SIZE, 3 * SIZE, 3 * SIZE)]
HALVES = [(0, D, 2 * D), (D, 2 * D, 2 * D)]
#: name -> (what happens to the output, its size, (start, stop, period) of the parts)
LAYOUTS = {
    "chunk": (chunked, 3 * D, THIRDS),
    "split": (split, 3 * D, THIRDS),
    "slices": (sliced, 3 * D, THIRDS),
    "GPT-NeoX, per head": (gpt_neox, 3 * D, PER_HEAD),
    "Bloom, per head": (bloom, 3 * D, PER_HEAD),
    "timm, unbind": (timm, 3 * D, THIRDS),
    "timm, by index": (timm_by_index, 3 * D, THIRDS),
    "SAM, unbind": (sam, 3 * D, THIRDS),
    "SAM, by index": (sam_by_index, 3 * D, THIRDS),
    "gate and up": (lambda t: F.silu(t.chunk(2, -1)[0]) * t.chunk(2, -1)[1], 2 * D, HALVES),
    "gate and up, interleaved": (lambda t: F.silu(t[..., ::2]) * t[..., 1::2], 2 * D, [(0, 1, 2), (1, 2, 2)]),
    "unequal": (
        lambda t: (lambda q, k, v: attend(heads(q), *(heads(u, 2).repeat_interleave(2, 1) for u in (k, v))))(
            *t.split([16, 8, 8], -1)
        ),
        2 * D,
        [(0, 16, 32), (16, 24, 32), (24, 32, 32)],
    ),
    "some features unused": (lambda t: F.silu(t[..., :8]) * t[..., 8:16], 2 * D, [(0, 8, 32), (8, 16, 32)]),
    "clamped": (lambda t: chunked(t.clamp(-1, 1)), 3 * D, THIRDS),
    "scaled and shifted": (lambda t: gpt_neox(1 - t / 4), 3 * D, PER_HEAD),
    "an activation": (lambda t: (lambda a, b: a * b)(*torch.relu(t).chunk(2, -1)), 2 * D, HALVES),
    "functions and views": (lambda t: timm(F.silu(t * 0.5).view(B, T, -1).clamp(max=1)), 3 * D, THIRDS),
    "one part with a function": (lambda t: chunked(t) + (2 * t).chunk(3, -1)[0], 3 * D, THIRDS),
    "nested": (nested, 4 * D, [(0, D, 4 * D), (D, 2 * D, 4 * D), (2 * D, 3 * D, 4 * D), (3 * D, 4 * D, 4 * D)]),
}
WHOLE = {
    "whole and a slice": lambda t: t + F.silu(t[..., :1]),
    "overlapping slices": lambda t: t[..., :20].sum(-1, keepdim=True) * t[..., 12:],
    "positions, not features": lambda t: t[:, 0] + t[:, 1:].mean(1),
    "features of some positions": lambda t: t[:, 0, :16] * t[:, 1, 16:],
    "one slice only": lambda t: t[..., :16],
    "many parts": lambda t: torch.cat(t.chunk(MOST_PARTS * 2, -1)[::-1], -1),
    "a copy that mixes parts and batch": lambda t: (lambda a, b, c, d: a * b + c * d)(
        *t.reshape(B, T, 2, D).permute(2, 0, 1, 3).reshape(2 * B, T, D).unbind(0)
    ),
    "a norm layer first": lambda t: (lambda a, b: a * b)(*F.layer_norm(t, (2 * D,)).chunk(2, -1)),
    "softmax first": lambda t: (lambda a, b: a * b)(*t.softmax(-1).chunk(2, -1)),
    "a number for each feature first": lambda t: (lambda a, b: a * b)(*(t * torch.arange(2.0 * D)).chunk(2, -1)),
    "a function that is used whole": lambda t: (lambda a, b: a * b)(*t.chunk(2, -1)) + t.clamp(-1, 1).sum(-1, True),
    "the square of itself": lambda t: (lambda a, b: a * b)(*(t * t).chunk(2, -1)),
}


class Layer(nn.Module):
    """A linear layer in one of its spellings, and what is done to its output."""

    def __init__(self, after, size: int, kind: str = "linear", bias: bool = True):
        super().__init__()
        self.after, self.kind = after, kind
        shape = (size, D) if kind in ("linear", "matmul_t") else (D, size)
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        self.bias = nn.Parameter(torch.randn(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "linear":
            return self.after(F.linear(x, self.weight, self.bias))
        if self.kind == "addmm":
            return self.after(torch.addmm(self.bias, x.view(-1, D), self.weight).view(*x.shape[:-1], -1))
        if self.kind == "matmul":
            return self.after(x @ self.weight)
        if self.kind == "matmul_t":
            return self.after(x @ self.weight.t())
        return self.after((x.view(-1, D) @ self.weight).view(*x.shape[:-1], -1))


def found(model: nn.Module, *inputs: Tensor) -> Staged:
    staged = stage(model, *(inputs or (X,)))
    staged.rewrite("packed")
    assert staged.error() < 1e-5
    return staged


def parts(staged: Staged, axis: int = 0) -> list[list[int]]:
    """The indices along ``axis`` of every part of a matrix that the graph takes."""
    out = []
    for node in staged.module.graph.nodes:
        last = node.target is take_slice and not any(user.target is take_slice for user in node.users)
        if last and len(node.meta["val"].shape) > 1:
            chain = [node]
            while chain[-1].args[0].target is take_slice:
                chain.append(chain[-1].args[0])
            assert all(n.args[1] == axis for n in chain)
            index = torch.arange(staged.model.weight.shape[axis])
            for n in reversed(chain):
                index = Slice(0, *n.args[2:]).read(index)
            out.append(index.tolist())
    return sorted(out)


def expected(slices: list[tuple[int, int, int]], size: int) -> list[list[int]]:
    return [[i for i in range(size) if start <= i % period < stop] for start, stop, period in slices]


def test_a_copy_that_keeps_another_axis_first():
    """The parts that are picked behind the copy are examples of the batch."""
    layer = Layer(
        lambda t: (lambda a, b: a * b)(*t.unflatten(-1, (2, D)).transpose(1, 2).reshape(B, -1).unbind(0)), 2 * D
    )
    assert parts(found(layer)) == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str):
    after, size, slices = LAYOUTS[name]
    assert parts(found(Layer(after, size))) == expected(slices, size)


@pytest.mark.parametrize("name", WHOLE)
def test_what_stays_whole(name: str):
    staged = stage(Layer(WHOLE[name], 2 * D), X)
    before = staged.targets()
    assert staged.rewrite("packed") == {"packed": 0}
    assert staged.targets() == before


@pytest.mark.parametrize("kind, axis", [("addmm", 1), ("matmul", 1), ("mm", 1), ("matmul_t", 1), ("linear", 0)])
@pytest.mark.parametrize("layout", ["chunk", "GPT-NeoX, per head"])
def test_spellings_of_the_layer(kind: str, axis: int, layout: str):
    """Slices are taken of the weight as the op sees it: of w.t() along its second axis."""
    after, size, slices = LAYOUTS[layout]
    model = Layer(after, size, kind)
    staged = found(model)
    if kind == "matmul_t":
        model.weight = nn.Parameter(model.weight.detach().t())  # parts() counts along the axis of the op
    assert parts(staged, axis) == expected(slices, size)


def test_the_bias_is_cut_with_the_weight():
    staged = found(Layer(chunked, 3 * D))
    sizes = [tuple(n.meta["val"].shape) for n in staged.module.graph.nodes if n.target is take_slice]
    assert sorted(sizes) == [(D,)] * 3 + [(D, D)] * 3
    assert parts(found(Layer(chunked, 3 * D, bias=False))) == expected(THIRDS, 3 * D)


def test_functions_before_the_cut_or_behind_it_are_one_model():
    """The same norm, and one clamp for all that holds a part."""

    def behind(t):
        return attend(*(heads(u.clamp(-1, 1)) for u in t.chunk(3, -1)))

    def both(t):
        t = t.clamp(-1, 1)
        return attend(*map(heads, t.chunk(3, -1))) + t.chunk(3, -1)[0]

    first, last = (convert(Layer(after, 3 * D), (X,)).targets for after in (lambda t: chunked(t.clamp(-1, 1)), behind))
    assert first == pytest.approx(last) and len(first) == 6
    assert found(Layer(both, 3 * D)).targets().count(torch.ops.aten.clamp.default) == 3


def test_a_convolution():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            a, b = self.conv(x).chunk(2, 1)
            return a * torch.sigmoid(b)

    staged = found(Gated(), torch.randn(2, 3, 8, 8))
    assert staged.targets().count(torch.ops.aten.conv2d.default) == 2


def test_groups_stay_whole():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, groups=2)

        def forward(self, x):
            a, b = self.conv(x).chunk(2, 1)
            return a * torch.sigmoid(b)

    staged = stage(Grouped(), torch.randn(2, 4, 8, 8))
    assert staged.rewrite("packed") == {"packed": 0}


def test_several_users_of_a_part():
    def after(t):
        a, b = t.chunk(2, -1)
        return a * torch.relu(a) + b + torch.relu(b)

    assert parts(found(Layer(after, 2 * D))) == expected(HALVES, 2 * D)


def test_two_layers():
    model = nn.Sequential(Layer(LAYOUTS["gate and up"][0], 2 * D), Layer(chunked, 3 * D))
    staged = stage(model, X)
    assert staged.rewrite("packed") == {"packed": 2}
    assert staged.error() < 1e-5


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention(cross: bool, batch_first: bool):
    """torch.nn's own: q, k, v in one product; in cross attention k and v are cut out of a cut."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(D, HEADS, batch_first=batch_first)

        def forward(self, x, y):
            return self.inner(x, y, y, need_weights=False)[0] if cross else self.inner(x, x, x)[0] + 0 * y

    staged = stage(Attention(), X, X.flip(0))
    assert staged.rewrite("norms", "rotary", "attention", "pointwise", "packed")["packed"] == 1
    assert staged.error() < 1e-5
    assert sum(n.target is torch.ops.aten.linear.default for n in staged.module.graph.nodes) == 4


def test_it_can_run_twice():
    staged = found(Layer(chunked, 3 * D))
    assert staged.rewrite("packed") == {"packed": 0}


def gated(t: Tensor) -> Tensor:
    gate, up = t.chunk(2, -1)
    return F.silu(gate) * up


def interleaved(t: Tensor) -> Tensor:
    return (t[..., 1::2] + 1) * t[..., ::2].clamp(max=7.0)


#: how experts are applied to [E, rows, in] -> (function of the model and x, shape of the weight, axis of the features)
EXPERTS = {
    "batched": (lambda own, x: gated(torch.bmm(x, own.w)), (3, D, 2 * D), 2),
    "batched, [E, out, in]": (lambda own, x: gated(torch.bmm(x, own.w.transpose(1, 2))), (3, 2 * D, D), 1),
    "matmul, interleaved": (lambda own, x: interleaved(x @ own.w), (3, D, 2 * D), 2),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_every_expert_has_its_gate_and_its_up(name: str):
    function, shape, axis = EXPERTS[name]
    x = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))
    staged = stage(With(function, w=shape), x)
    assert staged.rewrite("packed") == {"packed": 1} and staged.error() < 1e-5
    weights = staged.typed().values()
    assert len(weights) == 2 and all("xperts" in w.uses[0][2].describe() for w in weights)
    assert {(part.axis, part.start, part.stop, part.period) for w in weights for part in w.slices} == (
        {(axis, 0, 1, 2), (axis, 1, 2, 2)} if "inter" in name else {(axis, 0, D, 2 * D), (axis, D, 2 * D, 2 * D)}
    )


def test_a_bias_that_is_added_before_the_cut_is_cut_with_it():
    """As GPT-OSS has it: every row looks up the bias of its expert, gate and up alternate."""
    expert = torch.tensor([0, 0, 1, 2, 2])

    def function(own, x):
        return interleaved(x @ own.w + own.b[expert])

    staged = stage(With(function, w=(D, 2 * D), b=(3, 2 * D)), torch.randn(5, D))
    assert staged.rewrite("packed") == {"packed": 1} and staged.error() < 1e-5
    weights = staged.typed()
    assert len(weights) == 4
    parts = sorted((w.parameter, p.axis, p.start, p.period) for w in weights.values() for p in w.slices)
    assert parts == [("b", 1, 0, 2), ("b", 1, 1, 2), ("w", 1, 0, 2), ("w", 1, 1, 2)]


@pytest.mark.parametrize("index, parts", [([-2], 3), ([4], 3), ([1], 0)])
def test_a_constant_index_is_a_slice(index: list[int], parts: int):
    """Falcon's multi-query attention: heads of q, then one of k and one of v."""

    def function(own, x):
        t = (x @ own.w).view(B, T, HEADS + 2, SIZE)
        q, k, v = t[..., :-2, :], t[..., index, :], t[..., [-1], :]
        return attend(*(u.transpose(1, 2) for u in (q, k.expand(q.shape), v.expand(q.shape))))

    staged = stage(With(function, w=(D, D + 2 * SIZE)), X)
    constants = {i.node: staged.captured.constants[i.name] for i in staged.captured.inputs if i.kind == "constant"}
    assert split_packed(staged.module, staged.flow(), rules=ATEN, constants=constants) == (parts > 0)
    staged.module.recompile()
    assert staged.error() < 1e-5
    assert len(staged.typed()) == max(parts, 1)


def lora(own, x: Tensor) -> Tensor:
    return x @ own.w + 0.5 * (x @ own.a @ own.b)


def two_adapters(own, x: Tensor) -> Tensor:
    return lora(own, x) - (x.relu() @ own.c) @ own.d


def causal(own, x: Tensor) -> Tensor:
    """A depthwise convolution over positions that sees the past alone, as Mamba-2 has it behind its projection."""
    t = F.conv1d((x @ own.w).transpose(1, 2), own.kernel, own.shift, padding=3, groups=3 * D)
    return F.silu(t[..., :T]).transpose(1, 2)


#: name -> (what lies before the cut, its weights, the tensors that are cut with the layer and along which axis)
BETWEEN = {
    "LoRA": (lora, dict(w=(D, 3 * D), a=(D, 2), b=(2, 3 * D)), {"w": 1, "b": 1}),
    "two adapters": (
        two_adapters,
        dict(w=(D, 3 * D), a=(D, 2), b=(2, 3 * D), c=(D, 2), d=(2, 3 * D)),
        {"w": 1, "b": 1, "d": 1},
    ),
    "a gain": (lambda own, x: own.g * F.linear(x, own.w), dict(w=(3 * D, D), g=(3 * D,)), {"w": 0, "g": 0}),
    "a gain, a bias, a function": (
        lambda own, x: torch.tanh(F.linear(x, own.w) / own.g + own.b),
        dict(w=(3 * D, D), g=(3 * D,), b=(3 * D,)),
        {"w": 0, "g": 0, "b": 0},
    ),
    "a depthwise convolution": (
        causal, dict(w=(D, 3 * D), kernel=(3 * D, 1, 4), shift=(3 * D,)), {"w": 1, "kernel": 0, "shift": 0}
    ),
}  # fmt: skip


@pytest.mark.parametrize("cut", [chunked, gpt_neox, timm])
@pytest.mark.parametrize("name", BETWEEN)
def test_what_works_on_each_feature_is_cut_with_the_layer(name: str, cut):
    before, weights, axes = BETWEEN[name]
    period = 3 * SIZE if cut is gpt_neox else 3 * D
    staged = stage(With(lambda own, x: cut(before(own, x)), **weights), X)
    assert staged.rewrite("packed")["packed"] >= 1 and staged.error() < 1e-5
    found = staged.typed()
    for name in weights:
        parts = sorted(
            (p.axis, p.start, p.stop, p.period) for w in found.values() if w.parameter == name for p in w.slices
        )
        expected = (
            [(axes[name], i * period // 3, (i + 1) * period // 3, period) for i in range(3)] if name in axes else []
        )
        assert parts == expected


def test_a_layer_behind_which_a_signal_of_no_layer_is_added_stays_whole():
    staged = stage(With(lambda own, x: chunked(x @ own.w + x.repeat(1, 1, 3)), w=(D, 3 * D)), X)
    assert staged.rewrite("packed") == {"packed": 0} and staged.error() == 0.0


def test_a_gain_that_has_another_use_leaves_the_layer_whole():
    model = With(lambda own, x: chunked((x @ own.w) * own.g) * own.g.sum(), w=(D, 3 * D), g=(3 * D,))
    staged = stage(model, X)
    assert staged.rewrite("packed") == {"packed": 0} and staged.error() == 0.0


def test_what_is_added_and_is_no_bias_leaves_the_layer_whole():
    def function(own, x):
        return gated(x @ own.w + own.table)  # one number for each row

    staged = stage(With(function, w=(D, 2 * D), table=(5, 1)), torch.randn(5, D))
    assert staged.rewrite("packed") == {"packed": 0} and staged.error() == 0.0


def test_a_weight_that_is_used_whole_elsewhere_stays_whole_and_one_whose_shape_is_read_does_not():
    class Net(nn.Module):
        def __init__(self, whole: bool):
            super().__init__()
            self.inner, self.whole = nn.Linear(D, 2 * D), whole

        def forward(self, x):
            a, b = self.inner(x).chunk(2, -1)
            y = a * torch.sigmoid(b)
            if self.whole:
                return y, torch.linalg.vector_norm(self.inner.weight)
            return y + self.inner.weight.new_zeros(D)

    for whole, count in ((True, 0), (False, 1)):
        staged = stage(Net(whole), X)
        assert staged.rewrite("packed") == {"packed": count}
        assert staged.error() < 1e-5

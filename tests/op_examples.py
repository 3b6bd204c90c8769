"""An example call for every row of the table, for test_aten_rules."""

from __future__ import annotations

import torch
from op_calls import Example, T, W
from sum_examples import SUMS

from modnorm_fx.shape_rules import RESIZED
from modnorm_fx.slices import returned, take_slice

aten = torch.ops.aten


def grouped_matmul(x, w, ends):
    """What a grouped product is: the rows up to ``ends[e]`` meet expert e."""
    starts = [0, *ends.tolist()[:-1]]
    return torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(zip(starts, ends.tolist(), strict=True))])


grouped_matmul.argument_names = ("input", "weight", "offs")


F = torch.nn.functional
X, Y = T((6, 8), 0.7), T((6, 8), 1.3)
IMAGE, VOLUME, SEQUENCE = T((1, 4, 4, 4), 0.7, "sign"), T((1, 2, 2, 4, 4), 0.7, "sign"), T((1, 4, 6), 0.7, "sign")
MASK = torch.arange(48).reshape(6, 8) % 3 == 0
HEADS = T((1, 2, 8, 8), 0.7)
CHANNELS = frozenset({1})
BATCH = T((32, 4), 0.7)
STATS = (torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
GAIN4, BIAS4 = W("gain", (4,)), W("bias", (4,))


def conv(x: T, weight: W, *rest, **kwargs) -> Example:
    return Example((x, weight, *rest), kwargs, check="weights", features=CHANNELS)


def moves(*args, **kwargs) -> Example:
    """Every entry of the output is an entry of the input."""
    return Example(args, kwargs, check="exact_sensitivity")


def written_over(before, x):
    return x.expand_as(before)


def resized(op) -> Example:
    """Twice as many pixels along every axis."""
    name, overload = str(op).split(".")[1:]
    x = (SEQUENCE, IMAGE, VOLUME)[int(name.removesuffix("_aa")[-2]) - 1]
    size, smooth = [2 * n for n in x.shape[2:]], "nearest" not in name
    rest = ([False] if smooth else []) + ([None] if overload == "vec" else [])
    return Example((x, size, *rest), check="average" if smooth else "exact_sensitivity")


PLACES = torch.arange(48).reshape(6, 8) % 4
C1, C2, C3 = W("conv", (6, 4, 3)), W("conv", (6, 4, 3, 3)), W("conv", (4, 2, 1, 3, 2))


def recurrent(gates: int, *, packed: bool) -> Example:
    """One layer of 4 hidden units on 3 sequences of 5 steps; test_recurrent_rules holds the claims to real layers."""
    state = T((1, 3, 4), 0.0)
    params = [W("gates", (gates * 4, n), groups=gates) for n in (6, 4)] + [W("bias", (gates * 4,))] * 2
    x = (T((15, 6), 0.7), torch.full((5,), 3)) if packed else (T((5, 3, 6), 0.7),)
    rest = (True, 1, 0.0, False, False) + (() if packed else (False,))
    return Example((*x, [state, state] if gates == 4 else state, params, *rest), check="skip")


POSITIVE = T((20, 25), 0.7, "positive")

EXAMPLES: dict[object, list[Example]] = {
    aten.linear.default: [
        Example((T((5, 6), 0.7, "rows"), W("linear", (9, 6)), W("bias", (9,))), check="weights"),
        Example((T((5, 9), 1.3, "rows"), W("linear", (4, 9))), check="weights"),
    ],
    aten.addmm.default: [Example((W("bias", (9,)), T((5, 6), 0.7, "rows"), W("linear_t", (6, 9))), check="weights")],
    aten.baddbmm.default: [
        Example((T((2, 6, 5), 0.7), T((2, 6, 16), 0.7), T((2, 16, 5), 1.3))),
        Example((W("bias", (2, 1, 5)), T((2, 6, 8), 0.7, "rows"), W("experts_t", (2, 8, 5))), check="weights"),
    ],
    aten.convolution.default: [
        conv(IMAGE, C2, W("bias", (6,)), [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        conv(IMAGE, W("conv_t", (4, 3, 2, 2)), None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1),
    ],
    aten.conv1d.default: [conv(SEQUENCE, C1, None, [2], [1])],
    aten.conv2d.default: [
        conv(IMAGE, C2, W("bias", (6,))),
        conv(IMAGE, W("conv", (4, 2, 3, 3), groups=2), None, [1, 1], [1, 1], [1, 1], 2),
        Example((T((2, 8, 8, 8)), W("conv", (8, 1, 3, 3), groups=8), None, [1, 1], [0, 0], [1, 1], 8), check="typical"),
    ],
    aten.conv3d.default: [conv(VOLUME, C3)],
    aten.conv1d.padding: [conv(SEQUENCE, C1, None, [1], "same")],
    aten.conv2d.padding: [conv(IMAGE, C2, None, [1, 1], "valid")],
    aten.conv3d.padding: [conv(VOLUME, C3, None, [1, 1, 1], "same")],
    aten.conv_transpose1d.default: [conv(SEQUENCE, W("conv_t", (4, 3, 2)), W("bias", (3,)))],
    aten.conv_transpose2d.input: [conv(IMAGE, W("conv_t", (4, 3, 2, 2)), None, [2, 2])],
    aten.conv_transpose3d.input: [conv(VOLUME, W("conv_t", (2, 3, 1, 2, 2)))],
    aten._grouped_mm.default: [
        Example(
            (T((6, 8), 0.7, "rows"), W("experts_t", (2, 8, 5)), torch.tensor([2, 6])),
            check="weights",
            run=grouped_matmul,
        )
    ],
    "transformers.grouped_mm_fallback.default": [
        Example(
            (T((6, 8), 0.7, "rows"), W("experts_t", (2, 8, 5)), torch.tensor([2, 6])),
            check="weights",
            run=grouped_matmul,
        )
    ],
    aten.embedding.default: [Example((W("embedding", (11, 8)), torch.tensor([[3, 1], [0, 3]])), check="weights")],
    aten.matmul.default: [
        Example((T((4, 16), 0.7), T((16, 5), 1.3))),
        Example((T((5, 6), 0.7, "rows"), W("linear_t", (6, 9))), check="weights"),
        Example((torch.full((4, 16), 1 / 16).double(), T((16, 5), 1.3)), check="not_exceeded", averages=(0,)),
    ],
    aten.mm.default: [
        Example((T((4, 16), 0.7), T((16, 5), 1.3))),
        Example((T((6, 8), 0.7, "rows"), W("linear_t", (8, 3))), check="weights"),
    ],
    aten.bmm.default: [
        Example((T((2, 4, 16), 0.7), T((2, 16, 5), 1.3))),
        Example((T((3, 4, 6), 0.7, "rows"), W("experts_t", (3, 6, 5))), check="weights"),
    ],
    aten.scaled_dot_product_attention.default: [
        Example((HEADS, HEADS, T((1, 2, 8, 8), 1.3)), check="not_exceeded"),
        Example(
            (T((1, 1, 8, 16)), T((1, 1, 8, 16)), T((1, 1, 8, 4), 0.5), T((8, 8))), {"scale": 0.2}, check="not_exceeded"
        ),
    ],
    **{
        getattr(aten, f"_scaled_dot_product_{name}").default: [
            Example((HEADS, HEADS, T((1, 2, 8, 8), 1.3)), check="not_exceeded", run=F.scaled_dot_product_attention)
        ]
        for name in (
            "attention_math flash_attention flash_attention_for_cpu efficient_attention cudnn_attention "
            "fused_attention_overrideable".split()
        )
    },
    aten.add.Tensor: [
        Example((X, Y)),
        Example((X, Y), {"alpha": -2}),
        Example((X, 1.7)),
        Example((X, 1.7), {"alpha": 2}),
        Example((POSITIVE, -1.0)),
        Example((X, Y), {"alpha": 0}),
    ],
    aten.sub.Tensor: [Example((X, Y)), Example((X, Y), {"alpha": 0.5}), Example((X, 0.4)), Example((POSITIVE, 0.4))],
    aten.add.Scalar: [Example((X, 2.0)), Example((POSITIVE, 2.0)), Example((POSITIVE, -1.0))],
    aten.sub.Scalar: [Example((X, 2.0)), Example((POSITIVE, 0.5))],
    aten.rsub.Scalar: [
        Example((X, 1.0)),
        Example((X, 1.0, 3.0)),
        Example((POSITIVE, 1.0)),
        Example((POSITIVE, 1.0, 3.0)),
    ],
    aten.mul.Tensor: [
        Example((X, Y)),
        Example((X, -3.0)),
        Example((T((6, 8), 0.7, "rows"), W("gain", (8,))), check="weights"),
    ],
    aten.mul.Scalar: [Example((X, -3.0), scale=False)],
    aten.div.Scalar: [Example((X, -3.0), scale=False)],
    aten.div.Tensor: [Example((X, T((6, 8), 1.3, "sign"))), Example((X, 4.0))],
    aten.neg.default: [Example((T((6, 8), 0.7, "rows"),))],
    aten.abs.default: [Example((T((6, 8), 0.7, "rows"),))],
    aten.mean.dim: [
        Example((X, [-1]), check="average"),
        Example((X, [0], True), check="average"),
        Example((T((40, 30), 0.7), [-1]), check="typical", features=frozenset(), of_first=frozenset({1})),
        Example((T((9, 30, 7), 0.7), [1, 2], True), check="not_exceeded", of_first=frozenset({1})),
        Example((T((6, 8), 0.7, "positive"), [1]), check="average", features=frozenset(), of_first=frozenset({1})),
    ],
    aten.mean.default: [Example((X,), check="average", features=frozenset())],
    aten.avg_pool1d.default: [Example((SEQUENCE, [2]), check="average")],
    aten.avg_pool2d.default: [Example((IMAGE, [2, 2]), check="average")],
    aten.avg_pool3d.default: [Example((VOLUME, [2, 2, 2]), check="average")],
    aten.adaptive_avg_pool1d.default: [Example((SEQUENCE, [3]), check="average")],
    aten._adaptive_avg_pool2d.default: [Example((IMAGE, [2, 2]), check="average")],
    aten.adaptive_avg_pool2d.default: [Example((IMAGE, [1, 1]), check="average")],
    aten.adaptive_avg_pool3d.default: [Example((VOLUME, [1, 2, 2]), check="average")],
    aten.max_pool1d.default: [Example((T((1, 4, 6)), [2]), check="exact_sensitivity")],
    aten.max_pool2d.default: [Example((T((1, 4, 4, 4)), [2, 2]), check="exact_sensitivity")],
    aten.max_pool3d.default: [Example((T((1, 2, 2, 4, 4)), [2, 2, 2]), check="exact_sensitivity")],
    aten.adaptive_max_pool2d.default: [Example((T((1, 4, 4, 4)), [2, 2]), check="exact_sensitivity")],
    aten.max_pool2d_with_indices.default: [Example((T((1, 4, 4, 4)), [2, 2]), check="exact_sensitivity")],
    aten.amax.default: [Example((X, [-1]), check="exact_sensitivity")],
    aten.amin.default: [Example((X, [-1]), check="exact_sensitivity")],
    aten.max.dim: [Example((X, 1), check="exact_sensitivity")],
    aten.maximum.default: [Example((X, Y), check="not_exceeded")],
    aten.minimum.default: [Example((X, Y), check="not_exceeded")],
    **{
        op: [Example((X, *rest), check="exact_sensitivity")]
        for op, rest in {
            aten.max.default: (),
            aten.min.default: (),
            aten.min.dim: (1,),
            aten.aminmax.default: (),
            aten.median.default: (),
            aten.median.dim: (1,),
            aten.nanmedian.default: (),
            aten.nanmedian.dim: (1,),
            aten.kthvalue.default: (2,),
            aten.mode.default: (1,),
            aten.cummax.default: (1,),
            aten.cummin.default: (1,),
        }.items()
    },
    aten.adaptive_max_pool1d.default: [Example((T((1, 4, 6)), [2]), check="exact_sensitivity")],
    aten.adaptive_max_pool3d.default: [Example((T((1, 2, 2, 4, 4)), [1, 2, 2]), check="exact_sensitivity")],
    aten.max_pool3d_with_indices.default: [Example((T((1, 2, 2, 4, 4)), [2, 2, 2]), check="exact_sensitivity")],
    aten.fractional_max_pool2d.default: [
        Example((T((1, 2, 6, 6)), [2, 2], [3, 3], torch.full((1, 2, 2), 0.3).double()), check="exact_sensitivity")
    ],
    aten.fractional_max_pool3d.default: [
        Example(
            (T((1, 2, 6, 6, 6)), [2, 2, 2], [3, 3, 3], torch.full((1, 2, 3), 0.3).double()), check="exact_sensitivity"
        )
    ],
    aten.fmax.default: [Example((X, Y), check="not_exceeded")],
    aten.fmin.default: [Example((X, Y), check="not_exceeded")],
    aten.clamp.Tensor: [Example((X, T((6, 8), 0.1), T((6, 8), 0.2)), check="not_exceeded")],
    aten.clamp_min.Tensor: [Example((X, T((6, 8), 0.1)), check="not_exceeded")],
    aten.clamp_max.Tensor: [Example((X, T((6, 8), 0.1)), check="not_exceeded")],
    **SUMS,
    # rearrangements
    aten.clone.default: [moves(X)],
    aten.contiguous.default: [moves(X)],
    aten.alias.default: [moves(X)],
    aten._to_copy.default: [moves(X, dtype=torch.float64)],
    aten.to.dtype: [moves(X, torch.float64)],
    aten.to.device: [moves(X, torch.device("cpu"), torch.float64)],
    aten.lift_fresh_copy.default: [moves(X)],
    aten.detach.default: [Example((X,), check="skip")],  # a choice: the derivative is cut, the norm is not
    aten.dropout.default: [moves(X, 0.5, False)],
    aten.native_dropout.default: [moves(X, 0.5, False)],
    aten.roll.default: [moves(X, [1], [0])],
    aten.flip.default: [moves(X, [1])],
    aten.repeat.default: [moves(X, [2, 1])],
    aten.constant_pad_nd.default: [Example((X, [1, 1]), check="not_exceeded")],
    aten.pad.default: [Example((X, [1, 1]), check="not_exceeded"), moves(T((1, 2, 8)), [2, 2], mode="reflect")],
    aten.pixel_shuffle.default: [moves(IMAGE, 2)],
    aten.pixel_unshuffle.default: [moves(IMAGE, 2)],
    **{op: [resized(op)] for op in RESIZED},
    **{
        getattr(aten, f"{name}_pad{d}d").default: [moves((SEQUENCE, IMAGE, VOLUME)[d - 1], [1] * 2 * d)]
        for name in ("reflection", "replication")
        for d in (1, 2, 3)
    },
    aten.take.default: [moves(X, torch.tensor([3, 7, 3]))],
    aten.masked_select.default: [moves(X, MASK)],
    aten.as_strided.default: [moves(X, [4, 3], [8, 1])],
    aten.diagonal.default: [moves(X)],
    aten.diagonal_copy.default: [moves(X)],
    aten.diag_embed.default: [Example((X,), check="not_exceeded")],
    aten.rot90.default: [moves(X)],
    aten.topk.default: [moves(X, 3)],
    aten.sort.default: [moves(X)],
    aten.sort.stable: [moves(X, stable=True)],
    aten.nan_to_num.default: [moves(X)],
    aten.native_channel_shuffle.default: [Example((IMAGE, 2), check="exact_sensitivity", run=F.channel_shuffle)],
    aten.max_unpool2d.default: [
        Example((IMAGE, torch.arange(0, 64, 4).view(1, 1, 4, 4).expand(1, 4, 4, 4), [8, 8]), check="not_exceeded")
    ],
    aten.max_unpool3d.default: [
        Example(
            (VOLUME, torch.arange(0, 64, 2).view(1, 1, 2, 4, 4).expand(1, 2, 2, 4, 4), [4, 4, 4], [2, 2, 2], [0, 0, 0]),
            check="not_exceeded",
        )
    ],
    aten.gather.default: [moves(X, 1, torch.tensor([[0, 5], [2, 2]]))],
    aten.index_select.default: [moves(X, 0, torch.tensor([4, 4, 1]))],
    aten.unfold.default: [moves(X, 1, 4, 2)],
    aten.im2col.default: [
        moves(IMAGE, [2, 2], [1, 1], [0, 0], [1, 1]),
        Example((IMAGE, [3, 3], [1, 1], [1, 1], [1, 1]), check="not_exceeded"),
    ],
    aten.repeat_interleave.self_int: [moves(X, 2, 1)],
    aten.repeat_interleave.self_Tensor: [moves(X, torch.tensor([1, 2, 0, 1, 1, 3]), 0)],
    aten.fill.Scalar: [Example((X, 2.0), check="exact")],
    aten.fill.Tensor: [Example((X, T((), 0.7, "constant")), check="exact")],
    aten.bernoulli.default: [Example((T((6, 8), 0.5, "constant"),), check="skip")],
    aten.channel_shuffle.default: [moves(IMAGE, 2)],
    aten.view.default: [moves(X, [2, 24])],
    aten._unsafe_view.default: [moves(X, [2, 24])],
    aten.reshape.default: [moves(X, [-1])],
    aten.transpose.int: [moves(X, 0, 1)],
    aten.permute.default: [moves(X, [1, 0])],
    aten.t.default: [moves(X)],
    aten.unsqueeze.default: [moves(X, 1)],
    aten.squeeze.default: [moves(T((6, 1, 8)))],
    aten.squeeze.dim: [moves(T((6, 1, 8)), 1)],
    aten.squeeze.dims: [moves(T((6, 1, 8, 1)), [1, 3])],
    aten.expand.default: [moves(T((6, 1)), [6, 8])],
    aten.flatten.using_ints: [moves(X)],
    aten.unflatten.int: [moves(X, 1, [2, 4])],
    aten.slice.Tensor: [moves(X, 1, 2, 7, 2)],
    aten.select.int: [moves(X, 0, 3)],
    aten.narrow.default: [moves(X, 1, 2, 3)],
    aten.split.Tensor: [moves(X, 4, 1)],
    aten.split_with_sizes.default: [moves(X, [3, 5], 1)],
    aten.chunk.default: [moves(X, 3, 1)],
    aten.unbind.int: [moves(X, 1)],
    aten.movedim.intlist: [moves(X, [0], [1])],
    aten.swapaxes.default: [moves(X, 0, 1)],
    aten.numpy_T.default: [moves(X)],
    aten.mT.default: [moves(X)],
    aten.type_as.default: [Example((X, torch.zeros(1)), check="exact_sensitivity")],
    aten.to.other: [Example((X, torch.zeros(1, dtype=torch.float64)), check="exact_sensitivity")],
    aten.copy.default: [
        Example((torch.zeros(6, 8, dtype=torch.float64), X), check="exact_sensitivity", run=written_over)
    ],
    take_slice: [moves(X, 1, 2, 5, 8)],
    returned: [moves(T((6, 8), 1.0))],
    aten.index.Tensor: [moves(X, [torch.tensor([0, 3, 3])])],
    # masks
    aten.masked_fill.Scalar: [Example((T((6, 8), 0.7, "sign"), MASK, 0.0))],
    aten.masked_fill.Tensor: [Example((T((6, 8), 0.7, "sign"), MASK, torch.tensor(0.0).double()))],
    aten.tril.default: [Example((T((6, 8), 0.7, "sign"),))],
    aten.triu.default: [Example((T((6, 8), 0.7, "sign"), 1))],
    aten.where.self: [Example((MASK, T((6, 8), 0.7, "sign"), T((6, 8), 1.3, "sign")))],
    aten.where.ScalarOther: [Example((MASK, T((6, 8), 0.7, "sign"), 0.0))],
    aten.where.ScalarSelf: [Example((MASK, 0.0, T((6, 8), 0.7, "sign")))],
    aten.masked_scatter.default: [Example((T((6, 8), 0.7, "sign"), MASK, T((6, 8), 1.3, "sign")))],
    aten.scatter.value: [Example((T((6, 8), 0.7, "sign"), 1, PLACES[:, :2], 0.0))],
    aten.index_fill.int_Scalar: [Example((T((6, 8), 0.7, "sign"), 1, torch.tensor([0, 2]), 0.0))],
    aten.index_fill.int_Tensor: [
        Example((T((6, 8), 0.7, "sign"), 1, torch.tensor([0, 2]), torch.tensor(0.0).double()))
    ],
    aten.renorm.default: [Example((T((6, 8), 0.7, "sign"), 2, 0, 0.5))],
    # joining
    aten.cat.default: [
        Example(([T((6, 2), 0.7, "sign"), T((6, 6), 1.3, "sign")], 1)),
        Example(([T((2, 8), 0.7, "sign"), T((6, 8), 1.3, "sign")],), check="positions"),
        Example(([T((1, 2, 3, 3), 0.7, "sign"), T((1, 6, 3, 3), 1.3, "sign")], 1), features=CHANNELS),
    ],
    aten.stack.default: [
        Example(([T((6, 8), 0.7, "sign"), T((6, 8), 1.3, "sign")], -1)),
        Example(([T((6, 8), 0.7, "sign"), T((6, 8), 1.3, "sign")],)),
    ],
    # norm layers
    aten.layer_norm.default: [
        Example((T((3, 64), 0.7), [64])),
        Example((T((3, 64), 0.7), [64], W("gain", (64,)), W("bias", (64,)))),
    ],
    aten.native_layer_norm.default: [Example((T((3, 64), 0.7), [64], W("gain", (64,)), W("bias", (64,)), 1e-5))],
    aten._fused_rms_norm.default: [
        Example((T((3, 64), 1.7), [64], W("gain", (64,)), 1e-6), run=lambda x, n, w, eps: F.rms_norm(x, n, w, eps))
    ],
    aten.native_group_norm.default: [Example((T((2, 4, 16), 1.7), None, None, 2, 4, 16, 2, 1e-5), features=CHANNELS)],
    aten._native_batch_norm_legit.no_stats: [Example((BATCH, GAIN4, BIAS4, True, 0.1, 1e-5), check="typical")],
    aten.rms_norm.default: [Example((T((3, 64), 1.7), [64])), Example((T((3, 64), 1.7), [64], W("gain", (64,))))],
    aten.group_norm.default: [Example((T((2, 4, 16), 1.7), 2), features=CHANNELS)],
    aten.instance_norm.default: [
        Example((T((1, 4, 32), 0.7), None, None, None, None, True, 0.1, 1e-5, False), features=CHANNELS)
    ],
    aten.batch_norm.default: [Example((BATCH, GAIN4, BIAS4, *STATS, True, 0.1, 1e-5, False), check="typical")],
    aten._native_batch_norm_legit_no_training.default: [
        Example(
            (BATCH, GAIN4, BIAS4, *STATS, 0.1, 1e-5),
            check="typical",
            run=lambda x, w, b, m, v, momentum, eps: F.batch_norm(x, m, v, w, b, True, momentum, eps),
        )
    ],
    aten._native_batch_norm_legit_functional.default: [
        Example(
            (BATCH, GAIN4, BIAS4, *STATS, True, 0.1, 1e-5),
            check="typical",
            run=lambda x, w, b, m, v, train, momentum, eps: F.batch_norm(x, m, v, w, b, train, momentum, eps),
        )
    ],
    aten.native_batch_norm.default: [Example((BATCH, GAIN4, BIAS4, *STATS, True, 0.1, 1e-5), check="typical")],
    aten.cudnn_batch_norm.default: [
        Example(
            (BATCH, GAIN4, BIAS4, *STATS, True, 0.1, 1e-5),
            check="typical",
            run=lambda x, w, b, m, v, train, momentum, eps: F.batch_norm(x, m, v, w, b, train, momentum, eps),
        )
    ],
    **{
        getattr(getattr(aten, name), kind): [recurrent(gates, packed=kind == "data")]
        for name, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1))
        for kind in ("input", "data")
    },
    aten._pack_padded_sequence.default: [moves(T((5, 3, 6), 0.7), torch.tensor([5, 5, 5]), False)],
    aten._pad_packed_sequence.default: [moves(T((15, 6), 0.7), torch.full((5,), 3), False, 0.0, 5)],
    # the rest
    aten.relu.default: [Example((T((6, 8), 0.7, "pairs"),))],
    aten.rsqrt.default: [Example((T((6, 8), 0.7, "constant"),), check="exact")],
    aten.sqrt.default: [Example((T((6, 8), 0.7, "constant"),), check="exact")],
    aten.reciprocal.default: [Example((T((6, 8), 0.7, "constant"),), check="exact")],
    aten.log.default: [Example((T((6, 8), 0.7, "constant"),), check="exact")],
    aten.log1p.default: [Example((T((6, 8), 0.7, "constant"),), check="exact")],
    **{
        getattr(aten, n).default: [Example((T((6, 8), 0.7, "constant"),), check="exact")]
        for n in "log2 log10 acos asin atanh erfinv logit tan lgamma digamma special_entr".split()
    },
    aten.remainder.Scalar: [Example((X, 0.5))],
    aten.fmod.Scalar: [Example((X, 0.5))],
    aten.frac.default: [Example((X,))],
    aten.hardshrink.default: [Example((T((20, 20), 0.7),))],
    aten.threshold.default: [Example((T((20, 20), 0.7), 0.1, 0.0))],
    aten.rrelu.default: [Example((X,))],
    aten.pow.Scalar: [Example((2, T((20, 20), 0.7)))],
    aten.softmax.int: [Example((T((6, 8), scale), -1), check="not_exceeded") for scale in (0.7, 5.0)],
    aten._softmax.default: [Example((X, -1, False), check="not_exceeded")],
    aten.log_softmax.int: [Example((T((4, 32), scale), -1), check="typical", scale=False) for scale in (0.7, 2.0)],
    **{getattr(aten, name).default: [moves(X)] for name in "sign sgn round floor ceil trunc".split()},
    aten.prelu.default: [Example((T((16, 4)), torch.full((4,), 0.25).double()), features=CHANNELS)],
}
#: scalar functions, with their further arguments; checked on a grid
POINTWISE: dict[object, list[tuple]] = {
    **{
        getattr(aten, name).default: [()]
        for name in (
            "gelu silu sigmoid tanh elu celu selu mish softplus leaky_relu hardswish hardsigmoid hardtanh relu6 "
            "exp exp2 expm1 sin cos erf square log_sigmoid atan erfc "
            "sinh cosh asinh sinc special_ndtr special_log_ndtr special_i0 "
            "special_i0e special_i1 special_i1e deg2rad rad2deg softshrink".split()
        )
    },
    aten.clamp.default: [(-0.4, 0.9), (None, 0.5)],
    aten.clamp_min.default: [(0.0,), (-0.3,)],
    aten.clamp_max.default: [(0.6,)],
    aten.pow.Tensor_Scalar: [(2,), (3.0,)],
}

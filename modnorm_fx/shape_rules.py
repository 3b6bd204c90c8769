"""Rules for ops that move, copy, pick or join entries."""

from __future__ import annotations

import math

import torch

from . import weight_atoms as atom_of
from .rules import Call, Local, RuleTable, shape_of

__all__ = ["SHAPES"]

aten = torch.ops.aten
SHAPES = RuleTable()

#: resizing: every output pixel is an average of input pixels, or one of them
RESIZED = tuple(
    getattr(getattr(aten, name), overload)
    for name in (
        "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
        "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    )
    for overload in ("vec", "default")
)  # fmt: skip
REARRANGES = "moves entries; the RMS over features is unchanged"


@SHAPES.rule(
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.transpose.int, aten.permute.default,
    aten.t.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.expand.default, aten.flatten.using_ints, aten.unflatten.int, aten.slice.Tensor, aten.select.int,
    aten.narrow.default, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    aten.movedim.intlist, aten.swapaxes.default, aten.numpy_T.default, aten.mT.default,
    status="declared", source=REARRANGES, view=True,
)  # fmt: skip
@SHAPES.rule(
    aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.to.dtype, aten.to.device,
    aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.dropout.default,
    aten.native_dropout.default, aten.roll.default, aten.flip.default, aten.repeat.default,
    aten.constant_pad_nd.default, aten.pad.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
    aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default,
    aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default,
    *RESIZED, aten.gather.default, aten.take.default, aten.masked_select.default, aten.as_strided.default,
    aten.diagonal.default, aten.diagonal_copy.default, aten.diag_embed.default, aten.rot90.default,
    aten.topk.default, aten.sort.default, aten.sort.stable, aten._conj.default, aten.resolve_conj.default,
    aten.nan_to_num.default, aten.native_channel_shuffle.default, aten.max_unpool2d.default, aten.max_unpool3d.default,
    aten.index_select.default, aten.unfold.default, aten.im2col.default, aten.repeat_interleave.self_int,
    aten.repeat_interleave.self_Tensor,
    aten.channel_shuffle.default,
    status="declared", source=REARRANGES,
)  # fmt: skip
def rearrange(call: Call) -> Local:
    name = "self" if "self" in call.args else "input"
    part = call.part(name)
    return Local(call.scale(name), {name: 1.0 if part is None else part})


@SHAPES.rule(aten.type_as.default, aten.to.other, status="declared", source=REARRANGES)
def cast_like(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 1.0, "other": 0.0})


@SHAPES.rule(
    aten.fill.Scalar, aten.fill.Tensor, status="declared", source="one number everywhere; what was there is gone"
)
def fill(call: Call) -> Local:
    return Local(call.scale("value"), {"self": 0.0, "value": 1.0})


@SHAPES.rule(
    aten.bernoulli.default, status="exact", source="0 or 1, RMS √p; its derivative is zero, as autograd has it"
)
def draw(call: Call) -> Local:
    return Local(math.sqrt(min(1.0, call.scale("self"))), {"self": 0.0})


@SHAPES.rule(aten.copy.default, status="declared", source=REARRANGES + "; what was there before is gone")
def copy(call: Call) -> Local:
    return Local(call.scale("src"), {"self": 0.0, "src": 1.0})


@SHAPES.rule(aten.index.Tensor, status="declared", source=REARRANGES, weights={"self": atom_of.looked_up})
def index(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 1.0})


@SHAPES.rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.tril.default, aten.triu.default,
           aten.scatter.value, aten.index_fill.int_Scalar, aten.index_fill.int_Tensor, aten.renorm.default,
           status="bound",
           source="keeps an entry or replaces it by a constant, or shrinks it")  # fmt: skip
def mask(call: Call) -> Local:
    return Local(call.scale("self"), {"self": 1.0})


@SHAPES.rule(
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_scatter.default,
    status="bound",
    source="each entry comes from one operand; √f of those that hold a share f of one signal's places",
)
def where(call: Call) -> Local:
    names = [name for name in ("self", "other", "source") if call.is_tensor(name)]
    parts = {name: part for name in names if (part := call.part(name)) is not None}
    if parts:
        return Local(math.hypot(*(part * call.scale(name) for name, part in parts.items())), parts)
    return Local(max(call.scale(name) for name in names), dict.fromkeys(names, 1.0))


@SHAPES.rule(aten.cat.default, aten.stack.default, status="exact", weights={"tensors": atom_of.joined},
           source="RMS of the whole, √f_i for the share f_i of entries; along positions the largest of them counts, "
           "so 1, unless they are alike (the steps of a loop over time) or hold places of one signal")  # fmt: skip
def cat(call: Call) -> Local:
    tensors = call["tensors"]
    n = len(tensors)
    rank = len(call.shape())
    axis = int(call["dim"] or 0) % rank
    empty = {i for i in range(n) if len(shape_of(tensors[i])) < rank}  # an empty vector joins anything
    stacked = call.node.target is aten.stack.default
    sizes = [1 if stacked else 0 if i in empty else shape_of(tensors[i])[axis] for i in range(n)]
    scales = [call.scale("tensors", i) for i in range(n)]
    if not call.convention.tracks_scales:
        return Local(1.0, {"tensors": [1.0] * n})
    shares = [size / sum(sizes) for size in sizes]
    scale = math.sqrt(sum(f * s * s for f, s in zip(shares, scales, strict=True)))
    as_parts = axis in call.features.get(call.node, frozenset()) or len(set(sizes)) == 1
    if as_parts:
        return Local(scale, {"tensors": [math.sqrt(f) for f in shares]})
    return Local(scale, {"tensors": [1.0 if (part := call.part("tensors", i)) is None else part for i in range(n)]})

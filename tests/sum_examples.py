"""Example calls for rules of what sums and multiplies several entries: a part of op_examples."""

from __future__ import annotations

import torch
from op_calls import Example, T, W

aten = torch.ops.aten
F = torch.nn.functional
X, Y = T((6, 8), 0.7), T((6, 8), 1.3)
IMAGE = T((1, 4, 4, 4), 0.7, "sign")


def nll(x, target, weight, reduction, ignored):
    return F.nll_loss(x, target, reduction=("none", "mean", "sum")[reduction])


def pooled(x, boxes):
    return F.avg_pool2d(x, 2)


pooled.argument_names = ("input", "rois")


def deformed(x, weight, offset, mask, bias, use_mask):
    return F.conv2d(x, weight, bias) * (1 + offset.mean()) * mask.mean()


deformed.argument_names = ("input", "weight", "offset", "mask", "bias", "use_mask")


PAIRS = (
    aten.hypot.default, aten.copysign.Tensor, aten.logaddexp.default, aten.logaddexp2.default,
)  # fmt: skip
LOSS = ((0, "typical"), (1, "not_exceeded"), (2, "not_exceeded"))
PLACES = torch.arange(48).reshape(6, 8) % 4
SUMS: dict[object, list[Example]] = {
    # reductions
    aten.sum.dim_IntList: [
        Example((X, [0])),
        Example((X, [-2, -1])),
        Example((X, None)),
        Example((T((6, 8), 0.7, "positive"), [1])),
    ],
    aten.sum.default: [Example((X,))],
    aten.nansum.default: [Example((X, [1]))],
    aten.trace.default: [Example((T((6, 6), 0.7),))],
    aten.cumsum.default: [Example((T((40, 8), 0.7), 1)), Example((T((40, 8), 0.7, "positive"), 1))],
    aten.prod.default: [Example((T((3,), 0.7, "sign"),))],
    aten.prod.dim_int: [Example((T((6, 3), 0.7, "sign"), 1))],
    aten.cumprod.default: [Example((T((6, 5), 0.7, "sign"), 1))],
    aten.var.correction: [Example((T((8, 40), 0.7), [1]))],
    aten.var_mean.correction: [Example((T((8, 40), 0.7), [1]))],
    aten.std.correction: [Example((T((8, 40), 0.7), [1]))],
    aten.std_mean.correction: [Example((T((8, 40), 0.7), [1]))],
    aten.linalg_vector_norm.default: [Example((T((8, 40), 0.7), p, [1])) for p in (2, 1, 3)]
    + [Example((T((8, 40), 0.7), float("inf"), [1]), scale=False)],
    aten.norm.Scalar: [Example((T((8, 40), 0.7),))],
    aten.norm.ScalarOpt_dim: [Example((T((8, 40), 0.7), 2, [1]))],
    aten.dist.default: [Example((T((8, 40), 0.7), T((8, 40), 1.3)))],
    aten.cdist.default: [Example((T((4, 32), 0.7), T((6, 32), 1.3), p)) for p in (2.0, 1.0)],
    aten._cdist_forward.default: [
        Example((T((4, 32), 0.7), T((6, 32), 1.3), 2.0, None), run=lambda a, b, p, mode: torch.cdist(a, b, p))
    ],
    aten.pdist.default: [Example((T((6, 32), 0.7),))],
    aten._pdist_forward.default: [Example((T((6, 32), 0.7), 1.0), run=F.pdist)],
    aten.logsumexp.default: [Example((T((8, 64), scale), [1])) for scale in (0.4, 0.7)],
    aten.logcumsumexp.default: [Example((X, 1))],
    # sums that land on places
    aten.index_add.default: [
        Example((T((4, 8), 0.7), 0, torch.tensor([0, 1, 2, 3, 1, 2, 0, 3]), T((8, 8), 1.3))),
        Example((T((4, 8), 0.7), 0, torch.tensor([1, 3]), T((2, 8), 1.3)), {"alpha": 2}),
    ],
    aten.scatter_add.default: [Example((T((4, 8), 0.7), 0, PLACES, T((6, 8), 1.3)))],
    aten.scatter_reduce.two: [
        Example((T((4, 8), 0.7), 0, PLACES, T((6, 8), 1.3), "sum")),
        Example((T((4, 8), 0.7), 0, PLACES, T((6, 8), 1.3), "mean"), check="not_exceeded"),
        Example(
            (T((4, 8), 0.7), 0, PLACES, T((6, 8), 1.3), "amax"),
            {"include_self": False},
            check="not_exceeded",
            scale=False,
        ),
    ],
    aten.index_reduce.default: [
        Example((T((4, 8), 0.7), 0, torch.tensor([0, 1, 2, 3, 1, 2]), T((6, 8), 1.3), "mean"), check="not_exceeded")
    ],
    aten.segment_reduce.default: [
        Example((T((6, 8), 0.7), "sum"), {"lengths": torch.tensor([2, 2, 2]), "axis": 0}, check="skip")
    ],
    aten.index_put.default: [
        Example((T((4, 8), 0.7, "sign"), [torch.tensor([0, 1])], T((2, 8), 1.3, "sign")), check="written"),
        Example((T((4, 8), 0.7), [torch.tensor([0, 1])], T((2, 8), 1.3), True)),
    ],
    aten.put.default: [Example((T((4, 8), 0.7), torch.arange(8), T((8,), 1.3), True))],
    aten.slice_scatter.default: [
        Example((T((6, 8), 0.7, "sign"), T((6, 2), 1.3, "sign"), 1, 0, 2), check="exact"),
        Example((T((6, 8), 0.7, "sign"), T((2, 8), 1.3, "sign"), 0, 0, 2), check="written"),
    ],
    aten.select_scatter.default: [Example((T((6, 8), 0.7, "sign"), T((8,), 1.3, "sign"), 0, 3), check="written")],
    aten.diagonal_scatter.default: [Example((T((6, 6), 0.7, "sign"), T((6,), 1.3, "sign")), check="written")],
    aten.as_strided_scatter.default: [
        Example((T((6, 6), 0.7, "sign"), T((6,), 1.3, "sign"), [6], [7], 0), check="written")
    ],
    aten.scatter.src: [Example((T((6, 8), 0.7, "sign"), 1, PLACES[:, :2], T((6, 2), 1.3, "sign")), check="exact")],
    aten.index_copy.default: [
        Example((T((6, 8), 0.7, "sign"), 1, torch.tensor([0, 3]), T((6, 2), 1.3, "sign")), check="exact")
    ],
    aten.col2im.default: [
        Example((T((1, 16, 4), 0.7), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2])),
        Example((T((1, 16, 9), 0.7), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1])),
    ],
    aten.unfold_backward.default: [
        Example((T((3, 4), 0.7), [8], 0, 4, 2), run=lambda x, *_: F.fold(x.T[None], (1, 8), (1, 4), stride=(1, 2)))
    ],
    **{
        op: [
            Example(
                (W("embedding", (11, 8)), torch.tensor([3, 1, 0, 3]), torch.tensor([0, 2]), False, mode),
                check="weights" if mode == 1 else "skip",
            )
            for mode in (0, 1, 2)
        ]
        for op in (aten.embedding_bag.default, aten._embedding_bag.default)
    },
    aten.embedding_bag.padding_idx: [
        Example(
            (
                W("embedding", (11, 8)),
                torch.tensor([3, 1, 0, 3]),
                torch.tensor([0, 2]),
                False,
                1,
                False,
                None,
                False,
                None,
            ),
            check="weights",
        )
    ],
    # losses
    **{
        op: [Example((T((6, 8), 0.7), T((6, 8), 1.3), reduction), check=check) for reduction, check in LOSS]
        for op in (aten.mse_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default)
    },
    aten.soft_margin_loss.default: [Example((X, T((6, 8), 1.0, "sign"), 0), check="skip")],
    aten.binary_cross_entropy_with_logits.default: [Example((X, Y, None, None, 0), check="typical")],
    aten.binary_cross_entropy.default: [
        Example((T((6, 8), 0.5, "constant"), T((6, 8), 0.5, "constant"), None, 0), check="skip")
    ],
    aten.nll_loss_forward.default: [
        Example(
            (X, torch.zeros(6, dtype=torch.long), None, reduction, -100),
            check="skip" if reduction else "exact_sensitivity",
            run=nll,
        )
        for reduction in (0, 1, 2)
    ],
    aten.nll_loss2d_forward.default: [
        Example((IMAGE, torch.zeros(1, 4, 4, dtype=torch.long), None, 0, -100), check="exact_sensitivity", run=nll)
    ],
    aten.ctc_loss.Tensor: [
        Example(
            (T((8, 1, 5), 1.0), torch.ones(1, 3, dtype=torch.long), torch.tensor([8]), torch.tensor([3])),
            check="not_exceeded",
        )
    ],
    aten.ctc_loss.IntList: [
        Example((T((8, 1, 5), 1.0), torch.ones(1, 3, dtype=torch.long), [8], [3]), check="not_exceeded")
    ],
    # complex values
    aten._fft_r2c.default: [Example((X, [0, 1], norm, False)) for norm in (0, 1, 2)],
    aten._fft_c2c.default: [Example((T((6, 8), 0.7, "complex"), [1], norm, False)) for norm in (0, 1, 2)],
    aten._fft_c2r.default: [Example((T((6, 33), 0.7, "complex"), [1], 2, 64))],
    aten.complex.default: [Example((T((6, 8), 0.7, "sign"), T((6, 8), 1.3, "sign")))],
    aten.polar.default: [Example((T((6, 8), 0.7, "constant"), Y))],
    aten.view_as_real.default: [Example((T((6, 8), 0.7, "complex"),), check="typical")],
    aten.view_as_complex.default: [Example((T((6, 4, 2), 0.7),), check="typical")],
    aten.angle.default: [Example((T((6, 8), 0.7, "complex"),), check="skip")],
    aten._conj.default: [Example((T((6, 8), 0.7, "complex"),), check="typical")],
    aten.resolve_conj.default: [Example((T((6, 8), 0.7, "complex"),), check="typical")],
    # products of several entries
    aten.einsum.default: [
        Example(("bqhd,bkhd->bhqk", [T((1, 3, 2, 16), 0.7), T((1, 4, 2, 16), 1.3)])),
        Example(("...i,...i->...", [T((3, 4, 16), 0.7), T((3, 4, 16), 1.3)])),
        Example(("abi,abj,abk->aijk", [T((2, 6, 3), 0.7), T((2, 6, 3), 1.3), T((2, 6, 2), 0.5)])),
        Example(("ij->j", [T((16, 4), 0.7)])),
        Example(
            ("bhqk,bkhd->bqhd", [torch.full((1, 2, 4, 8), 1 / 8).double(), T((1, 8, 2, 4), 1.3)]),
            check="not_exceeded",
            averages=((1, 0),),
        ),
        Example(("bld,od->blo", [T((2, 3, 6), 0.7, "rows"), W("linear", (9, 6))]), check="weights"),
        Example(("bld,do->blo", [T((2, 3, 6), 0.7, "rows"), W("linear_t", (6, 9))]), check="weights"),
        Example(("ebd,edo->ebo", [T((2, 3, 6), 0.7, "rows"), W("experts_t", (2, 6, 9))]), check="weights"),
    ],
    aten.dot.default: [Example((T((40,), 0.7), T((40,), 1.3)))],
    aten.vdot.default: [Example((T((40,), 0.7), T((40,), 1.3)))],
    aten.mv.default: [Example((T((40, 16), 0.7), T((16,), 1.3)))],
    aten.addbmm.default: [Example((T((8, 8), 0.7), T((2, 8, 16), 0.7), T((2, 16, 8), 1.3)), {"beta": 2, "alpha": 0.5})],
    aten.addmv.default: [Example((T((40,), 0.7), T((40, 16), 0.7), T((16,), 1.3)))],
    aten.addr.default: [Example((T((40, 40), 0.7), T((40,), 0.7), T((40,), 1.3)))],
    aten.bilinear.default: [
        Example(
            (T((3, 4), 0.7, "rows"), T((3, 5), 1.3, "rows"), W("bilinear", (6, 4, 5)), W("bias", (6,))), check="weights"
        )
    ],
    aten.linalg_cross.default: [Example((T((20, 3), 0.7), T((20, 3), 1.3)))],
    aten.addcmul.default: [Example((X, Y, T((6, 8), 0.5)), {"value": 2})],
    aten.addcdiv.default: [Example((X, Y, T((6, 8), 0.5, "sign")), {"value": 2})],
    aten.lerp.Scalar: [Example((X, Y, 0.3))],
    aten.lerp.Tensor: [Example((X, Y, T((6, 8), 0.5)))],
    aten.div.Tensor_mode: [Example((X, 2.0), {"rounding_mode": "floor"}, check="not_exceeded", scale=False)],
    aten.floor_divide.default: [Example((X, Y), check="skip")],
    **{op: [Example((T((20, 20), 0.7), T((20, 20), 1.3)))] for op in PAIRS},
    aten.atan2.default: [Example((T((20, 20), 0.7), T((20, 20), 1.3, "sign")), check="skip")],
    aten.xlogy.Tensor: [Example((T((6, 8), 0.7, "sign"), T((6, 8), 0.2, "constant")), check="exact")],
    aten.pow.Tensor_Tensor: [Example((X, Y), check="skip")],
    aten.grid_sampler_2d.default: [
        Example(
            (T((1, 2, 4, 4), 0.7), torch.linspace(-0.9, 0.9, 18).view(1, 3, 3, 2).double(), 0, 0, False),
            check="not_exceeded",
        )
    ],
    aten.grid_sampler_3d.default: [
        Example(
            (T((1, 2, 3, 3, 3), 0.7), torch.linspace(-0.9, 0.9, 24).view(1, 2, 2, 2, 3).double(), 0, 0, False),
            check="not_exceeded",
        )
    ],
    aten.affine_grid_generator.default: [Example((T((2, 2, 3), 0.7), [2, 1, 24, 24], False))],
    **{
        f"torchvision.{name}.default": [Example((IMAGE, torch.zeros(1, 5).double()), check="average", run=pooled)]
        for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")
    },
    "torchvision.deform_conv2d.default": [
        Example(
            (IMAGE, W("conv", (6, 4, 3, 3)), T((1, 18, 2, 2), 0.3), T((1, 9, 2, 2), 1.0), W("bias", (6,)), True),
            check="skip",
            run=deformed,
        )
    ],
}

"""Rules for products that contract: einsum, products with a sum, bilinear layers, deformable convolutions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from . import weight_atoms as atom_of
from .attention_rules import _attention_share
from .layer_rules import UNIT_WEIGHTS
from .rules import Call, Local, RuleTable, shape_of

__all__ = ["PRODUCTS"]

aten = torch.ops.aten
PRODUCTS = RuleTable()

QUADRATURE = "n independent zero-mean terms add in quadrature: √n s_a s_b; a weight counts as norm 1"


def _root(call: Call, n: int) -> float:
    return math.sqrt(n) if call.convention.tracks_scales else float(n)


@PRODUCTS.rule(
    aten.einsum.default,
    status="typical",
    weights={"tensors": atom_of.contracted},
    source=QUADRATURE + "; sums over a softmax row are averages",
)
def einsum(call: Call) -> Local:
    tensors: list[fx.Node] = list(call["tensors"])
    terms, result = atom_of.einsum_labels(str(call["equation"]), [len(shape_of(t)) for t in tensors])
    sizes = {
        label: n for t, term in zip(tensors, terms, strict=True) for label, n in zip(term, shape_of(t), strict=True)
    }
    held = {label for i, term in enumerate(terms) if call.is_weight("tensors", i) for label in term}
    averaged = {label for t, term in zip(tensors, terms, strict=True) if t in call.averages for label in term}
    summed = sizes.keys() - set(result)
    scales = [call.scale("tensors", i) for i in range(len(tensors))]
    if summed & averaged and not call.weights:
        share = _attention_share(call)
        return Local(
            math.prod(scales),
            {"tensors": [share * math.prod(scales[:i] + scales[i + 1 :]) for i in range(len(scales))]},
        )
    root = _root(call, math.prod(sizes[label] for label in summed - held))
    others = [root * math.prod(scales[:i] + scales[i + 1 :]) for i in range(len(scales))]
    return Local(root * math.prod(scales), {"tensors": others})


@PRODUCTS.rule(
    aten.dot.default,
    aten.vdot.default,
    aten.mv.default,
    status="typical",
    source=QUADRATURE,
    weights={"self": atom_of.matmul_left, "vec": atom_of.gain, "tensor": atom_of.gain, "other": atom_of.gain},
)
def vector_product(call: Call) -> Local:
    right = next(name for name in ("vec", "tensor", "other") if name in call.args)
    a, b = call.scale("self"), call.scale(right)
    root = 1.0 if call.is_weight("self") else _root(call, call.shape(right)[0])
    return Local(root * a * b, {"self": root * b, right: root * a})


@PRODUCTS.rule(
    aten.addbmm.default,
    aten.addmv.default,
    aten.addr.default,
    status="typical",
    source=QUADRATURE + "; plus another term",
    weights={
        "self": atom_of.added,
        "batch1": atom_of.matmul_left,
        "batch2": atom_of.matmul_right,
        "mat": atom_of.matmul_left,
        "vec": atom_of.gain,
    },
)
def add_matmul(call: Call) -> Local:
    left, right = [name for name in call.args if name in ("batch1", "batch2", "mat", "vec", "vec1", "vec2")]
    alpha, beta = (1.0 if call[name] is None else abs(float(call[name])) for name in ("alpha", "beta"))
    a, b, shape = call.scale(left), call.scale(right), call.shape(left)
    n = {"addr": 1, "addbmm": shape[0] * shape[-1]}.get(call.node.target.__name__.split(".")[0], shape[-1])  # type: ignore[union-attr]
    root = alpha * (1.0 if call.is_weight(left) or call.is_weight(right) else _root(call, n))
    scale = call.convention.add((beta * call.scale("self"), root * a * b))
    return Local(scale, {"self": beta, left: root * b, right: root * a})


@PRODUCTS.rule(
    aten.bilinear.default,
    status="declared",
    source=UNIT_WEIGHTS + "; of the products of two inputs' entries",
    weights={"weight": atom_of.bilinear, "bias": atom_of.bias},
)
def bilinear(call: Call) -> Local:
    a, b = call.scale("input1"), call.scale("input2")
    return Local(a * b, {"input1": b, "input2": a, "weight": a * b, "bias": 1.0})


@PRODUCTS.rule(
    "torchvision.deform_conv2d.default",
    status="declared",
    weights={"weight": atom_of.conv, "bias": atom_of.bias},
    source=UNIT_WEIGHTS + "; one pixel further the input is another one: √2 s; a mask is a factor",
)
def deformable_convolution(call: Call) -> Local:
    mask = call.scale("mask") if call["use_mask"] else 1.0
    s = call.scale("input")
    return Local(
        s * mask, {"input": mask, "weight": s * mask, "bias": 1.0, "mask": s, "offset": math.sqrt(2) * s * mask}
    )


@PRODUCTS.rule(
    aten.grid_sampler_2d.default,
    aten.grid_sampler_3d.default,
    status="declared",
    source="an average of neighbours, at most their change; a place that moves by 1, half the range of the grid, "
    "reads an independent entry: s; of places beyond that range relative changes count, as for a softmax",
)
def grid_sampler(call: Call) -> Local:
    s = call.scale("input")
    smooth = float(int(call["interpolation_mode"]) != 1)
    return Local(s, {"input": 1.0, "grid": smooth * s / max(1.0, call.scale("grid"))})


@PRODUCTS.rule(
    "torchvision.roi_align.default",
    "torchvision.roi_pool.default",
    "torchvision.ps_roi_align.default",
    "torchvision.ps_roi_pool.default",
    status="declared",
    source="an average (or the largest) of entries; no derivative with respect to the boxes, as torchvision has it",
)
def roi_pool(call: Call) -> Local:
    return Local(call.scale("input"), {"input": 1.0, "rois": 0.0})


@PRODUCTS.rule(
    aten.affine_grid_generator.default,
    status="typical",
    source="a map of places whose coordinates are uniform in [-1, 1], RMS 1/√3, and of 1",
)
def affine_grid(call: Call) -> Local:
    root = (
        math.sqrt(1 + (call.shape("theta")[-1] - 1) / 3)
        if call.convention.tracks_scales
        else float(call.shape("theta")[-1])
    )
    return Local(root * call.scale("theta"), {"theta": root})


@PRODUCTS.rule(aten.complex.default, status="exact", source="|a + ib|² = a² + b²")
def complex_of(call: Call) -> Local:
    return Local(call.convention.add((call.scale("real"), call.scale("imag"))), {"real": 1.0, "imag": 1.0})


@PRODUCTS.rule(aten.polar.default, status="exact", source="|a·exp(iφ)| = a; a turn by dφ moves it by a·dφ")
def polar(call: Call) -> Local:
    s = call.scale("abs")
    return Local(s, {"abs": 1.0, "angle": s})


@PRODUCTS.rule(
    aten.view_as_real.default,
    aten.view_as_complex.default,
    status="exact",
    source="sizes of complex values are those of the modulus: √2 times that of their parts",
)
def parts(call: Call) -> Local:
    factor = 1.0 if not call.convention.tracks_scales else 2 ** (0.5 if "complex" in str(call.node.target) else -0.5)
    return Local(factor * call.scale("self"), {"self": factor})


@PRODUCTS.rule(aten.angle.default, status="declared", source="uniform in [-π, π]; moving z by dz turns it by dz/|z|")
def angle(call: Call) -> Local:
    value: Any = call["self"].meta["val"]
    slope = 1 / call.scale("self") if value.is_complex() else 0.0
    return Local(math.pi / math.sqrt(3), {"self": slope / math.sqrt(2)})

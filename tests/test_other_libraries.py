"""Models that nobody tuned for: nets as other libraries write them, custom operators, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import foreign_code as C
import foreign_layers as L
import foreign_nets as N
import foreign_research as R
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modnorm_fx import ModularOptimizer, convert
from modnorm_fx.errors import ModnormError, OptimizerError
from modnorm_fx.norm import ModularNorm


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def ids(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape)).view(shape) * 7 % 11


EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "diffusion U-Net": (N.DiffusionUNet, (rand(2, 3, 16, 16), torch.tensor([3, 500]), rand(2, 5, 12))),
    "x-transformer": (N.XDecoder, (ids(2, 8),)),
    "detector": (N.Detector, ([rand(3, 32, 32), rand(3, 32, 32)],)),
    "generator": (N.Generator, (rand(3, 8),)),
    "modulated convolution": (N.ModulatedConv, (rand(2, 4, 8, 8), rand(2, 5))),
    "nerf": (N.NeRF, (rand(4, 6, 3), rand(4, 6, 3))),
    "graph net": (N.GraphNet, (rand(6, 5), EDGES, rand(8, 3))),
    "point net": (N.PointNet, (rand(2, 3, 20),)),
    "siren": (N.Siren, (rand(7, 2),)),
    "recommender": (N.Recommender, (rand(4, 5), ids(4, 3, 2))),
    "feature tokens": (N.FeatureTokens, (rand(4, 6),)),
    "binary weights": (L.Binary, (rand(4, 8),)),
    "codebook": (L.Codebook, (rand(4, 8),)),
    "hypernet": (L.HyperNet, (rand(4, 8), rand(4, 5))),
    "parametrized": (L.Parametrized, (rand(4, 8),)),
    "masked": (L.Masked, (rand(4, 8),)),
    "cosine": (L.Cosine, (rand(4, 8),)),
    "lora": (L.LoRA, (rand(4, 8),)),
    "stacked experts": (L.StackedExperts, (rand(2, 5, 8),)),
    "top experts": (L.TopExperts, (rand(2, 5, 8),)),
    "pairs": (L.Pairs, (rand(2, 5, 8), rand(2, 5, 8))),
    "lstm": (L.LanguageLSTM, (ids(2, 6),)),
    "cells": (L.Cells, (rand(2, 5, 6),)),
    "wave": (L.Wave, (rand(2, 1, 16),)),
    "long convolution": (L.LongConv, (rand(2, 16, 4),)),
    "queries": (L.Queries, (rand(2, 5, 8),)),
    "linear attention": (L.LinearAttention, (rand(2, 5, 8),)),
    "fourier": (L.Fourier, (rand(2, 8, 8, 3),)),
    "flow": (L.Flow, (rand(4, 6),)),
    "vae": (L.Vae, (rand(4, 8),)),
    "loss inside": (L.LossInside, ({"ids": ids(2, 6)},)),
    "runge-kutta": (L.RungeKutta, (rand(4, 4),)),
    "bootstrap": (L.Bootstrap, (rand(4, 8), rand(4, 8))),
    "kan": (L.Kan, (rand(7, 4),)),
    "deformable": (L.Deformable, (rand(2, 3, 8, 8),)),
    "capsules": (L.Capsules, (rand(2, 6, 4),)),
    "graph attention": (R.GraphAttention, (rand(6, 5), EDGES)),
    "codec": (R.Codec, (rand(2, 1, 32),)),
    "finite scalars": (R.FiniteScalar, (rand(4, 8),)),
    "hard choice": (R.HardChoice, (rand(4, 8),)),
    "spatial gate": (R.SpatialGate, (rand(2, 3, 16, 16),)),
    "highway": (R.Highway, (rand(4, 8),)),
    "padded bias": (R.PaddedBias, (rand(2, 5, 8),)),
    "differential attention": (R.Differential, (rand(2, 6, 16),)),
}
#: `(exp(a) - 1) / a` of small complex rates, taken at their declared size 1, moves far less than what is added to it
WIDEST = {"long convolution": 1e10}


def converted(model: nn.Module, *args: Any, **options: Any) -> ModularNorm:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert(model, args, **options)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, torch.distributions.Distribution) or dataclasses.is_dataclass(value):
        return [v for part in vars(value).values() for v in tensors(part)]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def moved_by(model: nn.Module, *args: Any) -> set[str]:
    """Parameters with a gradient that is not zero, of a random cotangent of everything the model returns."""
    torch.manual_seed(0)
    model.zero_grad()
    outs = [t for t in tensors(model(*copy.deepcopy(args))) if t.requires_grad]
    torch.autograd.backward(outs, [torch.randn_like(t) for t in outs])
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


#: a state space of complex numbers: that the real parts of its exponents are negative is not seen
WIDE = {"long convolution"}
#: what may be refused, as long as the message helps
HARD = C.HARD | {
    "ensemble": lambda: (L.Ensemble(), (rand(4, 8),)),
    "mixture density": lambda: (L.MixtureDensity(), (rand(4, 8),)),
}


def check(model: nn.Module, args: tuple[Any, ...], norm: ModularNorm, wide: bool = False) -> None:
    """Every gradient has a norm, targets are usable, and a step can be taken."""
    assert moved_by(model, *args) <= {leaf.weight for leaf in norm.leaves}
    targets = [leaf.target for leaf in norm.leaves]
    assert all(0 < target < math.inf for target in targets)
    assert max(targets) / min(targets) < (1e12 if wide else 1e6)
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    ModularOptimizer(torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), norm, lr=0.1).step()
    after = dict(model.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    assert any(not torch.equal(after[k], before[k]) for k in after)


@pytest.mark.parametrize("name", NETS)
def test_nets_as_others_write_them(name: str) -> None:
    make, args = NETS[name]
    torch.manual_seed(0)
    model = make()
    check(model, args, converted(model, *args), wide=name in WIDE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", C.ODD)
def test_code_as_others_write_it(name: str) -> None:
    torch.manual_seed(0)
    model, args = C.ODD[name]()
    check(model, args, converted(model, *args))


@pytest.mark.parametrize("name", HARD)
def test_what_cannot_be_converted_says_what_to_do(name: str) -> None:
    torch.manual_seed(0)
    model, args = HARD[name]()
    try:
        norm = converted(model, *args)
    except ModnormError as error:
        assert error.what and error.do, error
        assert any(name in str(error) for name in (type(model).__name__, "parameter", "foreign_code.py"))
        assert "Traceback" not in str(error) and len(str(error)) < 2500
    else:
        check(model, args, norm)


def test_a_custom_op_without_a_derivative_is_named() -> None:
    model, args = C.HARD["custom op without a derivative"]()
    with pytest.raises(ModnormError, match=r"modnorm_tests\.underived.*foreign_code\.py"):
        converted(model, *args)


def test_a_straight_through_gradient_is_not_seen_and_this_is_said() -> None:
    """The forward pass of a sign has no derivative; its parameters are named, and the optimizer refuses to guess."""
    model = L.StraightThrough()
    with pytest.warns(UserWarning, match="first.weight, first.bias"):
        norm = convert(model, (rand(4, 8),))
    assert norm.unused == ("first.weight", "first.bias")
    assert moved_by(model, rand(4, 8)) > set(norm.unused)
    with pytest.raises(OptimizerError, match=r"first.weight has a gradient[\s\S]*freeze it"):
        ModularOptimizer(torch.optim.SGD(model.parameters()), norm).step()


def torchvision_models() -> dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]]:
    models = pytest.importorskip("torchvision").models
    return {
        "video": (lambda: models.video.mc3_18(weights=None), (rand(1, 3, 4, 32, 32),)),
        "segmentation": (
            lambda: models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True),
            (rand(2, 3, 64, 64),),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["video", "segmentation"])
def test_torchvision(name: str) -> None:
    make, args = torchvision_models()[name]
    torch.manual_seed(0)
    model = make()
    norm = converted(model, *args)
    assert moved_by(model.eval(), *args) <= {leaf.weight for leaf in norm.leaves}
    targets = [leaf.target for leaf in norm.leaves]
    assert 0 < min(targets) and max(targets) < math.inf and max(targets) / min(targets) < 1e6
    assert not norm.unused

"""Families of transformers and timm as small models with inputs, each captured and converted once a session."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from modnorm_fx.models_zoo import build
from modnorm_fx.models_zoo.coverage import _NoDropout
from torch import Tensor, nn

from modnorm_fx import convert, pipeline
from modnorm_fx._copies import keep_layers, seed
from modnorm_fx._outputs import named_leaves
from modnorm_fx.capture import Captured
from modnorm_fx.inputs import example_inputs
from modnorm_fx.norm import ModularNorm

import timm  # isort: skip
from timm.models import densenet, metaformer, mlp_mixer, volo  # isort: skip


@dataclass
class Family:
    """A model in the mode that it was captured in, its inputs, and what conversion made of it.

    Attributes:
        captured: the graph, which the passes have rewritten since.
        traced: its outputs before they did.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    norm: ModularNorm
    captured: Captured
    traced: tuple[Any, ...]

    def rewritten(self) -> tuple[Any, ...]:
        """The outputs of the graph as the passes left it."""
        with steady():
            return self.captured(self.model, *copy.deepcopy(self.args), **copy.deepcopy(self.kwargs))

    def eager(self) -> list[Tensor]:
        """The same outputs of the model itself, with their graph of gradients."""
        with steady():
            leaves = dict(named_leaves(self.model(*copy.deepcopy(self.args), **copy.deepcopy(self.kwargs))))
        return [leaves[name] for name in self.captured.outputs]


@contextmanager
def steady() -> Iterator[None]:
    """The draws of capture, and no dropout: what training leaves to chance is the same every time."""
    seed()
    with _NoDropout():
        yield


def image(size: int) -> tuple[Tensor]:
    return (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size)),)


def vision(name: str, size: int, **options: Any) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    return lambda: (timm.create_model(name, num_classes=5, **options), image(size))


def made(make: Callable[..., nn.Module], size: int, **options: Any) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    return lambda: (make(num_classes=5, **options), image(size))


VIT: dict[str, Any] = dict(img_size=32, embed_dim=32, depth=1, num_heads=4)
SWIN: dict[str, Any] = dict(img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 4))
FOUR: dict[str, Any] = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
MIXER: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=16, num_blocks=1)
#: timm's models, smaller where their code allows it; every other name is hf:NAME-tiny
TIMM = {
    "beit": vision("beit_base_patch16_224", 32, **VIT),
    "caformer": made(
        metaformer.MetaFormer,
        64,
        token_mixers=[metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
        norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
        depths=(1, 1, 1, 1),
        dims=(8, 16, 32, 32),  # heads of attention have 32 features
    ),
    "cait": vision("cait_xxs24_224", 32, **VIT),
    "coat": vision("coat_lite_tiny", 64, img_size=64, embed_dims=(16, 16, 32, 32), serial_depths=(1, 1, 1, 1)),
    "convit": vision("convit_tiny", 32, img_size=32, embed_dim=8, depth=2, local_up_to_layer=1, num_heads=4),
    "convnext": vision("convnext_atto", 32, **FOUR),
    "convnextv2_timm": vision("convnextv2_atto", 32, **FOUR),
    "deit": vision("deit_tiny_distilled_patch16_224", 32, **VIT),
    "densenet": made(densenet.DenseNet, 32, growth_rate=8, block_config=(1, 2)),
    "edgenext": vision("edgenext_xx_small", 64, **FOUR),
    "efficientformer": vision("efficientformer_l1", 224, depths=(1, 1, 1, 2), embed_dims=(8, 16, 24, 32), num_vit=1),
    "efficientnet": vision("test_efficientnet", 64),
    "eva": vision("eva02_tiny_patch14_224", 28, **VIT | {"img_size": 28}),
    "evonorm": vision("test_efficientnet_evos", 64),
    "gmlp": made(
        mlp_mixer.MlpMixer, 32, **MIXER, block_layer=mlp_mixer.SpatialGatingBlock, mlp_layer=mlp_mixer.GatedMlp,
        mlp_ratio=6,
    ),
    "hiera": vision("hiera_tiny_224", 64, img_size=64, embed_dim=16, stages=(1, 1), num_heads=1, q_pool=1),
    "inception_next": vision("inception_next_atto", 64, **FOUR),
    "levit": vision(
        "levit_128s", 64, img_size=64, embed_dim=(16, 24, 32), key_dim=8, num_heads=(2, 3, 4), depth=(1, 1, 1)
    ),
    "mambaout": vision("test_mambaout", 64),
    "mixer": made(mlp_mixer.MlpMixer, 32, **MIXER),
    "nfnet": vision("test_nfnet", 96),
    "repvit": vision("repvit_m1", 32, embed_dim=(8, 16), depth=(1, 1)),
    "resmlp": made(mlp_mixer.MlpMixer, 32, **MIXER, block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine,
        mlp_ratio=4),
    "samvit": vision(
        "samvit_base_patch16_224", 64, **VIT | {"img_size": 64, "depth": 2}, global_attn_indexes=(1,), window_size=2,
        neck_chans=16,
    ),
    "sequencer": vision(
        "sequencer2d_s", 64, img_size=64, layers=(1, 1, 1, 1), embed_dims=(16, 24, 24, 24), hidden_sizes=(4, 6, 6, 6)
    ),
    "seresnet": vision("seresnet18", 32, channels=(16, 16, 32, 32), stem_width=8),
    "siglip_timm": vision("vit_base_patch16_siglip_224", 32, **VIT),
    "swin": vision("swin_tiny_patch4_window7_224", 32, **SWIN),
    "swinv2": vision("swinv2_tiny_window8_256", 32, **SWIN),
    "visformer": vision("visformer_tiny", 64, img_size=64, init_channels=8, embed_dim=32, depth=(1, 1, 1), num_heads=2),
    "vit": vision("vit_tiny_patch16_224", 32, **VIT, reg_tokens=2, init_values=1e-5, qk_norm=True),
    "vit_relpos": vision("vit_relpos_small_patch16_224", 32, **VIT),
    "volo": made(
        volo.VOLO, 32, img_size=32, layers=(1, 1), embed_dims=(16, 32), num_heads=(2, 4), mlp_ratio=(2.0, 2.0),
        downsamples=(True, False), outlook_attention=(True, False),
    ),
    "xcit": vision("xcit_nano_12_p8_224", 32, **VIT | {"depth": 2}),
}  # fmt: skip
#: smaller inputs than the published size, where the model takes any
SMALL_IMAGES = {"detr": 64}


@cache
def family(name: str) -> Family:
    """The family called `name`, converted. Weights are random, with seed 0."""
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {}
    if name in TIMM:
        model, args = TIMM[name]()
    else:
        model, args = build(f"hf:{name}-tiny"), ()
        if name in SMALL_IMAGES:
            kwargs = {"pixel_values": image(SMALL_IMAGES[name])[0]}
        else:
            args, kwargs = example_inputs(model)
    model.eval()
    keep_layers(model)
    if hasattr(getattr(model, "config", None), "use_cache"):
        kwargs["use_cache"] = False
    kept: list[tuple[Captured, tuple[Any, ...]]] = []

    def capture(*inputs: Any, **options: Any) -> Captured:
        captured = pipeline_capture(*inputs, **options)
        with steady():
            kept.append((captured, captured(model, *copy.deepcopy(args), **copy.deepcopy(kwargs))))
        return captured

    pipeline_capture = pipeline.capture
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(pipeline, "capture", capture)
        warnings.simplefilter("ignore")
        norm = convert(model, args, kwargs)
    captured, traced = kept[0]
    model.train("train" in captured.route)
    return Family(model, args, kwargs, norm, captured, traced)

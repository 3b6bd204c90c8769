"""Models of transformers and timm: atoms written down from their source, and depth."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from functools import lru_cache

import pytest
import torch
from existing_nets import TOKENS, PreNorm
from modnorm_fx.models_zoo import build
from torch import Tensor, nn
from torch.nn import functional as F

import modnorm_fx as mn
from modnorm_fx.norm import ModularNorm


def convert(model: nn.Module, *args: Tensor, **options) -> ModularNorm:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mn.convert(model, args or None, **options)


def atoms(norm: ModularNorm) -> dict[str, str]:
    return {leaf.key: leaf.atom.describe() for leaf in norm.leaves}


def both(name: str, weight: str, bias: str | None = None) -> dict[str, str]:
    return {f"{name}.weight": weight} | ({f"{name}.bias": bias} if bias else {})


def linear(name: str, into: int, out: int, bias: bool = True) -> dict[str, str]:
    return both(name, f"Linear {into}→{out}", f"Bias {out}" if bias else None)


def norm(name: str, width: int, bias: bool = True) -> dict[str, str]:
    return both(name, f"Gain {width}", f"Bias {width}" if bias else None)


def packed(name: str, into: int, sizes: list[int], axis: int = 0) -> dict[str, str]:
    """A fused layer: rows, or columns of a Conv1D."""
    out, start = {}, 0
    for size in sizes:
        part = f"{start}:{start + size}"
        out[f"{name}.weight[{':, ' * axis}{part}]"] = f"Linear {into}→{size}"
        out[f"{name}.bias[{part}]"] = f"Bias {size}"
        start += size
    return out


def gpt2() -> dict[str, str]:
    """modeling_gpt2.py: Conv1D stores [in, out]; the head is tied to wte."""
    out = {"transformer.wte.weight": "Embedding 128×64", "transformer.wpe.weight": "Embedding 128×64"}
    for i in range(2):
        h = f"transformer.h.{i}"
        out |= norm(f"{h}.ln_1", 64) | packed(f"{h}.attn.c_attn", 64, [64, 64, 64], axis=1)
        out |= linear(f"{h}.attn.c_proj", 64, 64) | norm(f"{h}.ln_2", 64)
        out |= linear(f"{h}.mlp.c_fc", 64, 256) | linear(f"{h}.mlp.c_proj", 256, 64)
    return out | norm("transformer.ln_f", 64)


def llama() -> dict[str, str]:
    out = {"model.embed_tokens.weight": "Embedding 128×64"}
    for i in range(2):
        h = f"model.layers.{i}"
        attention = {f"self_attn.{c}_proj": (64, 64) for c in "qkvo"}
        mlp = {"mlp.gate_proj": (64, 128), "mlp.up_proj": (64, 128), "mlp.down_proj": (128, 64)}
        for name, (into, size) in (attention | mlp).items():
            out |= linear(f"{h}.{name}", into, size, bias=False)
        out |= norm(f"{h}.input_layernorm", 64, bias=False) | norm(f"{h}.post_attention_layernorm", 64, bias=False)
    return out | norm("model.norm", 64, bias=False) | linear("lm_head", 64, 128, bias=False)


def bert() -> dict[str, str]:
    e = "bert.embeddings"
    out = {
        f"{e}.word_embeddings.weight": "Embedding 128×64",
        f"{e}.position_embeddings.weight": "Embedding 128×64",
        f"{e}.token_type_embeddings.weight": "Embedding 2×64",
        "cls.predictions.bias": "Bias 128",
    } | norm(f"{e}.LayerNorm", 64)
    for i in range(2):
        h = f"bert.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            out |= linear(f"{h}.attention.self.{name}", 64, 64)
        out |= linear(f"{h}.attention.output.dense", 64, 64) | norm(f"{h}.attention.output.LayerNorm", 64)
        out |= linear(f"{h}.intermediate.dense", 64, 128)
        out |= linear(f"{h}.output.dense", 128, 64) | norm(f"{h}.output.LayerNorm", 64)
    transform = "cls.predictions.transform"
    return out | linear(f"{transform}.dense", 64, 64) | norm(f"{transform}.LayerNorm", 64)


def vit() -> dict[str, str]:
    """timm: patches, a class token, a table of 4 + 1 positions, fused qkv."""
    out = both("patch_embed.proj", "PatchConv 16×16 3→32", "Bias 32")
    out |= {"cls_token": "Table 1×1×32", "pos_embed": "Table 1×5×32"}
    for i in range(2):
        h = f"blocks.{i}"
        out |= norm(f"{h}.norm1", 32) | packed(f"{h}.attn.qkv", 32, [32, 32, 32]) | linear(f"{h}.attn.proj", 32, 32)
        out |= norm(f"{h}.norm2", 32) | linear(f"{h}.mlp.fc1", 32, 128) | linear(f"{h}.mlp.fc2", 128, 32)
    return out | norm("norm", 32) | linear("head", 32, 5)


def resnet18() -> dict[str, str]:
    out = {"conv1.weight": "Conv 7×7 3→64"} | norm("bn1", 64)
    into = 64
    for stage, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            h = f"layer{stage}.{block}"
            out |= {f"{h}.conv1.weight": f"Conv 3×3 {into}→{width}"} | norm(f"{h}.bn1", width)
            out |= {f"{h}.conv2.weight": f"Conv 3×3 {width}→{width}"} | norm(f"{h}.bn2", width)
            if into != width:  # a 1x1 convolution of stride 2 is no patch
                out |= {f"{h}.downsample.0.weight": f"Conv 1×1 {into}→{width}"} | norm(f"{h}.downsample.1", width)
            into = width
    return out | linear("fc", 512, 5)


def convnext() -> dict[str, str]:
    """timm's atto: 1x1 convolutions for the MLP, depthwise 7x7, LayerScale, patches between stages."""
    widths = (8, 16, 24, 32)
    out = both("stem.0", "PatchConv 4×4 3→8", "Bias 8") | norm("stem.1", 8)
    for i, w in enumerate(widths):
        if i:
            out |= norm(f"stages.{i}.downsample.0", widths[i - 1])
            out |= both(f"stages.{i}.downsample.1", f"PatchConv 2×2 {widths[i - 1]}→{w}", f"Bias {w}")
        h = f"stages.{i}.blocks.0"
        out |= both(f"{h}.conv_dw", f"Conv 7×7 {w}→{w} /{w}", f"Bias {w}") | norm(f"{h}.norm", w)
        out |= both(f"{h}.mlp.fc1", f"Conv 1×1 {w}→{4 * w}", f"Bias {4 * w}")
        out |= both(f"{h}.mlp.fc2", f"Conv 1×1 {4 * w}→{w}", f"Bias {w}") | {f"{h}.gamma": f"Gain {w}"}
    return out | norm("head.norm", 32) | linear("head.fc", 32, 5)


def mixer() -> dict[str, str]:
    out = both("stem.proj", "PatchConv 8×8 3→16", "Bias 16")
    for i in range(2):
        h = f"blocks.{i}"
        out |= norm(f"{h}.norm1", 16) | linear(f"{h}.mlp_tokens.fc1", 16, 8) | linear(f"{h}.mlp_tokens.fc2", 8, 16)
        out |= (
            norm(f"{h}.norm2", 16) | linear(f"{h}.mlp_channels.fc1", 16, 64) | linear(f"{h}.mlp_channels.fc2", 64, 16)
        )
    return out | norm("norm", 16) | linear("head", 16, 5)


def timm_model(name: str, **options) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=5, **options)


def mlp_mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=16)


IMAGE = torch.zeros(2, 3, 32, 32)
CASES = {
    "gpt2": (lambda: build("hf:gpt2-tiny"), (), gpt2),
    "llama": (lambda: build("hf:llama-tiny"), (), llama),
    "bert": (lambda: hf_bert(), (TOKENS,), bert),
    "vit": (
        lambda: timm_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=4), (IMAGE,), vit
    ),
    "resnet18": (lambda: timm_model("resnet18"), (IMAGE,), resnet18),
    "convnext": (lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), (IMAGE,), convnext),
    "mixer": (mlp_mixer, (IMAGE,), mixer),
}  # fmt: skip


def hf_bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=2)
    return BertForMaskedLM(BertConfig(vocab_size=128, max_position_embeddings=128, **sizes))


@pytest.mark.parametrize("name", CASES)
def test_atoms_are_those_of_the_source(name: str):
    make, inputs, expected = CASES[name]
    model = make()
    found = convert(model, *inputs)
    assert atoms(found) == expected()
    assert {leaf.status for leaf in found.leaves} == {"rules"} and not found.unused
    sizes: dict[str, int] = defaultdict(int)
    for leaf in found.leaves:
        sizes[leaf.weight] += math.prod(leaf.atom.shape)
    assert sizes == {name: p.numel() for name, p in model.named_parameters()}  # every entry, once


def test_experts_are_experts():
    """Mixtral's grouped products: two layers of gate, up and down, a matrix per expert, and none of them lost."""
    found = convert(build("hf:mixtral-tiny"))
    assert not found.unused
    experts = {leaf.key: leaf.atom for leaf in found.leaves if ".experts." in leaf.key}
    assert len(experts) == 2 * 3 and all("Experts 4×" in atom.describe() for atom in experts.values())
    assert all(leaf.target > 1e-3 for leaf in found.leaves if ".experts." in leaf.key)


# --- depth ------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A convolutional net whose blocks end in a batch norm with a gain that may start at zero."""

    def __init__(self, depth: int, zero_init: bool = False, width: int = 8):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
            )
            for _ in range(depth)
        )  # fmt: skip
        if zero_init:
            for block in self.blocks:
                nn.init.zeros_(block[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def hf_gpt2(depth: int) -> nn.Module:
    return build("hf:gpt2", device="meta", layers=depth, width=64, heads=4, vocab=128, context=32)


NETS = {
    "pre-norm": (PreNorm, (TOKENS,), "blocks."),
    "LayerScale at 1e-5": (lambda d: PreNorm(d, layer_scale=1e-5), (TOKENS,), "blocks."),
    "residual convolutions": (Residual, (IMAGE,), "blocks."),
    "last gains at zero": (lambda d: Residual(d, zero_init=True), (IMAGE,), "blocks."),
    "gpt2": (hf_gpt2, (), "transformer.h."),
}


def per_block(found: ModularNorm, prefix: str) -> list[float]:
    """The smallest target of a matrix in each block."""
    out: dict[int, list[float]] = defaultdict(list)
    for leaf in found.leaves:
        if leaf.weight.startswith(prefix) and leaf.atom.is_matrix:
            out[int(leaf.weight.removeprefix(prefix).split(".")[0])].append(leaf.target)
    return [min(out[i]) for i in sorted(out)]


@lru_cache
def converted(name: str, depth: int) -> ModularNorm:
    make, inputs, _ = NETS[name]
    return convert(make(depth), *inputs)


#: deep ones take seconds to trace; what differs only in values is compared below
DEPTHS = [(name, 4) for name in NETS] + [("pre-norm", 48), ("residual convolutions", 48), ("gpt2", 12)]


@pytest.mark.parametrize("name, depth", DEPTHS)
def test_no_block_is_frozen_at_any_depth(name: str, depth: int):
    found, prefix = converted(name, depth), NETS[name][2]
    assert all(0 < leaf.target < math.inf for leaf in found.leaves)
    targets = per_block(found, prefix)
    assert len(targets) == depth
    assert min(targets) / max(targets) > 1 / (20 * depth)
    assert max(targets) < 20  # nor set loose


@pytest.mark.parametrize("a, b", [("pre-norm", "LayerScale at 1e-5"), ("residual convolutions", "last gains at zero")])
def test_values_at_the_start_change_nothing(a: str, b: str):
    assert converted(a, 4).targets == converted(b, 4).targets


def test_the_trunk_telescopes():
    """Gains of equal matrices fall as one over the scale of the stream, not as a power of depth: theory, section 3."""
    found = converted("pre-norm", 48)
    gains = [leaf.sensitivity * leaf.scale for leaf in found.leaves if leaf.weight.endswith("proj.weight")]
    assert len(gains) == 48
    # two branches a block, 96 that are as large as four of scale 1, on an embedding of scale 1
    expected = [(1 + 4 / 96 * (1 + 2 * i)) ** -0.5 for i in range(48)]
    ratios = [g / e for g, e in zip(gains, expected, strict=True)]
    assert max(ratios) / min(ratios) < 1.2

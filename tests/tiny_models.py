"""Tiny models: classes of transformers and timm with a few thousand weights, and small nets with one oddity each."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from modnorm_fx import capture as capture_module  # first: it makes timm importable beside a CPU torch
from modnorm_fx._outputs import named_leaves
from modnorm_fx.capture import Captured

import timm  # isort: skip
import transformers  # isort: skip
from torch import nn  # isort: skip

TEXT = dict(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
VISION = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
)
TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def gpt2(layers: int = 1) -> nn.Module:
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=layers, n_head=4, n_positions=64, **TOKENS)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2))


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**TEXT))


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, **TOKENS)
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))


def clip() -> nn.Module:
    text = dict(TEXT, max_position_embeddings=32, **TOKENS)
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config=dict(TEXT, model_type="llama"),
        vision_config=dict(VISION, model_type="clip_vision_model", num_hidden_layers=2),
        image_token_index=98,
    )
    return transformers.LlavaForConditionalGeneration(config)


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=99,
        d_model=32,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        decoder_start_token_id=1,
        **TOKENS,
    )
    return transformers.WhisperForConditionalGeneration(config)


def timm_resnet() -> nn.Module:
    return timm.create_model("resnet18", channels=(8, 8, 16, 16), stem_width=8, num_classes=10)


def timm_vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_classes=10)


def timm_convnext() -> nn.Module:
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=10)


def timm_mixer() -> nn.Module:
    return timm.models.mlp_mixer.MlpMixer(img_size=32, patch_size=8, embed_dim=48, num_blocks=1, num_classes=10)


# --- small nets with one oddity each ----------------------------------------------------------------------------------

IDS = torch.arange(24).view(2, 12)
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


class Plain(nn.Module):
    """Residual blocks with a norm; nothing special."""

    def __init__(self, width: int = 4, blocks: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.nn.functional.gelu(block(self.norm(x)))
        return x


class Tied(nn.Module):
    """An embedding whose table is also the head, and a linear used under two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embed(ids))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class InPlace(nn.Module):
    """Writes through a view, into a buffer and into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        y = self.linear(x).relu_()
        y[:, :2] += y[:, 2:]
        self.calls += 1
        return y * self.calls


class Branching(nn.Module):
    """Depends on values, as export cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.isfinite().all() else x


class Caching(nn.Module):
    """Keeps what it computed of a parameter in evaluation, as many vision models do."""

    def __init__(self, empties: bool):
        super().__init__()
        self.table, self.linear, self.cache = nn.Parameter(torch.randn(4)), nn.Linear(4, 4), None
        self.empties = empties

    def train(self, mode: bool = True) -> Caching:
        self.cache = None if mode and self.empties else self.cache
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.cache is None:
            self.cache = self.table * 2
        return self.linear(x) + (self.table * 2 if self.training else self.cache)


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale, self.listed = nn.Linear(4, 4), torch.full((4,), 3.0), [torch.arange(4.0)]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale + self.listed[0]


class Wrapped(nn.Module):
    """Runs parts under settings that export keeps in sub-graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        with torch.autocast("cpu", enabled=False):
            x = torch.utils.checkpoint.checkpoint(self.linear, x, use_reentrant=False)
        with torch.enable_grad():
            x = self.linear(x)
        return {"features": [x, None, 3], "best": x.argmax(-1)}


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "gpt2": (gpt2, (), {"input_ids": IDS}),
    "llama": (llama, (IDS,), {}),
    "bert": (bert, (), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS).tril()}),
    "t5": (t5, (), {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}),
    "vit": (vit, (), {"pixel_values": IMAGE}),
    "timm_resnet": (timm_resnet, (IMAGE,), {}),
    "timm_vit": (timm_vit, (IMAGE,), {}),
    "timm_convnext": (timm_convnext, (IMAGE,), {}),
    "timm_mixer": (timm_mixer, (IMAGE,), {}),
    "plain": (Plain, (X,), {}),
    "tied": (Tied, (), {"ids": IDS % 11}),
    "attention": (Attention, (torch.randn(2, 5, 8),), {}),
    "in_place": (InPlace, (X,), {}),
    "constants": (Constants, (X,), {}),
    "wrapped": (Wrapped, (X,), {}),
    "branching": (Branching, (X,), {}),
}


# --- checks -----------------------------------------------------------------------------------------------------------


def eager(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the model returns in evaluation, on copies of everything: the leaves, by name."""
    args, kwargs = copy.deepcopy((args, kwargs))
    model = copy.deepcopy(model).eval()
    if hasattr(getattr(model, "config", None), "use_cache"):
        kwargs["use_cache"] = False
    with torch.no_grad():
        value = model(*args, **kwargs)
    leaves = named_leaves(value)
    assert [id(leaf) for _, leaf in leaves] == [id(leaf) for leaf in pytree.tree_leaves(value)]
    return dict(leaves)


def assert_same_outputs(captured: Captured, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    expected, got = eager(model, args, kwargs), captured(model, *args, **kwargs)
    assert captured.outputs
    for name, value in zip(captured.outputs, got, strict=True):
        torch.testing.assert_close(value, expected[name])


@contextlib.contextmanager
def only_route(name: str) -> Iterator[None]:
    """Capture by this route or not at all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture_module, "ROUTES", {name: capture_module.ROUTES[name]})
        yield

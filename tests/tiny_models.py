"""Tiny models of transformers and timm: the real classes, a few thousand weights, random values."""

from __future__ import annotations

import modnorm_fx  # noqa: F401  # first: it makes timm importable beside a CPU torch

import timm  # isort: skip
import transformers  # isort: skip
from torch import nn  # isort: skip

TEXT = dict(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
VISION = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
)
TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def gpt2(layers: int = 2) -> nn.Module:
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

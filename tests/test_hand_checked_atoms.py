"""What single weights of many families are, read off the models' source by hand: never off our own output.

Each row names a leaf (a parameter, with its slice where a projection is packed) and the atom that its use makes it,
with sizes that follow from the layer in the source: inputs → outputs, kernel, groups. The notes say what to look for
there.
"""

from __future__ import annotations

import warnings

import pytest
from modnorm_fx.models_zoo import build

from modnorm_fx import convert

SWIN = "swin.encoder.layers.0.blocks.0.attention."
TABLE: dict[str, dict[str, str]] = {
    # Conv1D stores [in, out]; q, k, v are thirds of its output
    "hf:gpt2-tiny": {
        "transformer.wpe.weight": "Embedding 128×64",
        "transformer.h.0.ln_1.weight": "Gain 64",
        "transformer.h.0.attn.c_attn.weight[:, 0:64]": "Linear 64→64",
        "transformer.h.0.attn.c_attn.weight[:, 128:192]": "Linear 64→64",
        "transformer.h.0.attn.c_attn.bias[64:128]": "Bias 64",
        "transformer.h.0.mlp.c_fc.weight": "Linear 64→256",
        "transformer.h.0.mlp.c_proj.weight": "Linear 256→64",
    },
    # q, k, v interleaved per head: 4 heads of [q 16, k 16, v 16]
    "hf:bloom-tiny": {
        "transformer.word_embeddings_layernorm.weight": "Gain 64",
        "transformer.h.0.self_attention.query_key_value.weight.unflatten(0, (-1, 48))[:, 16:32]": "Linear 64→64",
        "transformer.h.0.self_attention.query_key_value.bias.unflatten(0, (-1, 48))[:, 0:16]": "Bias 64",
    },
    "hf:gpt_neox-tiny": {
        "gpt_neox.embed_in.weight": "Embedding 128×64",
        "gpt_neox.layers.0.attention.query_key_value.weight.unflatten(0, (-1, 48))[:, 32:48]": "Linear 64→64",
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": "Linear 64→128",
    },
    # multi-query: four heads of q, then one of k and one of v, taken as [..., [-2], :] and [..., [-1], :]
    "hf:falcon-tiny": {
        "transformer.h.0.self_attention.query_key_value.weight[0:64]": "Linear 64→64",
        "transformer.h.0.self_attention.query_key_value.weight[64:80]": "Linear 64→16",
        "transformer.h.0.self_attention.query_key_value.weight[80:96]": "Linear 64→16",
    },
    "hf:phi3-tiny": {
        "model.layers.0.self_attn.qkv_proj.weight[0:64]": "Linear 64→64",
        "model.layers.0.mlp.gate_up_proj.weight[0:128]": "Linear 64→128",
        "model.layers.0.mlp.gate_up_proj.weight[128:256]": "Linear 64→128",
        "model.layers.0.mlp.down_proj.weight": "Linear 128→64",
    },
    # an embedding whose rows are added to the attention logits
    "hf:t5-tiny": {
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "LogitBias 8×4",
        "encoder.block.0.layer.0.layer_norm.weight": "Gain 64",
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": "Linear 64→128",
    },
    # RMSNorm multiplies by 1 + w
    "hf:gemma2-tiny": {"model.layers.0.input_layernorm.weight": "Gain 64"},
    "hf:llama-tiny": {
        "model.embed_tokens.weight": "Embedding 128×64",
        "model.layers.0.mlp.up_proj.weight": "Linear 64→128",
        "model.norm.weight": "Gain 64",
        "lm_head.weight": "Linear 64→128",
    },
    # in_proj gives x and the gate; x_proj gives dt (rank 4), B and C (state 16); -exp(A_log), softplus(dt + bias)
    "hf:mamba-tiny": {
        "backbone.layers.0.mixer.in_proj.weight[0:128]": "Linear 64→128",
        "backbone.layers.0.mixer.conv1d.weight": "Conv 4 128→128 /128",
        "backbone.layers.0.mixer.x_proj.weight[0:4]": "Linear 128→4",
        "backbone.layers.0.mixer.x_proj.weight[4:20]": "Linear 128→16",
        "backbone.layers.0.mixer.dt_proj.weight": "Linear 4→128",
        "backbone.layers.0.mixer.dt_proj.bias": "Scalar 128",
        "backbone.layers.0.mixer.A_log": "Scalar 128×16",
        "backbone.layers.0.mixer.D": "Gain 128",
    },
    # weight normalisation over all but the last axis: g has one entry a tap
    "hf:wav2vec2-tiny": {
        "wav2vec2.feature_extractor.conv_layers.0.conv.weight": "Conv 10 1→64",
        "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0": "Gain 1×1×16",
        "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1": "Conv 16 64→64 /2",
        "wav2vec2.encoder.pos_conv_embed.conv.bias": "Bias 64",
    },
    # learned queries are added to the decoder's states
    "hf:detr-tiny": {
        "model.query_position_embeddings.weight": "Table 10×64",
        "model.input_projection.weight": "Conv 1×1 96→64",
        "class_labels_classifier.weight": "Linear 64→3",
    },
    "hf:clip-tiny": {
        "logit_scale": "Scalar scalar",
        "vision_model.embeddings.class_embedding": "Table 64",
        "vision_model.embeddings.patch_embedding.weight": "PatchConv 32×32 3→64",
        "vision_model.embeddings.position_embedding.weight": "Embedding 50×64",
        "text_projection.weight": "Linear 64→64",
    },
    # experts [E, out, in], gate and up in halves of out
    "hf:mixtral-tiny": {
        "model.layers.0.mlp.gate.weight": "Linear 64→4",
        "model.layers.0.mlp.experts.gate_up_proj[:, 0:128]": "Experts 4× 64→128",
        "model.layers.0.mlp.experts.down_proj": "Experts 4× 128→64",
    },
    # experts [E, in, out], gate and up alternate; one more logit per head in the softmax
    "hf:gpt_oss-tiny": {
        "model.layers.0.self_attn.sinks": "LogitBias 4",
        "model.layers.0.mlp.router.weight": "Linear 64→4",
        "model.layers.0.mlp.experts.gate_up_proj.unflatten(2, (-1, 2))[:, :, :, 0:1]": "Experts 4× 64→128",
        "model.layers.0.mlp.experts.down_proj": "Experts 4× 128→64",
    },
    "hf:swin-tiny": {
        "swin.embeddings.patch_embeddings.projection.weight": "PatchConv 4×4 3→16",
        SWIN + "relative_position_bias.relative_position_bias_table": "LogitBias 169×1",
    },
    # gamma·(x·nx) + beta + x
    "hf:convnextv2-tiny": {
        "convnextv2.encoder.stages.0.layers.0.dwconv.weight": "Conv 7×7 16→16 /16",
        "convnextv2.encoder.stages.0.layers.0.grn.weight": "Gain 1×1×1×64",
        "convnextv2.encoder.stages.0.layers.0.grn.bias": "Bias 1×1×1×64",
        "convnextv2.encoder.stages.0.layers.0.pwconv1.weight": "Linear 16→64",
    },
    "hf:modernbert-tiny": {
        "model.layers.0.attn.Wqkv.weight[64:128]": "Linear 64→64",
        "model.layers.0.mlp.Wi.weight[0:128]": "Linear 64→128",
    },
    # einsum "ibh,hnd->ibnd"; biases are added to q before it meets k
    "hf:xlnet-tiny": {
        "transformer.layer.0.rel_attn.q": "Linear 64→64",
        "transformer.layer.0.rel_attn.r_w_bias": "Bias 4×16",
    },
    "hf:vit-tiny": {
        "vit.embeddings.cls_token": "Table 1×1×64",
        "vit.embeddings.position_embeddings": "Table 1×197×64",
    },
    # one layer, used several times
    "hf:albert-tiny": {
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": "Linear 64→128",
        "albert.embeddings.token_type_embeddings.weight": "Embedding 2×64",
    },
    "hf:perceiver-tiny": {"perceiver.embeddings.latents": "Table 8×64"},
    # four gates of 48 units, inputs of 192 channels
    "timm:sequencer2d_s": {
        "stages.0.blocks.0.rnn_tokens.rnn_v.weight_ih_l0": "Gates 4× 192→48",
        "stages.0.blocks.0.rnn_tokens.rnn_v.weight_hh_l0_reverse": "Gates 4× 48→48",
        "stages.0.blocks.0.rnn_tokens.rnn_h.bias_ih_l0": "Bias 4× 48",
    },
    # standardised weights, times a gain per output channel
    "timm:nfnet_l0": {
        "stem.conv1.weight": "Conv 3×3 3→16",
        "stem.conv1.gain": "Gain 16×1×1×1",
        "stages.0.0.conv2.weight": "Conv 3×3 64→64",
        "stages.0.0.attn_last.fc1.weight": "Conv 1×1 256→64",
    },
    "timm:resnetv2_50x1_bit": {"stem.conv.weight": "Conv 7×7 3→64"},
    "timm:resnet18": {
        "conv1.weight": "Conv 7×7 3→64",
        "layer1.0.bn1.weight": "Gain 64",
        "layer1.0.bn1.bias": "Bias 64",
        "fc.weight": "Linear 512→1000",
    },
    "timm:convnext_atto": {
        "stem.0.weight": "PatchConv 4×4 3→40",
        "stages.0.blocks.0.conv_dw.weight": "Conv 7×7 40→40 /40",
        "stages.0.blocks.0.gamma": "Gain 40",
    },
    # logit_scale: clamp, then exp; a small net of the coordinates gives the bias of the logits
    "timm:swinv2_tiny_window8_256": {
        "layers.0.blocks.0.attn.logit_scale": "Scalar 3×1×1",
        "layers.0.blocks.0.attn.q_bias": "Bias 96",
        "layers.0.blocks.0.attn.cpb_mlp.0.weight": "Linear 2→512",
        "layers.0.blocks.0.attn.cpb_mlp.2.weight": "Linear 512→3",
        "layers.0.blocks.0.attn.qkv.weight[0:96]": "Linear 96→96",
    },
    "timm:levit_128s": {
        "stages.0.blocks.0.attn.attention_biases": "LogitBias 4×196",
        "stages.0.blocks.0.attn.proj.ln.bn.weight": "Gain 128",
        "stages.0.blocks.0.mlp.ln1.linear.weight": "Linear 128→256",
    },
    # layers over tokens: 7 × 7 patches
    "timm:mixer_s32_224": {
        "stem.proj.weight": "PatchConv 32×32 3→512",
        "blocks.0.mlp_tokens.fc1.weight": "Linear 49→256",
    },
    # torch.addcmul(beta, alpha, x)
    "timm:resmlp_12_224": {
        "blocks.0.norm1.alpha": "Gain 1×1×384",
        "blocks.0.norm1.beta": "Bias 1×1×384",
        "blocks.0.ls1": "Gain 384",
        "blocks.0.linear_tokens.weight": "Linear 196→196",
    },
    "timm:mobilenetv3_small_050": {
        "conv_stem.weight": "Conv 3×3 3→16",
        "blocks.0.0.conv_dw.weight": "Conv 3×3 16→16 /16",
        "blocks.0.0.se.conv_reduce.weight": "Conv 1×1 16→8",
    },
    # the bias of the fused projection is made of a parameter for q, zeros for k, a parameter for v; SwiGLU packed
    "timm:eva02_tiny_patch14_224": {
        "blocks.0.attn.q_bias": "Bias 192",
        "blocks.0.attn.qkv.weight[0:192]": "Linear 192→192",
        "blocks.0.mlp.fc1.weight[0:512]": "Linear 192→512",
    },
    "timm:regnety_002": {"s1.b1.conv2.conv.weight": "Conv 3×3 24→24 /3"},
    "timm:vit_tiny_patch16_224": {
        "cls_token": "Table 1×1×192",
        "pos_embed": "Table 1×197×192",
        "blocks.0.attn.qkv.weight[192:384]": "Linear 192→192",
        "blocks.0.attn.qkv.bias[192:384]": "Bias 192",
    },
    # one convolution gives the query, the context, and a gate for each of 2 levels and for the whole, used one by one
    "timm:focalnet_tiny_srf": {
        "layers.0.blocks.0.modulation.f.weight[0:96]": "Conv 1×1 96→96",
        "layers.0.blocks.0.modulation.f.weight[194:195]": "Conv 1×1 96→1",
        "layers.0.blocks.0.modulation.focal_layers.1.0.weight": "Conv 5×5 96→96 /96",
    },
    "timm:inception_v3": {"Mixed_6b.branch7x7_2.conv.weight": "Conv 1×7 128→128"},
    "timm:ghostnet_100": {"blocks.0.0.ghost1.cheap_operation.0.weight": "Conv 3×3 8→8 /8"},
    # a sigmoid of it mixes two attentions
    "timm:convit_tiny": {
        "blocks.0.attn.gating_param": "Scalar 4",
        "blocks.0.attn.pos_proj.weight": "Linear 3→4",
        "blocks.0.attn.qk.weight[0:192]": "Linear 192→192",
    },
    # keys and values of patches: stride = kernel
    "timm:twins_pcpvt_small": {
        "blocks.0.0.attn.sr.weight": "PatchConv 8×8 64→64",
        "blocks.0.0.attn.kv.weight[64:128]": "Linear 64→64",
    },
}


@pytest.mark.parametrize("spec", TABLE)
def test_atoms_are_what_the_source_says(spec: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {leaf.key: leaf.atom.describe() for leaf in convert(build(spec, device="meta")).leaves}
    assert {key: found.get(key, "no such leaf") for key in TABLE[spec]} == TABLE[spec]


def test_the_table_is_as_long_as_it_should_be() -> None:
    assert sum(map(len, TABLE.values())) >= 60
    assert len(TABLE) >= 30

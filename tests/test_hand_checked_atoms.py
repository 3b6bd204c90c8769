"""What single weights of many families are, read off the models' source by hand: never off our own output.

Each row names a leaf (a parameter, with its slice where a projection is packed) and the atom that its use makes it,
with sizes that follow from the layer in the source: inputs → outputs, kernel, groups. The notes say what to look for
there. `Factor` stands for atoms of the same norm, the largest entry, that differ in nothing but how they start.
"""

from __future__ import annotations

import pytest
import torch
from families import family

HEADS = ".unflatten(0, (-1, 48))"  # 4 heads of [q 16, k 16, v 16]
TABLE: dict[str, dict[str, str]] = {
    # --- transformers: text -------------------------------------------------------------------------------------------
    # Conv1D stores [in, out]; q, k, v are thirds of its output; wte is also the head, and follows its lookups
    "gpt2": {
        "transformer.wte.weight": "Embedding 128×64",
        "transformer.wpe.weight": "Embedding 128×64",
        "transformer.h.0.ln_1.weight": "Gain 64",
        "transformer.h.0.attn.c_attn.weight[:, 0:64]": "Linear 64→64",
        "transformer.h.0.attn.c_attn.weight[:, 128:192]": "Linear 64→64",
        "transformer.h.0.attn.c_attn.bias[64:128]": "Bias 64",
        "transformer.h.0.mlp.c_fc.weight": "Linear 64→256",
        "transformer.h.0.mlp.c_proj.weight": "Linear 256→64",
    },
    # fused_qkv.view(b, s, heads, 3, head_dim)
    "bloom": {
        "transformer.word_embeddings_layernorm.weight": "Gain 64",
        f"transformer.h.0.self_attention.query_key_value.weight{HEADS}[:, 16:32]": "Linear 64→64",
        f"transformer.h.0.self_attention.query_key_value.bias{HEADS}[:, 0:16]": "Bias 64",
    },
    # view(b, s, heads, 3 · head_dim), then chunk(3)
    "gpt_neox": {
        "gpt_neox.embed_in.weight": "Embedding 128×64",
        f"gpt_neox.layers.0.attention.query_key_value.weight{HEADS}[:, 32:48]": "Linear 64→64",
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": "Linear 64→128",
    },
    # as bloom, and a norm over the entries of each head
    "persimmon": {
        f"model.layers.0.self_attn.query_key_value.weight{HEADS}[:, 0:16]": "Linear 64→64",
        "model.layers.0.self_attn.q_layernorm.weight": "Gain 16",
    },
    # four groups of [q, v, k], 16 rows each
    "codegen": {
        f"transformer.h.0.attn.qkv_proj.weight{HEADS}[:, 16:32]": "Linear 64→64",
        f"transformer.h.0.attn.qkv_proj.weight{HEADS}[:, 32:48]": "Linear 64→64",
        "lm_head.weight": "Linear 64→128",
    },
    # transpose_for_scores, then chunk(3): a third of each head; the biases are added apart
    "deberta": {
        f"deberta.encoder.layer.0.attention.self.in_proj.weight{HEADS}[:, 16:32]": "Linear 64→64",
        "deberta.encoder.layer.0.attention.self.q_bias": "Bias 64",
    },
    # multi-query: four heads of q, then one of k and one of v, taken as [..., [-2], :] and [..., [-1], :]
    "falcon": {
        "transformer.h.0.self_attention.query_key_value.weight[0:64]": "Linear 64→64",
        "transformer.h.0.self_attention.query_key_value.weight[64:80]": "Linear 64→16",
        "transformer.h.0.self_attention.query_key_value.weight[80:96]": "Linear 64→16",
    },
    # multi-query by split
    "gpt_bigcode": {
        "transformer.wpe.weight": "Embedding 128×64",
        "transformer.h.0.attn.c_attn.weight[0:64]": "Linear 64→64",
        "transformer.h.0.attn.c_attn.weight[80:96]": "Linear 64→16",
        "transformer.h.0.attn.c_attn.bias[64:80]": "Bias 16",
    },
    "phi3": {
        "model.layers.0.self_attn.qkv_proj.weight[0:64]": "Linear 64→64",
        "model.layers.0.mlp.gate_up_proj.weight[0:128]": "Linear 64→128",
        "model.layers.0.mlp.gate_up_proj.weight[128:256]": "Linear 64→128",
        "model.layers.0.mlp.down_proj.weight": "Linear 128→64",
    },
    "modernbert": {
        "model.layers.0.attn.Wqkv.weight[64:128]": "Linear 64→64",
        "model.layers.0.mlp.Wi.weight[0:128]": "Linear 64→128",
    },
    "mpt": {"transformer.blocks.0.attn.Wqkv.weight[128:192]": "Linear 64→64", "transformer.norm_f.weight": "Gain 64"},
    "llama": {
        "model.embed_tokens.weight": "Embedding 128×64",
        "model.layers.0.mlp.up_proj.weight": "Linear 64→128",
        "model.norm.weight": "Gain 64",
        "lm_head.weight": "Linear 64→128",
    },
    # RMSNorm multiplies by 1 + w
    "gemma2": {
        "model.layers.0.input_layernorm.weight": "Gain 64",
        "model.layers.0.self_attn.k_proj.weight": "Linear 64→32",
    },
    # layer_norm(x, shape, weight + 1, bias)
    "nemotron": {
        "model.layers.0.input_layernorm.weight": "Gain 64",
        "model.layers.0.input_layernorm.bias": "Bias 64",
    },
    "olmo2": {"model.layers.0.self_attn.q_norm.weight": "Gain 64"},
    # xIELU: softplus of two numbers
    "apertus": {"model.layers.0.mlp.act_fn.alpha_p": "Scalar 1", "model.layers.0.self_attn.q_norm.weight": "Gain 16"},
    # gains on the residual; a bias of the logits made of the values
    "doge": {
        "model.layers.0.input_residual": "Gain 64",
        "model.layers.0.self_attn.dt_proj.weight": "Linear 64→4",
    },
    "lfm2": {"model.layers.0.feed_forward.w2.weight": "Linear 256→64"},
    # the compressed keys and values beside the rotary key; each head's keys beside its values
    "deepseek_v3": {
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight[0:16]": "Linear 64→16",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight[16:24]": "Linear 64→8",
        "model.layers.0.self_attn.kv_b_proj.weight.unflatten(0, (-1, 32))[:, 0:16]": "Linear 16→64",
        "model.layers.1.mlp.experts.down_proj": "Experts 4× 128→64",
    },
    # experts [E, out, in], gate and up in halves of out
    "mixtral": {
        "model.layers.0.mlp.gate.weight": "Linear 64→4",
        "model.layers.0.mlp.experts.gate_up_proj[:, 0:128]": "Experts 4× 64→128",
        "model.layers.0.mlp.experts.down_proj": "Experts 4× 128→64",
    },
    "qwen2_moe": {
        "model.layers.0.mlp.shared_expert_gate.weight": "Linear 64→1",
        "model.layers.0.mlp.experts.gate_up_proj[:, 128:256]": "Experts 4× 64→128",
        "model.layers.0.self_attn.q_proj.bias": "Bias 64",
    },
    # experts [E, in, out], gate and up alternate; one more logit per head in the softmax
    "gpt_oss": {
        "model.layers.0.self_attn.sinks": "LogitBias 4",
        "model.layers.0.mlp.router.weight": "Linear 64→4",
        "model.layers.0.mlp.experts.gate_up_proj.unflatten(2, (-1, 2))[:, :, :, 0:1]": "Experts 4× 64→128",
        "model.layers.0.mlp.experts.down_proj": "Experts 4× 128→64",
    },
    # bmm with experts [E, in, out]
    "llama4_text": {
        "model.layers.0.feed_forward.experts.gate_up_proj[:, :, 0:128]": "Experts 4× 64→128",
        "model.layers.0.feed_forward.experts.down_proj": "Experts 4× 128→64",
        "model.layers.0.feed_forward.shared_expert.down_proj.weight": "Linear 128→64",
    },
    # in_proj gives x and the gate; x_proj gives dt (rank 4), B and C (state 16); -exp(A_log), softplus(dt + bias)
    "mamba": {
        "backbone.layers.0.mixer.in_proj.weight[0:128]": "Linear 64→128",
        "backbone.layers.0.mixer.conv1d.weight": "Conv 4 128→128 /128",
        "backbone.layers.0.mixer.x_proj.weight[0:4]": "Linear 128→4",
        "backbone.layers.0.mixer.x_proj.weight[4:20]": "Linear 128→16",
        "backbone.layers.0.mixer.dt_proj.weight": "Linear 4→128",
        "backbone.layers.0.mixer.dt_proj.bias": "Scalar 128",
        "backbone.layers.0.mixer.A_log": "Scalar 128×16",
        "backbone.layers.0.mixer.D": "Factor 128",
    },
    # in_proj: the gate, then what the convolution reads, then a step a head
    "mamba2": {
        "backbone.layers.0.mixer.in_proj.weight[0:128]": "Linear 64→128",
        "backbone.layers.0.mixer.in_proj.weight[288:296]": "Linear 64→8",
        "backbone.layers.0.mixer.dt_bias": "Scalar 8",
        "backbone.layers.0.mixer.A_log": "Scalar 8",
        "backbone.layers.0.mixer.norm.weight": "Gain 128",
    },
    # -exp(time_decay); x·mix + shifted·(1 - mix)
    "rwkv": {
        "rwkv.blocks.0.attention.time_decay": "Scalar 64",
        "rwkv.blocks.0.attention.time_mix_key": "Factor 1×1×64",
        "rwkv.blocks.0.feed_forward.value.weight": "Linear 256→64",
    },
    # einsum "ibh,hnd->ibnd" and "ibnd,hnd->ibh"; biases are added to q before it meets k
    "xlnet": {
        "transformer.layer.0.rel_attn.q": "Linear 64→64",
        "transformer.layer.0.rel_attn.o": "Linear 64→64",
        "transformer.layer.0.rel_attn.r_w_bias": "Bias 4×16",
    },
    # an embedding whose rows are added to the attention logits
    "t5": {
        "shared.weight": "Embedding 128×64",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "LogitBias 8×4",
        "encoder.block.0.layer.0.layer_norm.weight": "Gain 64",
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": "Linear 64→128",
    },
    "mpnet": {"mpnet.encoder.relative_attention_bias.weight": "LogitBias 32×4"},
    # positions start at the third row
    "bart": {
        "model.shared.weight": "Embedding 128×64",
        "model.decoder.embed_positions.weight": "Embedding 130×64",
        "model.decoder.layers.0.encoder_attn.k_proj.weight": "Linear 64→64",
    },
    # one layer, used several times
    "albert": {
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": "Linear 64→128",
        "albert.embeddings.token_type_embeddings.weight": "Embedding 2×64",
    },
    # every linear layer is a convolution of one tap, in 4 groups but for one
    "squeezebert": {
        "transformer.encoder.layers.0.attention.query.weight": "Conv 1 64→64 /4",
        "transformer.encoder.layers.0.intermediate.conv1d.weight": "Conv 1 64→128 /4",
        "transformer.encoder.layers.0.post_attention.conv1d.weight": "Conv 1 64→64",
    },
    "convbert": {
        "convbert.encoder.layer.0.attention.self.key_conv_attn_layer.depthwise.weight": "Conv 9 64→64 /64",
        "convbert.encoder.layer.0.attention.self.key_conv_attn_layer.pointwise.weight": "Conv 1 64→32",
        "convbert.encoder.layer.0.attention.self.conv_kernel_layer.weight": "Linear 32→18",
    },
    # over tokens, heads are channels
    "nystromformer": {"nystromformer.encoder.layer.0.attention.self.conv.weight": "Conv 65×1 4→4 /4"},
    "layoutlm": {"layoutlm.embeddings.x_position_embeddings.weight": "Embedding 128×64"},
    # queries are parameters: what the input is read by, and what the output is asked by
    "perceiver": {
        "perceiver.embeddings.latents": "Table 8×64",
        "perceiver.decoder.output_position_encodings.position_embeddings": "Table 128×64",
        "perceiver.decoder.decoding_cross_attention.attention.self.query.weight": "Linear 64→256",
        "perceiver.input_preprocessor.embeddings.weight": "Embedding 128×64",
    },
    # --- transformers: sound and images -------------------------------------------------------------------------------
    # weight normalisation over all but the last axis: g has one entry a tap
    "wav2vec2": {
        "wav2vec2.feature_extractor.conv_layers.0.conv.weight": "Conv 10 1→64",
        "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0": "Gain 1×1×16",
        "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1": "Conv 16 64→64 /2",
        "wav2vec2.encoder.pos_conv_embed.conv.bias": "Bias 64",
    },
    # patches of 16 that overlap
    "audio-spectrogram-transformer": {
        "audio_spectrogram_transformer.embeddings.patch_embeddings.projection.weight": "Conv 16×16 1→64",
        "audio_spectrogram_transformer.embeddings.distillation_token": "Table 1×1×64",
    },
    "whisper": {"model.encoder.conv1.weight": "Conv 3 80→64", "model.encoder.layers.0.fc1.weight": "Linear 64→128"},
    "clip": {
        "logit_scale": "Scalar scalar",
        "vision_model.embeddings.class_embedding": "Table 64",
        "vision_model.embeddings.patch_embedding.weight": "PatchConv 32×32 3→64",
        "vision_model.embeddings.position_embedding.weight": "Embedding 50×64",
        "text_projection.weight": "Linear 64→64",
    },
    # the images are read by a learned query, through nn.MultiheadAttention
    "siglip": {
        "vision_model.head.probe": "Table 1×1×64",
        "vision_model.head.attention.in_proj_weight[64:128]": "Linear 64→64",
        "logit_scale": "Scalar 1",
    },
    # learned queries are added to the decoder's states
    "detr": {
        "model.query_position_embeddings.weight": "Table 10×64",
        "model.input_projection.weight": "Conv 1×1 96→64",
        "class_labels_classifier.weight": "Linear 64→3",
    },
    # gamma·(x·nx) + beta + x
    "convnextv2": {
        "convnextv2.encoder.stages.0.layers.0.dwconv.weight": "Conv 7×7 16→16 /16",
        "convnextv2.encoder.stages.0.layers.0.grn.weight": "Gain 1×1×1×64",
        "convnextv2.encoder.stages.0.layers.0.grn.bias": "Bias 1×1×1×64",
        "convnextv2.encoder.stages.0.layers.0.pwconv1.weight": "Linear 16→64",
    },
    # keys and values of patches: stride = kernel
    "pvt": {
        "pvt.encoder.block.0.0.attention.self.sequence_reduction.weight": "PatchConv 8×8 16→16",
        "pvt.encoder.patch_embeddings.0.position_embeddings": "Table 1×3136×16",
        "pvt.encoder.patch_embeddings.3.cls_token": "Table 1×1×64",
    },
    "dinov2": {
        "dinov2.embeddings.position_embeddings": "Table 1×257×64",
        "dinov2.encoder.layer.0.layer_scale1.lambda1": "Gain 64",
        "classifier.weight": "Linear 128→2",
    },
    "regnet": {"regnet.encoder.stages.0.layers.0.layer.2.attention.0.weight": "Conv 1×1 16→8"},
    "focalnet": {
        "focalnet.encoder.stages.0.layers.0.modulation.projection_in.weight[0:16]": "Linear 16→16",
        "focalnet.encoder.stages.0.layers.0.modulation.focal_layers.0.0.weight": "Conv 3×3 16→16 /16",
    },
    # standardised weights
    "bit": {"bit.embedder.convolution.weight": "Conv 7×7 3→16", "bit.norm.weight": "Gain 64"},
    "mobilevit": {"mobilevit.encoder.layer.0.layer.0.conv_3x3.convolution.weight": "Conv 3×3 64→64 /64"},
    # --- timm ---------------------------------------------------------------------------------------------------------
    "vit": {
        "reg_token": "Table 1×2×32",
        "pos_embed": "Table 1×7×32",
        "blocks.0.attn.qkv.bias[32:64]": "Bias 32",
        "blocks.0.attn.q_norm.weight": "Gain 8",
        "blocks.0.ls1.gamma": "Gain 32",
    },
    "deit": {"dist_token": "Table 1×1×32", "head_dist.weight": "Linear 32→5"},
    "siglip_timm": {"attn_pool.latent": "Table 1×1×32", "attn_pool.kv.weight[0:32]": "Linear 32→32"},
    "beit": {
        "blocks.0.attn.relative_position_bias_table": "LogitBias 12×4",
        "blocks.0.attn.q_bias": "Bias 32",
        "blocks.0.gamma_1": "Gain 32",
    },
    # the bias of the fused projection is made of a parameter for q, zeros for k, a parameter for v; SwiGLU packed
    "eva": {
        "blocks.0.attn.v_bias": "Bias 32",
        "blocks.0.attn.qkv.weight[0:32]": "Linear 32→32",
        "blocks.0.mlp.fc1.weight[0:85]": "Linear 32→85",
    },
    "swin": {
        "layers.0.blocks.0.attn.relative_position_bias_table": "LogitBias 49×2",
        "layers.1.downsample.reduction.weight": "Linear 64→32",
        "patch_embed.proj.weight": "PatchConv 4×4 3→16",
    },
    # logit_scale: clamp, then exp; a small net of the coordinates gives the bias of the logits
    "swinv2": {
        "layers.0.blocks.0.attn.logit_scale": "Scalar 2×1×1",
        "layers.0.blocks.0.attn.q_bias": "Bias 16",
        "layers.0.blocks.0.attn.cpb_mlp.0.weight": "Linear 2→512",
        "layers.0.blocks.0.attn.cpb_mlp.2.weight": "Linear 512→2",
        "layers.0.blocks.0.attn.qkv.weight[0:16]": "Linear 16→16",
    },
    "vit_relpos": {
        "blocks.0.attn.rel_pos.mlp.fc1.weight": "Linear 2→128",
        "blocks.0.attn.rel_pos.mlp.fc2.weight": "Linear 128→4",
    },
    "levit": {
        "stages.0.blocks.0.attn.attention_biases": "LogitBias 2×16",
        "stages.0.blocks.0.attn.proj.ln.bn.weight": "Gain 16",
        "stages.0.blocks.0.mlp.ln1.linear.weight": "Linear 16→32",
    },
    "efficientformer": {"stages.3.blocks.2.token_mixer.attention_biases": "LogitBias 8×49"},
    # channels attend to channels; a temperature a head; the class token has attention of its own
    "xcit": {
        "blocks.0.attn.temperature": "Factor 4×1×1",
        "blocks.0.attn.qkv.weight[32:64]": "Linear 32→32",
        "blocks.0.local_mp.conv1.weight": "Conv 3×3 32→32 /32",
        "blocks.0.gamma1": "Gain 32",
        "cls_attn_blocks.0.attn.q.weight": "Linear 32→32",
    },
    # heads talk before and after the softmax
    "cait": {
        "blocks.0.attn.proj_l.weight": "Linear 4→4",
        "blocks.0.gamma_1": "Gain 32",
        "blocks_token_only.0.attn.k.weight": "Linear 32→32",
        "pos_embed": "Table 1×4×32",
    },
    # a sigmoid of it mixes two attentions
    "convit": {
        "blocks.0.attn.gating_param": "Scalar 4",
        "blocks.0.attn.pos_proj.weight": "Linear 3→4",
        "blocks.0.attn.qk.weight[0:32]": "Linear 32→32",
    },
    "edgenext": {
        "stages.1.blocks.0.xca.temperature": "Factor 4×1×1",
        "stages.1.blocks.0.gamma_xca": "Gain 16",
        "stages.1.blocks.0.convs.0.weight": "Conv 3×3 8→8 /8",
    },
    "coat": {
        "cls_token1": "Table 1×1×16",
        "cpe1.proj.weight": "Conv 3×3 16→16 /16",
        "crpe1.conv_list.0.weight": "Conv 3×3 4→4 /4",
    },
    # positions of a map: channels are axis 1; a 1x1 convolution gives q, k, v
    "visformer": {"pos_embed1": "Table 1×16×8×8", "stage2.0.attn.qkv.weight[0:32]": "Conv 1×1 32→32"},
    "hiera": {
        "patch_embed.proj.weight": "Conv 7×7 3→16",
        "pos_embed": "Table 1×256×16",
        "blocks.0.attn.qkv.weight[16:32]": "Linear 16→16",
    },
    # the projection gives a gate, what passes and what the convolution reads: 48, 32, 16
    "mambaout": {
        "stages.0.blocks.0.fc1.weight[0:48]": "Linear 16→48",
        "stages.0.blocks.0.fc1.weight[48:80]": "Linear 16→32",
        "stages.0.blocks.0.conv.weight": "Conv 7×7 16→16 /16",
    },
    "convnext": {
        "stem.0.weight": "PatchConv 4×4 3→8",
        "stages.0.blocks.0.conv_dw.weight": "Conv 7×7 8→8 /8",
        "stages.0.blocks.0.gamma": "Gain 8",
    },
    "convnextv2_timm": {"stages.0.blocks.0.mlp.grn.weight": "Gain 32"},
    "inception_next": {"stages.0.blocks.0.token_mixer.dwconv_w.weight": "Conv 1×9 2→2 /2"},
    # standardised weights, times a gain per output channel
    "nfnet": {
        "stem.conv1.weight": "Conv 3×3 3→16",
        "stem.conv1.gain": "Gain 16×1×1×1",
        "stages.0.0.attn_last.fc1.weight": "Conv 1×1 32→8",
    },
    "efficientnet": {
        "conv_stem.weight": "Conv 3×3 3→24",
        "blocks.3.0.conv_dw.weight": "Conv 3×3 128→128 /128",
        "blocks.3.0.se.conv_reduce.weight": "Conv 1×1 128→8",
    },
    # x·sigmoid(v·x) over the deviation of a group
    "evonorm": {"bn1.v": "Gain 24", "bn1.weight": "Gain 24"},
    "seresnet": {
        "layer1.0.se.fc1.weight": "Conv 1×1 16→8",
        "conv1.weight": "Conv 7×7 3→64",
        "fc.weight": "Linear 32→5",
    },
    "densenet": {"features.denseblock1.denselayer1.conv1.weight": "Conv 1×1 16→32"},
    "repvit": {"stages.0.blocks.0.token_mixer.conv.c.weight": "Conv 3×3 8→8 /8", "head.head.l.weight": "Linear 16→5"},
    # layers over tokens: 4 × 4 patches
    "mixer": {"blocks.0.mlp_tokens.fc1.weight": "Linear 16→8", "stem.proj.weight": "PatchConv 8×8 3→16"},
    "gmlp": {"blocks.0.mlp_channels.gate.proj.weight": "Linear 16→16"},
    # torch.addcmul(beta, alpha, x)
    "resmlp": {
        "blocks.0.norm1.alpha": "Gain 1×1×16",
        "blocks.0.norm1.beta": "Bias 1×1×16",
        "blocks.0.ls1": "Gain 16",
        "blocks.0.linear_tokens.weight": "Linear 16→16",
    },
    # weights of the attention come from a linear layer: 2 heads · (3 · 3)² numbers
    "volo": {"network.0.0.attn.attn.weight": "Linear 16→162", "pos_embed": "Table 1×2×2×32"},
    # four gates of 4 units, inputs of 16 channels
    "sequencer": {
        "stages.0.blocks.0.rnn_tokens.rnn_v.weight_ih_l0": "Gates 4× 16→4",
        "stages.0.blocks.0.rnn_tokens.rnn_v.weight_hh_l0_reverse": "Gates 4× 4→4",
        "stages.0.blocks.0.rnn_tokens.rnn_h.bias_ih_l0": "Bias 4× 4",
        "stages.1.downsample.down.weight": "PatchConv 2×2 16→24",
    },
}
ONE_NORM = ("Gain", "Scalar", "LogitBias")  # the largest entry


def matches(found: str | None, wanted: str) -> bool:
    kind, _, sizes = wanted.partition(" ")
    return found in ([f"{name} {sizes}" for name in ONE_NORM] if kind == "Factor" else [wanted])


@pytest.mark.parametrize("name", TABLE)
def test_atoms_are_what_the_source_says(name: str) -> None:
    found = {leaf.key: leaf.atom.describe() for leaf in family(name).norm.leaves}
    wrong = {k: (found.get(k, "no such leaf"), v) for k, v in TABLE[name].items() if not matches(found.get(k), v)}
    assert not wrong, f"found, wanted: {wrong}"


@pytest.mark.parametrize("name", TABLE)
def test_keys_are_python(name: str) -> None:
    """The slice in a leaf's key, evaluated, is what the leaf reads."""
    norm = family(name).norm
    for leaf in norm.leaves:
        if leaf.slices:
            entries = torch.arange(torch.Size(norm.shapes[leaf.weight]).numel()).view(norm.shapes[leaf.weight])
            written = eval("entries" + leaf.key.removeprefix(leaf.weight), {"entries": entries})
            assert torch.equal(written.flatten(), leaf.read(entries).flatten()), leaf.key


def test_the_table_is_as_long_as_it_should_be() -> None:
    assert sum(map(len, TABLE.values())) >= 160
    assert len(TABLE) >= 70

"""Small configurations for any transformers architecture: `hf:NAME-tiny`.

A configuration is a bag of numbers with hundreds of names over all architectures. The sets below say what a number is
by its name; each is capped, so that what was equal stays equal. Sub-configurations are shrunk likewise. A few
architectures have numbers that must fit together in a way of their own: `TOGETHER`.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

__all__ = ["as_fields", "fields", "shrink"]

WIDTH, HEAD_COUNT, HEAD_SIZE, INNER_WIDTH, LAYER_COUNT, VOCAB = 64, 4, 16, 128, 2, 128

WIDTHS = frozenset(
    """
    hidden_size d_model n_embd dim embed_dim emb_dim embedding_dim hidden_dim model_dim word_embed_proj_dim
    embedding_size width encoder_hidden_size decoder_hidden_size cross_attention_hidden_size text_hidden_size
    projection_dim output_hidden_size d_embed encoder_hidden_dim decoder_hidden_dim encoder_embed_dim
    decoder_embed_dim text_embed_dim image_embed_dim out_hidden_size vision_hidden_size fusion_hidden_size
    qformer_hidden_size feature_size mask_feature_size fpn_feature_size conv_out_channels text_d_model
    adapter_hidden_size backbone_hidden_size output_dim classifier_proj_size encoder_width lru_width
    prompt_encoder_hidden_size audio_hidden_size residual_channels text_dim encoder_hidden_channels hidden_channels
    pooler_output_size output_proj_dim entity_emb_size upsampling_dim flow_size text_projection_input_dim
    temporal_hidden_size hidden_features hidden_size_per_layer_input attention_hidden_size
    """.split()
)
INNER = frozenset(
    """
    intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner dim_feedforward encoder_feedforward_dim
    mlp_dim encoder_intermediate_size decoder_intermediate_size dense_intermediate_size
    shared_expert_intermediate_size shared_intermediate_size moe_intermediate_size expert_ffn_hidden_size
    expert_intermediate_size intermediate_dim ffn_hidden_size intermediate_size_mlp mlp_hidden_size d_ffn
    feedforward_size moe_shared_expert_intermediate_size
    """.split()
)
LAYERS = frozenset(
    """
    num_hidden_layers n_layer n_layers num_layers depth encoder_layers decoder_layers num_encoder_layers
    num_decoder_layers encoder_num_layers decoder_num_layers encoder_num_hidden_layers decoder_num_hidden_layers
    text_num_layers vision_num_layers transformer_layers encoder_n_layer decoder_n_layer e_layers l_layers r_layers
    x_layers decoder_depth num_transformer_layers fusion_num_hidden_layers qformer_num_layers
    num_self_attends_per_block
    """.split()
)
HEADS = frozenset(
    """
    num_attention_heads n_head n_heads num_heads nheads encoder_attention_heads decoder_attention_heads
    attention_heads text_num_heads encoder_num_heads num_encoder_attention_heads num_decoder_attention_heads
    encoder_num_attention_heads decoder_num_attention_heads downsample_num_attention_heads attn_num_heads
    num_image_heads mask_decoder_num_heads
    """.split()
)
KV_HEADS = frozenset(
    """
    num_key_value_heads n_head_kv num_kv_heads multi_query_group_num n_kv_heads num_query_groups
    encoder_num_key_value_heads decoder_num_key_value_heads
    """.split()
)
VOCABULARIES = frozenset("vocab_size text_vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size n_vocab".split())

CAPS: dict[str, int] = {
    **dict.fromkeys(WIDTHS, WIDTH),
    **dict.fromkeys(INNER, INNER_WIDTH),
    **dict.fromkeys(LAYERS, LAYER_COUNT),
    **dict.fromkeys(HEADS, HEAD_COUNT),
    **dict.fromkeys(VOCABULARIES, VOCAB),
    **dict.fromkeys(
        "head_dim attention_head_dim d_kv d_head v_head_dim qk_nope_head_dim kv_channels".split(), HEAD_SIZE
    ),
    **dict.fromkeys("linear_key_head_dim linear_value_head_dim global_head_dim swa_head_dim".split(), HEAD_SIZE),
    **dict.fromkeys("swa_v_head_dim index_head_dim mamba_d_head mamba_head_dim mamba_headdim".split(), HEAD_SIZE),
    **dict.fromkeys("q_lora_rank kv_lora_rank state_size mamba_d_state ssm_state_size".split(), 16),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts".split(), 2),
    **dict.fromkeys("n_group topk_group n_groups mamba_n_groups first_k_dense_replace attn_layer_offset".split(), 1),
    **dict.fromkeys("attn_layer_period expert_layer_period linear_num_key_heads index_n_heads".split(), 2),
    **dict.fromkeys("linear_num_value_heads mamba_dt_rank time_step_rank n_mamba_heads".split(), 4),
    **dict.fromkeys(
        "qk_rope_head_dim rotary_dim chunk_size mamba_chunk_size sliding_window index_topk adapter_rank".split(), 8
    ),
    **dict.fromkeys(
        "mamba_n_heads mamba_num_heads relative_attention_num_buckets num_latents local_attention".split(), 8
    ),
    **dict.fromkeys("max_position_embeddings n_positions max_sequence_length max_seq_len n_ctx".split(), 128),
    **dict.fromkeys("max_source_positions max_2d_position_embeddings vocab_size_per_layer_input".split(), 128),
    **dict.fromkeys("max_target_positions max_target_length d_latents".split(), 64),
    **dict.fromkeys("num_queries num_query_tokens".split(), 10),
    **dict.fromkeys("num_conv_pos_embeddings num_codevectors_per_group xpath_unit_hidden_size".split(), 16),
    **dict.fromkeys("relative_attention_max_distance qk_head_dim".split(), 24),
    **dict.fromkeys("codebook_size audio_vocab_size qk_channels".split(), 32),
    **dict.fromkeys("num_conv_pos_embedding_groups zero_expert_num".split(), 2),
    "expert_layer_offset": 1,
    "num_kv_shared_layers": 0,
}
STAGE_WIDTHS = frozenset("hidden_sizes embed_dims hidden_dims neck_hidden_sizes decoder_hidden_sizes dims".split())
STAGE_DEPTHS = frozenset("depths num_blocks blocks_per_stage layers_per_stage".split())
# Numbers that transformers has no default for, though the model cannot be built without them.
MISSING: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("autoformer", "informer", "time_series_transformer"), {"prediction_length": 24, "context_length": 48}
    ),
    **dict.fromkeys(("wav2vec2-bert", "wav2vec2-conformer"), {"vocab_size": 32}),
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "nemotron": {"num_key_value_heads": 8},
}
TOGETHER: dict[str, dict[str, Any]] = {
    "bit": {"num_groups": 1, "embedding_size": 16},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8},
    "mimi": {"upsample_groups": 8},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 4, "feed_forward_size": 128},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2},
}
LAYER_KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types")
MAX_IMAGE = 224  # what a larger image becomes: a multiple of all common patch sizes
IGNORED = frozenset("transformers_version architectures id2label label2id problem_type dtype torch_dtype".split())


def fields(config: Any) -> dict[str, Any]:
    """The entries of a configuration that are its own, not those that its class derives from others if left out."""
    kind = type(config)
    if dataclasses.is_dataclass(kind):
        declared = {f.name: f.default for f in dataclasses.fields(kind)}
    else:
        declared = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    fresh, layers = kind(), getattr(config, "num_hidden_layers", None)

    def own(name: str, value: Any) -> bool:
        if declared[name] is not None or hasattr(value, "to_dict"):
            return True
        if name in MISSING.get(kind.model_type, ()):
            return True
        derived = isinstance(value, int) or (isinstance(value, (list, tuple)) and len(value) == layers)
        return not derived and value != getattr(fresh, name, None)

    values = {name: getattr(config, name, None) for name in declared if name not in IGNORED}
    return {name: value for name, value in values.items() if value is not None and own(name, value)}


def as_fields(config: Any) -> dict[str, Any]:
    """`fields`, sub-configurations as dicts with their `model_type`: what a class takes for a sub-configuration."""
    plain = {name: as_fields(value) if hasattr(value, "to_dict") else value for name, value in fields(config).items()}
    return {**plain, "model_type": type(config).model_type}


def shrink(config: Any) -> dict[str, Any]:
    """Keyword arguments for `type(config)` that make a tiny model of the same architecture, a layer of each kind."""
    return _shrink(config, taken={})


def _shrink(config: Any, taken: dict[int, int]) -> dict[str, Any]:
    own = fields(config)
    staged = any(isinstance(own.get(name), (list, tuple)) for name in STAGE_DEPTHS)
    layers = None if staged else getattr(config, "num_hidden_layers", None)
    kept = list(range(LAYER_COUNT))
    if isinstance(layers, int):
        kept = _kept_layers(next((own[n] for n in LAYER_KINDS if len(own.get(n) or ()) == layers), None), layers)
    small: dict[str, Any] = {}
    for name, value in own.items():
        small[name] = value
        if hasattr(value, "to_dict"):
            small[name] = {**_shrink(value, taken), "model_type": type(value).model_type}
        elif isinstance(value, bool):
            small[name] = value and name not in ("use_cache", "use_mamba_kernels", "use_pretrained_backbone")
        elif isinstance(value, int):
            small[name] = _number(name, value, own, len(kept) if value == layers else LAYER_COUNT, taken)
        elif isinstance(value, (list, tuple)):
            small[name] = _sequence(name, value, layers, kept, taken)
        elif isinstance(value, dict) and value.get("mrope_section"):
            small[name] = {**value, "mrope_section": [2, 3, 3] if len(value["mrope_section"]) == 3 else [4, 4]}
    return {**small, **TOGETHER.get(type(config).model_type, {})}


def _kept_layers(kinds: Any, layers: int) -> list[int]:
    """The first layer of each kind, and more from the start until there are enough."""
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))} if kinds else {}
    kept = sorted(first.values())
    kept += [index for index in range(layers) if index not in kept][: max(0, LAYER_COUNT - len(kept))]
    return sorted(kept)


def _number(name: str, value: int, own: dict[str, Any], layers: int, taken: dict[int, int]) -> int:
    if name.endswith(("token_id", "token_index", "tok_id")):
        return _token(value, taken)
    if name in KV_HEADS:
        heads = next((own[head] for head in HEADS if isinstance(own.get(head), int)), None)
        return HEAD_COUNT if value == heads else min(value, HEAD_COUNT // 2)
    if name in LAYERS:
        return min(value, layers)
    if name in ("image_size", "img_size"):
        return MAX_IMAGE if value > MAX_IMAGE and own.get("patch_size") in (7, 8, 14, 16, 32) else value
    return min(value, CAPS[name]) if name in CAPS and value > 0 else value


def _sequence(name: str, value: Any, layers: int | None, kept: list[int], taken: dict[int, int]) -> Any:
    sequence, numbers = type(value), bool(value) and all(isinstance(entry, int) for entry in value)
    if name.endswith(("token_id", "token_ids")) and numbers:
        return sequence(_token(entry, taken) for entry in value)
    if numbers and name in STAGE_DEPTHS | HEADS | KV_HEADS:
        return sequence(1 for _ in value)
    if numbers and name in STAGE_WIDTHS:
        return sequence(max(16, 16 * -(-4 * entry // max(value))) for entry in value)
    if layers and len(value) == layers and layers > LAYER_COUNT:
        return sequence(value[index] for index in kept)
    if (
        numbers
        and layers
        and name != "out_indices"
        and any(part in name for part in ("layer", "idx", "index", "indic"))
    ):
        return sequence(entry for entry in value if entry < len(kept))
    return value


def _token(value: int, taken: dict[int, int]) -> int:
    """Special tokens keep apart from each other; the usual first few stay where they are."""
    return value if value < 4 else taken.setdefault(value, VOCAB - 1 - len(taken))

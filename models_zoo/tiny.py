"""Small configurations for any transformers architecture: `hf:NAME-tiny`.

A configuration is a bag of numbers with hundreds of names over all architectures. The sets below say what a number is
by its name; each is capped, so that what was equal stays equal. Sub-configurations are shrunk likewise. A few
architectures have numbers that must fit together in a way of their own: `TOGETHER`.
"""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

from .tiny_types import MISSING, SMALLER, TOGETHER

__all__ = ["as_fields", "fields", "read", "shrink"]

WIDTH, HEAD_COUNT, HEAD_SIZE, INNER_WIDTH, STAGE_WIDTH, LAYER_COUNT, VOCAB = 64, 4, 16, 128, 16, 2, 128

WIDTHS = frozenset(
    """
    hidden_size d_model n_embd dim embed_dim emb_dim embedding_dim hidden_dim model_dim word_embed_proj_dim
    embedding_size width encoder_hidden_size decoder_hidden_size cross_attention_hidden_size text_hidden_size
    projection_dim output_hidden_size d_embed encoder_hidden_dim decoder_hidden_dim encoder_embed_dim
    decoder_embed_dim text_embed_dim image_embed_dim out_hidden_size vision_hidden_size fusion_hidden_size
    qformer_hidden_size feature_size mask_feature_size fpn_feature_size conv_out_channels text_d_model
    adapter_hidden_size backbone_hidden_size output_dim classifier_proj_size encoder_width lru_width
    prompt_encoder_hidden_size audio_hidden_size residual_channels text_dim encoder_hidden_channels hidden_channels
    pooler_output_size output_proj_dim upsampling_dim flow_size text_projection_input_dim
    temporal_hidden_size hidden_features hidden_size_per_layer_input attention_hidden_size hidden_size_global
    output_channels vit_dim fpn_hidden_size mit_hidden_size descriptor_decoder_dim
    reassemble_hidden_size descriptor_dim cross_hidden_size image_token_embed_dim
    conv_dim tdnn_dim mask_dim bottleneck_features bin_embedding_dim text_projection_in_dim text_projection_out_dim
    class_embed_dim vision_features_channels condition_dim adapter_in_dim adapter_out_dim adapter_input_size
    """.split()
)
INNER = frozenset(
    """
    intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner dim_feedforward encoder_feedforward_dim
    mlp_dim encoder_intermediate_size decoder_intermediate_size dense_intermediate_size
    shared_expert_intermediate_size shared_intermediate_size moe_intermediate_size expert_ffn_hidden_size
    expert_intermediate_size intermediate_dim ffn_hidden_size intermediate_size_mlp mlp_hidden_size d_ffn
    feedforward_size moe_shared_expert_intermediate_size mit_intermediate_size
    alignment_intermediate_size projector_hidden_size dim_ff d_inner encoder_linear_units decoder_linear_units
    task_encoder_hidden_dim encoder_dim_feedforward decoder_dim_feedforward
    """.split()
)
LAYERS = frozenset(
    """
    num_hidden_layers n_layer n_layers num_layers depth encoder_layers decoder_layers num_encoder_layers
    num_decoder_layers encoder_num_layers decoder_num_layers encoder_num_hidden_layers decoder_num_hidden_layers
    text_num_layers vision_num_layers transformer_layers encoder_n_layer decoder_n_layer e_layers l_layers r_layers
    x_layers decoder_depth num_transformer_layers fusion_num_hidden_layers qformer_num_layers
    num_self_attends_per_block layers
    """.split()
)
HEADS = frozenset(
    """
    num_attention_heads n_head n_heads num_heads nheads encoder_attention_heads decoder_attention_heads
    attention_heads text_num_heads encoder_num_heads num_encoder_attention_heads num_decoder_attention_heads
    encoder_num_attention_heads decoder_num_attention_heads downsample_num_attention_heads attn_num_heads
    num_image_heads mask_decoder_num_heads mit_num_attention_heads prompt_num_attention_heads
    decoder_self_attention_heads decoder_cross_attention_heads num_attention_heads_per_stage
    cross_num_attention_heads linear_num_heads decoder_num_heads
    """.split()
)
KV_HEADS = frozenset(
    """
    num_key_value_heads n_head_kv num_kv_heads multi_query_group_num n_kv_heads num_query_groups
    encoder_num_key_value_heads decoder_num_key_value_heads cross_num_key_value_heads
    """.split()
)
VOCABULARIES = frozenset(
    """
    vocab_size text_vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size n_vocab entity_vocab_size
    input_vocab_size output_vocab_size pronunciation_vocab_size shape_vocab_size
    """.split()
)

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
    **dict.fromkeys("cross_head_dim linear_head_dim dim_head".split(), HEAD_SIZE),
    **dict.fromkeys("swa_v_head_dim index_head_dim mamba_d_head mamba_head_dim mamba_headdim".split(), HEAD_SIZE),
    **dict.fromkeys("q_lora_rank kv_lora_rank state_size mamba_d_state ssm_state_size".split(), 16),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts".split(), 2),
    **dict.fromkeys("n_group topk_group n_groups mamba_n_groups first_k_dense_replace attn_layer_offset".split(), 1),
    **dict.fromkeys("num_dense_layers num_res_blocks".split(), 1),
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
    "num_pos_feats": WIDTH // 2,  # a sine and a cosine of each
    "entity_emb_size": WIDTH // 2,  # less than the width
    **dict.fromkeys(("codebook_dim", "vector_quantization_hidden_dimension"), WIDTH // 2),
    **dict.fromkeys("base_channels latent_channels upsample_initial_channel".split(), WIDTH // 2),
    **dict.fromkeys("speech_decoder_postnet_units duration_predictor_channels".split(), WIDTH // 2),
    **dict.fromkeys("energy_predictor_channels pitch_predictor_channels".split(), WIDTH // 2),
    **dict.fromkeys("prior_encoder_num_flows duration_predictor_num_flows num_blocks".split(), LAYER_COUNT),
    **dict.fromkeys("posterior_encoder_num_wavenet_layers prior_encoder_num_wavenet_layers".split(), LAYER_COUNT),
    "decoder_in_channels": WIDTH,
    **dict.fromkeys("num_quantizers num_codebooks n_codebooks".split(), 4),
    "num_filters": 4,  # doubled with each stage
    "group_detr": 2,
    "upsample_groups": 8,  # divide the width
    "index_kpool": 4,
    "latent_query_num": 16,
    "num_kv_shared_layers": 0,
}
STAGE_WIDTHS = frozenset(
    """
    hidden_sizes embed_dims embed_dim hidden_dims neck_hidden_sizes decoder_hidden_sizes dims encoder_in_channels
    embed_dim_per_stage backbone_channel_list keypoint_encoder_sizes encoder_hidden_sizes convstream_hidden_sizes
    fusion_hidden_sizes intermediate_feature_dims scaled_images_feature_dims
    """.split()
)
STAGE_DEPTHS = frozenset("depths depth block_sizes num_blocks blocks_per_stage layers_per_stage".split())
READ_OUT = ("out_indices", "state_indices", "hook_ids")  # layers whose outputs something takes, one by one
MARKED = ("layer", "idx", "index", "indic", "attention_blocks", *READ_OUT)  # parts of names of lists of layers
MOST_KINDS = 4  # different entries of a list that gives the kind of each layer; with more it gives sizes
MAX_IMAGE = 224  # what a larger image becomes: a multiple of all common patch sizes
IGNORED = frozenset("transformers_version architectures id2label label2id problem_type dtype torch_dtype".split())


def read(config: Any, name: str) -> Any:
    """A number of a configuration, None if it has none; where it differs between layers that of the first."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        return getattr(config.per_layer_config[0], name, None)


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
        default = read(fresh, name)
        return value != default and (not derived or default is None)

    values = {name: read(config, name) for name in declared if name not in IGNORED and not name.startswith("_")}
    values = {name: value for name, value in values.items() if value is not None and own(name, value)}
    stages = getattr(config, "_out_indices", None)  # not declared by every backbone, though all take it
    if stages is not None and stages != getattr(fresh, "_out_indices", None):
        values["out_indices"] = stages
    return values


def as_fields(config: Any) -> dict[str, Any]:
    """`fields`, sub-configurations as dicts with their `model_type`: what a class takes for a sub-configuration."""
    plain = {name: as_fields(value) if hasattr(value, "to_dict") else value for name, value in fields(config).items()}
    return {**plain, "model_type": type(config).model_type}


def shrink(config: Any) -> dict[str, Any]:
    """Keyword arguments for `type(config)` that make a tiny model of the same architecture, a layer of each kind."""
    return _shrink(config, taken={})


def _shrink(config: Any, taken: dict[int, int]) -> dict[str, Any]:
    own = fields(config)
    layers = None if _staged(own) else getattr(config, "num_hidden_layers", None)
    kept = list(range(LAYER_COUNT))
    if isinstance(layers, int):
        own |= _kinds(config, layers)
        kept = _kept_layers(own, layers)
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
        elif isinstance(value, str):
            small[name] = SMALLER.get(value, value)
    for name, value in TOGETHER.get(type(config).model_type, {}).items():
        small[name] = small[name] | value if _is_part(small.get(name)) else value
    if "mrope_section" in str(rope := getattr(config, "rope_parameters", None)):
        old, new = _head_size(config), _head_size(SimpleNamespace(**small))
        small["rope_parameters"] = _sections(rope, new / old if old and new else 1.0)
    if single := getattr(config, "per_layer_attributes", None):  # numbers that differ between layers
        small["per_layer_config"] = {
            place: _of_layer({name: read(config.per_layer_config[layer], name) for name in single}, own, taken)
            for place, layer in enumerate(kept)
        }
    return small


def _is_part(value: Any) -> bool:
    """Whether a value is the dict of a sub-configuration."""
    return isinstance(value, dict) and "model_type" in value


def _of_layer(single: dict[str, Any], own: dict[str, Any], taken: dict[int, int]) -> dict[str, Any]:
    """The numbers that one layer has for itself, smaller."""
    return {
        name: value
        if isinstance(value, bool) or not isinstance(value, int)
        else _number(name, value, own | single, LAYER_COUNT, taken)
        for name, value in single.items()
    }


def _staged(own: dict[str, Any]) -> bool:
    return any(isinstance(own.get(name), (list, tuple)) for name in STAGE_DEPTHS)


def _kinds(config: Any, layers: int) -> dict[str, Any]:
    """Lists of the kinds of layers, also those that the class derives: with fewer layers a kind could be missing."""
    declared = [name for name in inspect.signature(type(config)).parameters if not name.startswith("_")]
    lists = {name: value for name in declared if isinstance(value := read(config, name), (list, tuple))}
    return {
        name: value
        for name, value in lists.items()
        if (_is_kinds(value, layers) and len(set(value)) > 1) or _marked(name, value, layers)
    }


def _is_kinds(value: Any, layers: int) -> bool:
    per_layer = isinstance(value, (list, tuple)) and len(value) == layers > LAYER_COUNT
    return per_layer and all(isinstance(kind, (str, int)) for kind in value) and len(set(value)) <= MOST_KINDS


def _kept_layers(own: dict[str, Any], layers: int) -> list[int]:
    """The first layer of each kind, those whose output is taken, and more from the start until there are enough."""
    kept: set[int] = set()
    for name, value in own.items():
        if _is_kinds(value, layers):
            kept |= {value.index(kind) for kind in value}
        elif marked := _marked(name, value, layers):
            kept |= set(marked) if name.endswith(READ_OUT) else {marked[0]}
            kept |= set(sorted({*range(layers)} - {*marked})[:1])
    kept -= {-1}
    others = [index for index in range(layers) if index not in kept]
    return sorted([*kept, *others[: max(0, LAYER_COUNT - len(kept))]])


def _marked(name: str, value: Any, layers: int) -> list[int]:
    """The layers that a list names, [] if it is no such list; for `out_indices` the embeddings are layer -1."""
    if not isinstance(value, (list, tuple)) or not any(part in name for part in MARKED):
        return []
    if not all(isinstance(entry, int) for entry in value) or sorted(set(value)) != list(value):
        return []
    marked = [entry - (name == "out_indices") for entry in value]
    return marked if all(-(name == "out_indices") <= index < layers for index in marked) else []


def _number(name: str, value: int, own: dict[str, Any], layers: int, taken: dict[int, int]) -> int:
    if name.endswith(("token_id", "token_index", "tok_id")):
        return _token(value, taken)
    if name in KV_HEADS:
        heads = next((own[head] for head in HEADS if isinstance(own.get(head), int)), None)
        return HEAD_COUNT if value == heads else min(value, HEAD_COUNT // 2)
    if name in LAYERS and any(
        isinstance(own.get(depths), (list, tuple)) and len(own[depths]) == value for depths in STAGE_DEPTHS
    ):
        return value  # of stages
    if name in LAYERS:
        return min(value, layers)
    if name == "embed_dim" and _staged(own):
        return min(value, STAGE_WIDTH)  # that of the first stage
    if name in ("image_size", "img_size"):
        return MAX_IMAGE if value > MAX_IMAGE and own.get("patch_size") in (7, 8, 14, 16, 32) else value
    return min(value, CAPS[name]) if name in CAPS and value > 0 else value


def _sequence(name: str, value: Any, layers: int | None, kept: list[int], taken: dict[int, int]) -> Any:
    sequence, numbers = type(value), bool(value) and all(isinstance(entry, int) for entry in value)
    if name.endswith(("token_id", "token_ids")) and numbers:
        return sequence(_token(entry, taken) for entry in value)
    if numbers and name in STAGE_DEPTHS | KV_HEADS:
        return sequence(1 for _ in value)
    if numbers and name in HEADS:  # in their ratio, as powers of 2, which divide the widths below
        return sequence(1 << max(0, (HEAD_COUNT * entry // max(value)).bit_length() - 1) for entry in value)
    if numbers and name in STAGE_WIDTHS:
        return sequence(STAGE_WIDTH * max(1, -(-4 * entry // max(value))) for entry in value)
    if layers and (marked := _marked(name, value, layers)):
        places = {layer: place for place, layer in enumerate(kept)} | {-1: -1}
        return sequence(places[layer] + (name == "out_indices") for layer in marked if layer in places)
    if layers and len(value) == layers and layers > LAYER_COUNT:
        value = sequence(value[index] for index in kept)
    return sequence(min(entry, CAPS[name]) for entry in value) if numbers and name in CAPS else value


def _sections(rope: Any, ratio: float) -> Any:
    """`rope` with the sections of its rotary embedding, which share a head among axes of positions, in `ratio`."""
    if not isinstance(rope, dict):
        return rope
    small = {name: _sections(value, ratio) for name, value in rope.items()}
    if parts := rope.get("mrope_section"):
        total = round(sum(parts) * ratio)
        whole = [int(part * ratio) for part in parts]
        small["mrope_section"] = [part + (place < total - sum(whole)) for place, part in enumerate(whole)]
    return small


def _head_size(config: Any) -> int | None:
    """Numbers a head, where the configuration says it or says what it follows from."""
    if isinstance(size := read(config, "head_dim"), int):
        return size
    width, heads = read(config, "hidden_size"), read(config, "num_attention_heads")
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None


def _token(value: int, taken: dict[int, int]) -> int:
    """Special tokens keep apart from each other; the usual first few stay where they are."""
    return value if value < 4 else taken.setdefault(value, VOCAB - 1 - len(taken))

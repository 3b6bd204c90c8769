"""What single transformers architectures need in their configurations, beside the rules by name of `tiny`.

Keys are `model_type`s, also those of sub-configurations. Everything here is a fact about the code of one architecture,
which its configuration class neither knows nor checks.
"""

from __future__ import annotations

from typing import Any

__all__ = ["MISSING", "SMALLER", "TOGETHER"]

Table = dict[str, dict[str, Any]]


def _mrope(theta: float, *section: int, **more: float) -> dict[str, Any]:
    """Text positions of a vision-language model, in the numbers that its rotary embedding falls back to."""
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": list(section), **more}
    return {"text_config": {"rope_parameters": rope}}


#: the token before an image, which the code compares with
_START = {"vision_start_token_id": 151652}
_OMNI = {**_START, **_mrope(1e6, 16, 24, 24)}
_COMPASS = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e4}}}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
#: kernel, stride, padding of each convolution of the neck's blocks
_PADDLE_DETECTION = {
    "kernel_list": [3, 2, 2],
    "scale_factor_list": [1, 2, 4, 8],
    "intraclass_block_config": {
        "reduce_channel": [1, 1, 0],
        "return_channel": [1, 1, 0],
        **{
            f"{name}_{ratio}ratio": [size(k), [1, 1], size(k // 2, 0)]
            for name, size in (
                ("vertical_long_to_small_conv", lambda k, one=1: [k, one]),
                ("horizontal_small_to_long_conv", lambda k, one=1: [one, k]),
                ("symmetric_conv_long", lambda k, one=1: [k, k]),
            )
            for ratio, k in (("long", 7), ("mid", 5), ("short", 3))
        },
    },
}

#: kernel, channels before and after, stride, squeeze-and-excitation of each block: every stage halves the image, not
#: only its height as for lines of text, and gives its features
_LCNET = {
    "backbone_config": {
        "model_type": "pp_lcnet_v4",
        "out_indices": [1, 2, 3, 4],
        "block_configs": [
            [[3, wide if place else narrow, wide, 1 if place else stride, place % 2 == 1] for place in range(depth)]
            for narrow, wide, stride, depth in ((96, 96, 1, 1), (96, 96, 2, 2), (96, 192, 2, 7), (192, 384, 2, 3))
        ],
    }
}
_REPVIT = {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}
#: the backbone that the class of the configuration means (it writes `archirecture`, and gets a ResNet)
_EDGE = {
    "backbone_config": {
        "model_type": "timm_wrapper",
        "architecture": "repvit_m1",
        "num_classes": 2,
        "model_args": _REPVIT,
    }
}

# Numbers that transformers has no default for (or an unusable one), though the model cannot be built or run without.
MISSING: Table = {
    # fields without a default
    **dict.fromkeys(
        ("autoformer", "informer", "time_series_transformer"), {"prediction_length": 24, "context_length": 48}
    ),
    **dict.fromkeys(("wav2vec2-bert", "wav2vec2-conformer"), {"vocab_size": 32}),
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 128}),
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704}},
    "granite4_vision": {"downsample_rate": "3/6", "deepstack_layer_map": [[-2, 0], [-1, 1]]},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "pp_ocrv5_server_det": _PADDLE_DETECTION,
    "pp_ocrv6_medium_det": _PADDLE_DETECTION | _LCNET,
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "pp_ocrv6_small_det": {**_LCNET, "layer_list_out_channels": [96, 96, 192, 384]},
    "pp_doclayout_v2": {"class_thresholds": [0.5, 0.5], "class_order": [0, 1]},  # of two labels
    "sapiens2": {"head_config": {"upsample_out_channels": [64, 64], "conv_out_channels": [64]}},
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_tiny_patch16_384",
            "model_args": {"embed_dim": 192},
            "do_pooling": False,
        }
    },
    "step3p7": {
        "text_config": {
            "sliding_window": 512,
            "layer_types": [*["full_attention", *["sliding_attention"] * 3] * 11, "full_attention"],
        }
    },
    "timm_backbone": {"backbone": "resnet50"},
    "uvdoc": {"backbone_config": {"model_type": "uvdoc_backbone", "out_indices": [1, 2, 3, 4, 5, 6]}},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "nemotron": {"num_key_value_heads": 8},
    "xmod": {"default_language": "en_XX"},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 31, "num_experts_per_tok": 6}},
    "dbrx": {"attn_config": {"rope_theta": 5e5, "clip_qkv": 8}},
    # placeholder tokens, which the code compares with even if there are none
    **dict.fromkeys(("blip-2", "instructblip"), {"image_token_index": 50265}),
    "instructblipvideo": {"video_token_index": 50265},
    "voxtral": {"audio_token_id": 24},
    # the tokenizer's names of image tokens: a placeholder, and one for each of the VQ model's codes
    "chameleon": {"vocabulary_map": {"<image>": 8711, **{f"IMGIMG{i:04d}Z": 4 + i for i in range(8192)}}},
    # the modelling code falls back to sections of the rotary embedding that the configuration does not hold
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _mrope(1e6, 16, 24, 24)),
    "qwen2_5_omni": {"thinker_config": _OMNI},
    "qwen2_5_omni_thinker": _OMNI,
    "qwen3_omni_moe": {"thinker_config": _START},
    "qwen3_omni_moe_thinker": _START,
    "hunyuan_vl": {"text_config": {"head_dim": 128, **_mrope(1e4, 16, 16, 16, 16)["text_config"]}},
    "ernie4_5_vl_moe": _mrope(5e5, 22, 22, 20),
    **dict.fromkeys(("glm4v", "glm46v", "glm_image", "glmga"), _mrope(1e4, 8, 12, 12, partial_rotary_factor=0.5)),
    "glm4v_moe": {"text_config": {"head_dim": 128, **_mrope(1e4, 8, 12, 12, partial_rotary_factor=0.5)["text_config"]}},
    "glm_ocr": _mrope(1e4, 8, 12, 12),
    "paddleocr_vl": _mrope(5e5, 16, 24, 24),
    "colqwen2": {"vlm_config": {"model_type": "qwen2_vl", **_mrope(1e6, 16, 24, 24)}},
    # a backbone that returns one stage only, where the head takes four
    "upernet": {
        "backbone_config": {"model_type": "resnet", "out_indices": [1, 2, 3, 4]},
        "auxiliary_in_channels": 1024,
    },
    # a backbone of another width and without the channel for the trimap; tuples where the code adds to lists
    "vitmatte": {
        "backbone_config": {"model_type": "vitdet", "num_channels": 4, "hidden_size": 384},
        "convstream_hidden_sizes": [48, 96, 192],
        "fusion_hidden_sizes": [256, 128, 64, 32],
    },
    "edgetam": {"vision_config": _EDGE},
    "edgetam_video": {"vision_config": {"model_type": "edgetam_vision_model", **_EDGE}},
    "edgetam_vision_model": _EDGE,
    "sam3_tracker_video": {"image_size": 1008},  # not declared, though taken
    "lw_detr": {"projector_scale_factors": [2.0, 0.5]},  # one level of features each
}

# Numbers that must fit together in an architecture's own way when they are small.
TOGETHER: Table = {
    # channels are rounded: for the last convolution 1280, before it 320 in the list, times the coefficient
    "align_vision_model": {
        "width_coefficient": 0.2,
        "depth_coefficient": 0.1,
        "image_size": 128,
        "initializer_range": 0.2,  # with 0.02 the image underflows before batch norms have seen data
    },
    "efficientnet": {"width_coefficient": 0.05, "depth_coefficient": 0.1, "hidden_dim": 64, "image_size": 128},
    "bit": {"num_groups": 1, "embedding_size": 16},
    # local widths x cross_attn_k = the global width
    **dict.fromkeys(("blt_local_encoder", "blt_local_decoder"), {"hidden_size": 32, "num_attention_heads": 2}),
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {"vocabulary_map": {"<image>": 100, **{f"IMGIMG{i:04d}Z": 4 + i for i in range(32)}}},
    "chameleon_vqgan": {"num_embeddings": 32},  # the codes above
    # width of the last of four stages, each twice as wide as the one before
    "clap_audio_model": {"patch_embeds_hidden_size": 16, "hidden_size": 128},
    # the backbone takes this, though its class does not declare it
    "chmv2": {"backbone_config": {"return_class_token": True}, "post_process_channels": [16, 16, 32, 64]},
    "clvp_encoder": {"num_attention_heads": 2},  # rotary dimensions are at least 32
    "cvt": {"depth": [1, 2, 3]},  # the code takes the nth of the nth stage's rates of stochastic depth
    "dac": {"encoder_hidden_size": 4, "decoder_hidden_size": 64},  # of the first stage; 16 times that is the last
    "dbrx": {"attn_config": {"rope_theta": 5e5, "clip_qkv": 8, "kv_n_heads": 2}},
    # squares of 1, 1/2 and 1/4 of an image are cut into patches; layers of the patches' encoder are read out
    "depth_pro": {"patch_size": 56, "intermediate_hook_ids": [1, 0]},
    # as long as num_hidden_layers says, which is the number of stages
    "dinov3_convnext": {"hidden_sizes": [16, 16, 32, 64], "depths": [1, 1, 1, 1]},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"head_dim": 24},  # with and without a rotary embedding
    **dict.fromkeys(("edgetam_prompt_encoder", "edgetam_video", "edgetam_video_prompt_encoder"), {"image_size": 128}),
    "edgetam_vision_model": {
        "backbone_config": {"model_args": {**_REPVIT, "embed_dim": [8, 16, 32, 64], "depth": [1, 1, 1, 1]}},
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    },
    "efficientloftr": {
        "out_features": [16, 16, 32, 64],
        "stage_num_blocks": [1, 1, 1, 1],
        "num_attention_layers": 2,
        "num_attention_heads": 8,  # the rotary embedding has 2 numbers a head for a quarter of the width
    },
    "electra": {"embedding_size": 32},  # less than the width
    "encodec": {"codebook_dim": 64, "target_bandwidths": [0.75, 1.5]},  # the width; 2 and 4 codebooks of 5 bits
    "eomt": {"num_blocks": 1},  # the queries join before the last num_blocks layers
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},  # a quarter of the text's width
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    # its last features are twice as wide as its last stage
    "fast_vlm": {"vision_config": {"architecture": "fastvit_t8", "model_args": {}, "hidden_size": 768}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    # a MobileNetV5 of timm; its last features keep their width
    "gemma3n_vision": {"model_args": {"channel_multiplier": 0.1}, "hidden_size": 2048},
    # one width for the channels between stages, and the list's last for the classifier
    "hgnet_v2": {
        "stem_channels": [3, 16, 16],
        "stage_in_channels": [16, 16, 16, 32],
        "stage_mid_channels": [16, 16, 16, 16],
        "stage_out_channels": [16, 16, 32, 64],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},  # 4 coordinates and 2 shapes make the width
    "lilt": {"hidden_size": 96},  # 6 coordinates make the width
    # four patches become one, of 4 times the width
    "llama4_vision_model": {
        "intermediate_size": 256,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "vision_output_dim": 64,
    },
    "longcat_flash": {"head_dim": 8},  # that of the rotary part
    "lw_detr_vit": {"image_size": 256},  # 4 x 4 windows of whole patches
    "mamba2": {"num_heads": 8},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "mpnet": {"relative_attention_num_buckets": 32},  # the code has this number
    **dict.fromkeys(("musicgen_decoder", "musicgen_melody_decoder"), {"hidden_size": 32}),  # not the text encoder's
    **dict.fromkeys(("neucodec", "xcodec2"), {"encoder_hidden_size": 4, "quantization_dim": 128}),  # two widths
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},  # every 2nd of 2 layers
    # what the backbone of timm takes unless told otherwise, and what it returns; texts are wider than queries
    "omdet-turbo": {
        "image_size": 224,
        "encoder_in_channels": [192, 384, 768],
        "encoder_hidden_dim": 32,
        "decoder_hidden_dim": 32,
        "vision_features_channels": [32, 32, 32],
    },
    "pe_video_encoder": {
        "vision_config": {
            "architecture": "vit_pe_core_tiny_patch16_384",
            "model_args": {"img_size": 224, "embed_dim": 64, "depth": 2, "num_heads": 4},
        }
    },
    "pp_doclayout_v3": {"x4_feat_dim": 16},  # the first stage of the backbone
    "pp_formulanet_vision": {"post_conv_in_channels": 64, "post_conv_mid_channels": 64, "post_conv_out_channels": 64},
    # the token before an image, not declared: within the vocabulary
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), {"vision_start_token_id": 64}),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), {"indexer_head_dim": 16}),
    "recurrent_gemma": {"num_hidden_layers": 3},  # the last of three kinds is attention
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 4, "feed_forward_size": 128},
    # widths differ, for that is how the code knows where stages begin; a global block does not begin one
    "sam2_hiera_det_model": {
        "hidden_size": 8,
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 4],
        "image_size": [128, 128],
        "blocks_per_stage": [1, 1, 2, 1],
        "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [3],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    },
    **dict.fromkeys(("sam2_prompt_encoder", "sam2_video", "sam2_video_prompt_encoder"), {"image_size": 128}),
    "sam3_tracker": {"vision_config": {"backbone_feature_sizes": [[64, 64], [32, 32], [16, 16]]}},  # of 224
    "sam3_tracker_video": {"image_size": 224},
    "sapiens2": {"num_key_value_heads_per_layer": [4, 2]},
    "seggpt": {"merge_index": 0},  # before the first layer that is read out
    **dict.fromkeys(("sew", "sew-d"), {"conv_dim": [32] * 13}),  # not the width
    "superglue": {"gnn_layers_types": ["self", "cross"], "sinkhorn_iterations": 3},
    "swiftformer": {"depths": [2, 2, 2, 2]},  # the last block of a stage has another kind
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "textnet": {"stem_out_channels": 16, "image_size": [64, 64]},
    "timesfm2_5": {"context_length": 128, "horizon_length": 32, "output_quantile_len": 32},  # 4 patches, not 512
    "timm_wrapper": {"num_classes": 2},  # where labels are counted for a part of another configuration
    "tvp": {"max_img_size": 224, "visual_prompt_size": 32, "num_frames": 2},
    "voxtral": {"text_config": {"num_key_value_heads": 2, "head_dim": 16}},  # otherwise those of the large model
    "vjepa2": {
        "pred_hidden_size": 64,
        "pred_num_hidden_layers": 2,
        "pred_num_attention_heads": 4,
        "frames_per_clip": 4,
        "crop_size": 64,
    },
    "udop": {"relative_attention_num_buckets": 32},  # the code has this number
    "upernet": {"auxiliary_in_channels": 32},  # the third stage of the backbone
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},  # two that share an attention
}

# Smaller models of the same kind, for the names of timm's that stand in configurations.
SMALLER = {"resnet50": "test_resnet"}

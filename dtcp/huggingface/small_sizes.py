"""Sizes of tiny models, by the names that transformers' configs have for them."""

from collections.abc import Mapping
from typing import Any

_BY_SIZE: Mapping[int, str] = {
    64: """vocab_size vocab_size_per_layer_input audio_vocab_size decoder_vocab_size codebook_size
        unpadded_vocab_size entity_vocab_size shape_vocab_size pronunciation_vocab_size
        encoder_hash_byte_group_vocab ngram_vocab_size_base num_position_embeddings""",
    32: """hidden_size d_model n_embd dim emb_dim embedding_dim embedding_size hidden_size_global
        out_hidden_size attention_hidden_size word_embed_proj_dim input_embedding_size
        output_embedding_size entity_emb_size text_hidden_size vision_output_dim projector_input_dim
        projector_output_dim pooler_hidden_size prediction_head_size lru_width true_hidden_size
        backbone_hidden_size output_channels adapter_out_dim adapter_in_dim adapter_input_size
        pronunciation_embed_dim shape_embed_dim router_hidden_size d_latents moe_hidden_size
        output_num_channels mamba_d_ssm codebook_dim attention_head_width base_channels""",
    48: """intermediate_size intermediate_size_mlp ffn_hidden_size ffn_dim dense_intermediate_size
        decoder_ffn_dim encoder_ffn_dim dim_ff d_ff dff d_inner hidden_dim feed_forward_size
        mlp_dim shared_intermediate_size downsample_hidden_size prompt_mid_dim""",
    24: """moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        moe_shared_expert_intermediate_size expert_ffn_hidden_size""",
    16: """q_lora_rank kv_lora_rank o_lora_rank index_head_dim intra_bottleneck_size laurel_rank
        mamba_d_state state_size ssm_state_size swa_head_dim hidden_size_per_layer_input
        ple_embed_dim hc_lowrank adapter_rank embedding_rank num_landmarks
        segment_means_seq_len num_latents d_rel gated_norm_rank index_block_size""",
    8: """head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_channels attention_head_size
        d_head dim_head d_kv linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head
        mamba_head_dim time_step_rank mamba_dt_rank local_attention_window_len
        num_centroids chunk_size mamba_chunk_size attention_chunk_size block_size
        local_attn_chunk_length lsh_attn_chunk_length num_filters index_topk
        attention_window keep_window_size log_scaling_n_floor""",
    7: """sliding_window sliding_window_size window_size local_attention attention_window_size""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads
        decoder_attention_heads attention_heads num_encoder_attention_heads
        num_decoder_attention_heads swa_num_attention_heads index_n_heads num_experts
        num_local_experts n_routed_experts moe_num_experts linear_num_heads mamba_n_heads
        mamba_num_heads linear_num_value_heads split_ngram_parts
        centroid_intermediate_top_k num_attention_heads_per_layer zero_expert_num rotary_dim
        floor_scale index_kpool""",
    2: """num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads
        num_query_groups num_experts_per_tok moe_topk index_topk_blocks
        num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers num_blocks depth conf_num_hidden_layers
        num_self_attends_per_block num_layers_per_stack""",
    1: "n_group topk_group first_k_dense_replace n_groups mamba_ngroups mamba_n_groups",
    128: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length",
}

TINY: Mapping[str, int] = {name: size for size, names in _BY_SIZE.items() for name in names.split()}
"""The largest size of each field in a tiny model."""

_ROPE: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 1e4}

BY_MODEL_TYPE: Mapping[str, Mapping[str, Any]] = {
    # With few heads many scores are 0, and among equal ones torch.topk picks any.
    "axk2": {"index_n_heads": 16},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    # A token that is never predicted: that of padding.
    "chameleon": {"vocabulary_map": {"<image>": 60, "IMGIMGAZ": 0}},
    "cohere_compass_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {**_ROPE, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"model_type": "", "kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    },
    # One layer of each kind; ratios that give entries even to rows of a few tokens; for the 16
    # heads of the indexer see axk2.
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 8},
        "index_n_heads": 16,
        "index_topk": 4,
        "o_groups": 2,
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v32": {"index_n_heads": 16},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"head_dim": 24, "num_key_value_heads": 4, "index_n_heads": 16},
    # Layers before and after those that run twice.
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        **dict.fromkeys(("n_input_layers", "n_output_layers"), 1),
    },
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
    },
    # A name of timm's: 600,000 parameters instead of 300 million.
    "gemma3n_vision": {"architecture": "mobilenetv3_small_050"},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "num_kv_shared_layers": 2,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0]}},
    "glm4v_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    # Layers that share choices, which none of the published ones do.
    "glm5_next_text": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
        "indexer_types": ["full", "full", "shared"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "index_n_heads": 16,
    },
    "glm_moe_dsa": {"index_n_heads": 16, "indexer_types": ["full", "shared"]},
    "glm_ocr_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 1]],
        "spatial_target_layers": [0] * 4,
        "downsample_rate": "1/2",
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 64},
        "qformer_config": {
            "model_type": "blip_2_qformer",
            **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
        },
    },
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "hunyuan_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "hy_v4": {"index_n_heads": 16},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {
        "num_hidden_layers": 2,
        "full_attn_idxs": [1],
        "layer_types": ["conv", "full_attention"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": ["sliding_attention", "full_attention"]},
    # Layers of the published model that its default config leaves out; an index for each kv head.
    "minimax_m3_vl_text": {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
    },
    "ministral": {"layer_types": ["sliding_attention", "full_attention"]},
    # Layers that share latents and choices, with rotary positions and without.
    "mistral_large4_text": {
        "num_hidden_layers": 5,
        "no_rope_layers": [1, 0, 1, 0, 1],
        "kv_source_layers": [0, 1, 0, 1, 4],
        "indexer_types": ["full", "full", "shared", "full", "shared"],
        "mlp_layer_types": ["dense"] + ["sparse"] * 4,
        "layer_types": ["indexed_attention"] * 5,
        "index_n_heads": 16,
    },
    # Half of its channels are rotary.
    "mistral4": {"head_dim": 16},
    "mobilebert": {"intra_bottleneck_size": 32},
    # An end-of-text id that random tokens contain, too; n-grams in a layer of linear attention.
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "eos_token_id": 5,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
    },
    "nemotron_h_omni": {"vision_config": {"model_type": "radio", "video_temporal_patch_size": 2}},
    "paligemma": {"text_config": {"model_type": "gemma", "num_key_value_heads": 1}},
    "paddleocr_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    # timm's own names, of which transformers has one.
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {
                "embed_dim": 32,
                "depth": 1,
                "num_heads": 4,
                "img_size": [28, 28],
                "ref_feat_shape": [2, 2],
                "global_pool": "",
                "use_post_transformer_norm": False,
            },
        }
    },
    "qwen2_5_omni_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "qwen2_5_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "qwen2_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark": {"projector_hidden_size": 32},
    # As many layers as its stages.
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [16] * 4, "depths": [1] * 4},
    "neomme": {"head_dim": 16},
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "step3p7": {"text_config": {"model_type": "step3p5", "sliding_window": 7}},
    "switch_transformers": {
        "expert_capacity": 3,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 4},
}
"""What else the tiny config of a model type has to change."""

REQUIRED = ("head_dim", "num_key_value_heads", "vocab_size")
"""Fields that a model needs though its config's default is None."""

"""Tiny configs of language models that read images."""

from dtcp.huggingface.small_sizes import BY_MODEL_TYPE
from tests.harness.hf_models import SHAPE, WINDOWS
from tests.huggingface.test_picked_latents import SMALL as PICKING

IMAGE, TOKENS = 60, 4
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
LAYERS = {"num_hidden_layers": 2, "image_size": 64, "patch_size": 16}
# Narrower than an image, whose first token its last one does not see.
NARROW = {**SHAPE, **WINDOWS, "sliding_window": 3}
GEMMA4 = {
    **NARROW,
    "global_head_dim": 16,
    "num_kv_shared_layers": 0,
    "use_bidirectional_attention": "vision",
}
CONFIGS = {
    "gemma3": {
        "text_config": {**NARROW, "query_pre_attn_scalar": 16},
        "vision_config": {**VISION, **LAYERS, "vision_use_head": False},
        "image_token_id": IMAGE,
        "mm_tokens_per_image": TOKENS,
    },
    "gemma4": {
        "text_config": {
            **GEMMA4,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": 64,
        },
        "vision_config": {
            **VISION,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "num_hidden_layers": 2,
            "position_embedding_size": 16,
        },
        "image_token_id": IMAGE,
    },
    "gemma4_unified": {
        "text_config": GEMMA4,
        "vision_config": {
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 24,
            "mm_posemb_size": 16,
            "output_proj_dims": 24,
        },
        "image_token_id": IMAGE,
    },
    "qwen3_vl": {
        "text_config": {
            **SHAPE,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            **VISION,
            "depth": 3,
            "num_heads": 4,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        "image_token_id": IMAGE,
        "video_token_id": 61,
        "vision_start_token_id": 62,
        "vision_end_token_id": 63,
    },
    "qwen4_exp": {
        "text_config": {
            **SHAPE,
            **BY_MODEL_TYPE["qwen4_exp_text"],
            "layer_types": ["linear_attention", "indexed_attention"],
            **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "hc_count": 2,
            "hc_lowrank": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
            "ple_embed_dim": 16,
            "ple_conv_kernel_size": 2,
            "split_ngram_parts": 4,
            "ngram_vocab_size_base": 64,
            "make_ngram_vocab_size_divisible_by": 8,
        },
        "vision_config": {
            **VISION,
            "depth": 2,
            "num_heads": 4,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
        },
        "image_token_id": IMAGE,
        "video_token_id": 61,
        "vision_start_token_id": 62,
        "vision_end_token_id": 63,
    },
    "hy_v4_vl": {
        "text_config": {
            **SHAPE,
            **PICKING,
            "num_hidden_layers": 3,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 0],
            },
        },
        "vision_config": {
            **VISION,
            "num_hidden_layers": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "max_image_size": 64,
        },
        "image_token_id": IMAGE,
        "video_token_id": 61,
        "experts_implementation": "batched_mm",
    },
    "minimax_m3_vl": {
        "text_config": {
            **SHAPE,
            **BY_MODEL_TYPE["minimax_m3_vl_text"],
            **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size"), 48),
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "index_topk_blocks": 2,
            "rotary_dim": 4,
        },
        "vision_config": {
            **VISION,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 4,
        },
        "image_token_index": IMAGE,
        "video_token_index": 61,
        "projector_hidden_size": 32,
    },
    # Pools of three tokens, which no border of documents or shards heeds.
    "glm5_next": {
        "text_config": {
            **SHAPE,
            **{key: x for key, x in PICKING.items() if key != "first_k_dense_replace"},
            **BY_MODEL_TYPE["glm5_next_text"],
            "qk_rope_head_dim": 0,
            "index_kpool": 3,
            "linear_num_heads": 4,
            "linear_head_dim": 8,
            "hc_mult": 2,
        },
        "vision_config": {
            **VISION,
            "depth": 2,
            "num_heads": 4,
            "patch_size": 4,
            "image_size": 16,
            "out_hidden_size": 32,
            "projection_intermediate_size": 48,
        },
        "image_token_id": IMAGE,
        "video_token_id": 61,
        "image_start_token_id": 62,
        "image_end_token_id": 63,
        "experts_implementation": "batched_mm",
    },
    # Layers read latents and choices of others, and rotary positions or none.
    "mistral_large4": {
        "text_config": {
            **SHAPE,
            **PICKING,
            **BY_MODEL_TYPE["mistral_large4_text"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "vision_config": {**VISION, **LAYERS, "model_type": "pixtral", "head_dim": 8},
        "image_token_id": IMAGE,
        "experts_implementation": "batched_mm",
    },
    # Prompts see both sides, images and text of them, also beyond a window.
    "paligemma": {
        "text_config": {
            **NARROW,
            "model_type": "gemma2",
            "query_pre_attn_scalar": 16,
            "use_bidirectional_attention": False,
        },
        "vision_config": {
            **VISION,
            **LAYERS,
            "patch_size": 32,
            "model_type": "siglip_vision_model",
            "projection_dim": 32,
            "vision_use_head": False,
        },
        "image_token_index": IMAGE,
        "projection_dim": 32,
    },
    "mistral3": {
        "text_config": {**SHAPE, "model_type": "mistral", "sliding_window": 7},
        "vision_config": {**VISION, **LAYERS, "model_type": "pixtral", "head_dim": 8},
        "image_token_id": IMAGE,
        "spatial_merge_size": 2,
    },
}

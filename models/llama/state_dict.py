"""Names and settings of Hugging Face's Llama, Qwen2 and Qwen3 checkpoints, both ways.

A checkpoint in one file is read as below; for larger ones, the HuggingFaceStorageReader and
Writer of torch.distributed.checkpoint take the same names.

    weights = safetensors.torch.load_file(folder / "model.safetensors")
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    model = Llama(config)
    model.load_state_dict(from_hf(weights, config))

Tensors are the same on both sides: the channels of a rotary pair are half a head apart in both.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dtcp.models.known_settings import check_known_settings
from dtcp.models.llama.config import LlamaConfig
from dtcp.models.names import NameMap
from dtcp.models.rope import Llama3Scaling

NAMES = NameMap(
    (
        ("embedding.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("layers.{i}.attention_norm.weight", "model.layers.{i}.input_layernorm.weight"),
        ("layers.{i}.feed_forward_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
        *(
            (f"layers.{{i}}.attention.{part}", f"model.layers.{{i}}.self_attn.{part}")
            for part in (
                "q_proj.weight",
                "k_proj.weight",
                "v_proj.weight",
                "o_proj.weight",
                "q_proj.bias",
                "k_proj.bias",
                "v_proj.bias",
                "q_norm.weight",
                "k_norm.weight",
            )
        ),
        *(
            (
                f"layers.{{i}}.feed_forward.{part}.weight",
                f"model.layers.{{i}}.mlp.{part}_proj.weight",
            )
            for part in ("gate", "up", "down")
        ),
    )
)

TIED = "lm_head.weight"
"""The name that a checkpoint with a tied head leaves out."""


def to_hf(state_dict: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Rename our state dict for Hugging Face; a tied head is left out, as in their files."""
    kept = {name: x for name, x in state_dict.items() if not (config.tied and name == TIED)}
    return NAMES.to_theirs(kept)


def from_hf(state_dict: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Rename a Hugging Face state dict for our model; a tied head is added.

    Raises:
        ValueError: a name that no model of this family has.
    """
    # Checkpoints of 2023 carry the rotary frequencies, which follow from the config.
    weights = {
        name: x for name, x in state_dict.items() if not name.endswith("rotary_emb.inv_freq")
    }
    ours = NAMES.to_ours(weights)
    if config.tied and "embedding.weight" in ours:
        ours[TIED] = ours["embedding.weight"]
    return ours


def config_from_hf(config: Mapping[str, Any]) -> LlamaConfig:
    """Read the settings of a Hugging Face `config.json` (Llama, Qwen2 or Qwen3).

    Raises:
        ValueError: a setting that our model does not have.
    """
    kind = config["model_type"]
    _refuse_foreign(config)
    heads = config["num_attention_heads"]
    rope = _rope_settings(config)
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope_theta=rope["rope_theta"],
        rope_scaling=_scaling(rope),
        norm_eps=config["rms_norm_eps"],
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tied=config.get("tie_word_embeddings", False),
    )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """Write the `config.json` that goes with the weights: Llama, Qwen2 or Qwen3 by its parts."""
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    settings = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
    }
    scaling = config.rope_scaling
    if scaling is not None:
        settings["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original_seq_len,
        }
    return settings


def _rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings in one mapping, as transformers 5 has them; 4 has two fields."""
    old = {"rope_theta": config.get("rope_theta", 10_000.0), **(config.get("rope_scaling") or {})}
    return dict(config.get("rope_parameters") or old)


def _scaling(rope: Mapping[str, Any]) -> Llama3Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f"Llama scales rotary positions in the llama3 way or not at all, got "
            f"rope_type={kind}: take a checkpoint without it, or add the rule to models/rope.py."
        )
    return Llama3Scaling(
        factor=rope["factor"],
        low=rope["low_freq_factor"],
        high=rope["high_freq_factor"],
        original_seq_len=rope["original_max_position_embeddings"],
    )


def _refuse_foreign(config: Mapping[str, Any]) -> None:
    """Refuse what would load but compute something else."""
    known = {
        "model_type": ("llama", "qwen2", "qwen3"),
        "hidden_act": ("silu",),
        "mlp_bias": (False,),
        "attention_dropout": (0.0, None),
        "use_sliding_window": (False,),
    }
    if config["model_type"] != "qwen2":
        known["attention_bias"] = (False,)
    check_known_settings("Llama", config, known)

"""Names and settings of Hugging Face's Gemma 4 checkpoints, both ways.

Text checkpoints name their layers `model.layers`, those with a vision tower beside the decoder
`model.language_model.layers`: both are read, and what belongs to a tower is left out. They keep
experts in two tensors, gate and up in one; here gate, up and down are three.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dtcp.models.gemma4.config import Gemma4Config, HeadShape, LayerType, MoEConfig, layer_pattern
from dtcp.models.known_settings import check_known_settings
from dtcp.models.names import NameMap

LAYER = "layers.{i}"
THEIRS = "model.layers.{i}"


def _weights(*pairs: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((f"{LAYER}.{a}.weight", f"{THEIRS}.{b}.weight") for a, b in pairs)


NAMES = NameMap(
    (
        ("embedding.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("per_layer.tokens.weight", "model.embed_tokens_per_layer.weight"),
        ("per_layer.proj.weight", "model.per_layer_model_projection.weight"),
        ("per_layer.norm.weight", "model.per_layer_projection_norm.weight"),
        (f"{LAYER}.layer_scalar", f"{THEIRS}.layer_scalar"),
        (f"{LAYER}.moe.router.scale.weight", f"{THEIRS}.router.scale"),
        (
            f"{LAYER}.moe.router.per_expert_scale.weight",
            f"{THEIRS}.router.per_expert_scale",
        ),
        (f"{LAYER}.moe.experts.down", f"{THEIRS}.experts.down_proj"),
        *_weights(
            *((f"attention.{part}_proj", f"self_attn.{part}_proj") for part in "qkvo"),
            *((f"attention.{part}_norm", f"self_attn.{part}_norm") for part in "qk"),
            *((f"feed_forward.{part}", f"mlp.{part}_proj") for part in ("gate", "up", "down")),
            ("attention_norm", "input_layernorm"),
            ("attention_post_norm", "post_attention_layernorm"),
            ("feed_forward_norm", "pre_feedforward_layernorm"),
            ("feed_forward_post_norm", "post_feedforward_layernorm"),
            ("moe.router.proj", "router.proj"),
            ("moe.dense_norm", "post_feedforward_layernorm_1"),
            ("moe.post_norm", "post_feedforward_layernorm_2"),
            ("moe.pre_norm", "pre_feedforward_layernorm_2"),
            ("per_layer.gate", "per_layer_input_gate"),
            ("per_layer.proj", "per_layer_projection"),
            ("per_layer.norm", "post_per_layer_input_norm"),
        ),
    )
)

TIED = "lm_head.weight"
"""The name that a checkpoint with a tied head leaves out."""

TOWERS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")
KV_WEIGHT = re.compile(r"model\.layers\.(\d+)\.self_attn\.[kv]_(proj|norm)\.weight")
GATE = re.compile(r"(layers\.\d+\.moe\.experts)\.gate")
GATE_UP = re.compile(r"model\.(layers\.\d+)\.experts\.gate_up_proj")


def to_hf(state_dict: Mapping[str, Tensor], config: Gemma4Config) -> dict[str, Tensor]:
    """Our state dict under the names of Hugging Face's text model."""
    theirs: dict[str, Tensor] = {}
    for name, x in state_dict.items():
        if config.tied and name == TIED:
            continue
        if experts := GATE.fullmatch(name):
            up = state_dict[f"{experts[1]}.up"]
            layer = experts[1].removesuffix(".moe.experts")
            theirs[f"model.{layer}.experts.gate_up_proj"] = torch.cat((x, up), dim=1)
        elif not name.endswith(".moe.experts.up"):
            theirs[NAMES.theirs(name)] = x
    return theirs


def from_hf(state_dict: Mapping[str, Tensor], config: Gemma4Config) -> dict[str, Tensor]:
    """A Hugging Face state dict, of a text model or one with towers, under our names.

    Projections to keys and values are left out for layers that read another's: checkpoints have
    them, and no model reads them.

    Raises:
        ValueError: a name that no model of this family has.
    """
    ours: dict[str, Tensor] = {}
    for full_name, x in state_dict.items():
        name = full_name.replace("model.language_model.", "model.", 1)
        kv = KV_WEIGHT.fullmatch(name)
        is_unread = kv is not None and config.reads_shared_kv(int(kv[1]))
        if is_unread or name.removeprefix("model.").startswith(TOWERS):
            continue
        if layer := GATE_UP.fullmatch(name):
            gate, up = x.chunk(2, dim=1)
            ours[f"{layer[1]}.moe.experts.gate"] = gate.contiguous()
            ours[f"{layer[1]}.moe.experts.up"] = up.contiguous()
        elif not (config.tied and name == TIED):
            ours[NAMES.ours(name)] = x
    if config.tied and "embedding.weight" in ours:
        ours[TIED] = ours["embedding.weight"]
    return ours


def config_from_hf(config: Mapping[str, Any]) -> Gemma4Config:
    """Read a Hugging Face `config.json`, of a text model or of one with towers.

    Raises:
        ValueError: a setting that our model does not have.
    """
    text = config.get("text_config") or config
    _refuse_foreign(text)
    layer_types = _layer_types(text)
    rope = text.get("rope_parameters") or _ROPE
    heads = {kind: _head_shape(text, layer_types, kind, rope) for kind in LayerType}
    per_layer_dim = text.get("hidden_size_per_layer_input") or 0
    return Gemma4Config(
        vocab_size=text["vocab_size"],
        dim=text["hidden_size"],
        hidden_dim=text["intermediate_size"],
        num_heads=text["num_attention_heads"],
        layer_types=layer_types,
        window=text["sliding_window"],
        sliding_heads=heads[LayerType.SLIDING],
        global_heads=heads[LayerType.GLOBAL],
        keys_from_values=text.get("attention_k_eq_v", False),
        num_shared_layers=text.get("num_kv_shared_layers", 0),
        double_wide=text.get("use_double_wide_mlp", False),
        per_layer_dim=per_layer_dim,
        per_layer_vocab_size=text.get("vocab_size_per_layer_input", 0) if per_layer_dim else 0,
        moe=_moe(text),
        softcap=text.get("final_logit_softcapping") or 0.0,
        vision_blocks=text.get("use_bidirectional_attention") == "vision",
        norm_eps=text.get("rms_norm_eps", 1e-6),
        pad_id=text.get("pad_token_id", 0),
        tied=text.get("tie_word_embeddings", True),
    )


def config_to_hf(config: Gemma4Config) -> dict[str, Any]:
    """The `config.json` of Hugging Face's text model."""
    moe = config.moe
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.sliding_heads.num_kv_heads,
        "head_dim": config.sliding_heads.head_dim,
        "per_layer_config": {
            str(i): {
                "head_dim": config.global_heads.head_dim,
                "num_key_value_heads": config.global_heads.num_kv_heads,
            }
            for i, kind in enumerate(config.layer_types)
            if kind is LayerType.GLOBAL
        },
        "layer_types": [kind.value for kind in config.layer_types],
        "sliding_window": config.window,
        "rope_parameters": {
            LayerType.SLIDING.value: _rope_to_hf(config.sliding_heads),
            LayerType.GLOBAL.value: _rope_to_hf(config.global_heads),
        },
        "attention_k_eq_v": config.keys_from_values,
        "num_kv_shared_layers": config.num_shared_layers,
        "use_double_wide_mlp": config.double_wide,
        "hidden_size_per_layer_input": config.per_layer_dim,
        "vocab_size_per_layer_input": config.per_layer_vocab_size or config.vocab_size,
        "enable_moe_block": moe is not None,
        "num_experts": moe.num_experts if moe else None,
        "top_k_experts": moe.top_k if moe else None,
        "moe_intermediate_size": moe.hidden_dim if moe else None,
        "final_logit_softcapping": config.softcap or None,
        "use_bidirectional_attention": "vision" if config.vision_blocks else None,
        "rms_norm_eps": config.norm_eps,
        "pad_token_id": config.pad_id,
        "tie_word_embeddings": config.tied,
        "hidden_activation": "gelu_pytorch_tanh",
    }


_ROPE: Mapping[str, Any] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
    },
}


def _layer_types(text: Mapping[str, Any]) -> tuple[LayerType, ...]:
    names = text.get("layer_types")
    if names is None:
        return layer_pattern("sssssg", text["num_hidden_layers"])
    return tuple(LayerType(name) for name in names)


def _head_shape(
    text: Mapping[str, Any],
    layer_types: tuple[LayerType, ...],
    kind: LayerType,
    rope: Mapping[str, Any],
) -> HeadShape:
    """Heads of one layer type; published files have fields for it, saved ones settings by layer."""
    shape = {name: text[name] for name in ("head_dim", "num_key_value_heads")}
    by_layer = text.get("per_layer_config")
    if by_layer is not None:
        own = {str(i): dict(settings) for i, settings in by_layer.items()}
        of_kind = [own.get(str(i), {}) for i, each in enumerate(layer_types) if each is kind]
        if any(settings != of_kind[0] for settings in of_kind):
            raise ValueError(
                f"Gemma4 has one head shape for each type of layer, got per_layer_config="
                f"{by_layer}: this checkpoint needs a model of its own."
            )
        shape |= of_kind[0] if of_kind else {}
    elif kind is LayerType.GLOBAL:
        shape["head_dim"] = text.get("global_head_dim", 512)
        if text.get("attention_k_eq_v") and text.get("num_global_key_value_heads"):
            shape["num_key_value_heads"] = text["num_global_key_value_heads"]
    own_rope = rope[kind.value]
    known = ("default", "proportional")
    if own_rope.get("rope_type", "default") not in known or own_rope.get("factor", 1.0) != 1.0:
        raise ValueError(
            f"Gemma4 rotates heads in the ways {known} and unscaled, got rope_parameters="
            f"{own_rope}: take a checkpoint without it, or add the rule to models/gemma4/rope.py."
        )
    is_proportional = own_rope.get("rope_type") == "proportional"
    return HeadShape(
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=own_rope["rope_theta"],
        rotated=own_rope.get("partial_rotary_factor", 1.0) if is_proportional else 1.0,
    )


def _rope_to_hf(shape: HeadShape) -> dict[str, Any]:
    if shape.rotated == 1.0:
        return {"rope_type": "default", "rope_theta": shape.rope_theta}
    return {
        "rope_type": "proportional",
        "rope_theta": shape.rope_theta,
        "partial_rotary_factor": shape.rotated,
    }


def _moe(text: Mapping[str, Any]) -> MoEConfig | None:
    if not text.get("enable_moe_block"):
        return None
    return MoEConfig(text["num_experts"], text["top_k_experts"], text["moe_intermediate_size"])


def _refuse_foreign(text: Mapping[str, Any]) -> None:
    """Refuse what would load but compute something else."""
    known = {
        "model_type": ("gemma4_text",),
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "attention_dropout": (0.0, 0, None),
        "use_bidirectional_attention": (None, "vision"),
    }
    check_known_settings("Gemma4", text, known)

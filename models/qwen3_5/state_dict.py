"""Names and settings of Hugging Face's Qwen3.5 checkpoints, both ways.

    weights = safetensors.torch.load_file(folder / "model.safetensors")
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    model = Qwen35(config)
    model.load_state_dict(from_hf(weights, config))

Their checkpoints hold queries, keys and values of a delta layer in one weight. They hold the gate
and up projections of all experts in one weight, or each expert's alone: both forms are read. The
vision tower of a checkpoint is left out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtcp.models.known_settings import check_known_settings
from dtcp.models.names import NameMap
from dtcp.models.qwen3_5.config import DeltaNetConfig, MoEConfig, Qwen35Config

_DELTA: Mapping[str, str] = {
    "z_proj.weight": "in_proj_z.weight",
    "a_proj.weight": "in_proj_a.weight",
    "b_proj.weight": "in_proj_b.weight",
    "log_rate.weight": "A_log",
    "step_bias.weight": "dt_bias",
    "norm.weight": "norm.weight",
    "o_proj.weight": "out_proj.weight",
}
_FEED_FORWARD: Mapping[str, str] = {
    **{f"{part}.weight": f"{part}_proj.weight" for part in ("gate", "up", "down")},
    **{f"shared.{p}.weight": f"shared_expert.{p}_proj.weight" for p in ("gate", "up", "down")},
    "router.weight": "gate.weight",
    "shared_gate.weight": "shared_expert_gate.weight",
    "experts.down": "experts.down_proj",
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


def _block_pairs(ours: str, theirs: str) -> list[tuple[str, str]]:
    inside = {
        "mixer_norm.weight": "input_layernorm.weight",
        "feed_forward_norm.weight": "post_attention_layernorm.weight",
        **{f"delta.{a}": f"linear_attn.{b}" for a, b in _DELTA.items()},
        **{f"attention.{a}.weight": f"self_attn.{a}.weight" for a in _ATTENTION},
        **{f"feed_forward.{a}": f"mlp.{b}" for a, b in _FEED_FORWARD.items()},
    }
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in inside.items()]


NAMES = NameMap(
    (
        ("embedding.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        *_block_pairs("layers.{i}", "model.layers.{i}"),
        ("ahead.embedding_norm.weight", "mtp.pre_fc_norm_embedding.weight"),
        ("ahead.hidden_norm.weight", "mtp.pre_fc_norm_hidden.weight"),
        ("ahead.join.weight", "mtp.fc.weight"),
        ("ahead.norm.weight", "mtp.norm.weight"),
        *_block_pairs("ahead.layers.{i}", "mtp.layers.{i}"),
    )
)
"""Names of weights that are the same tensor on both sides."""

TIED = "lm_head.weight"
"""The name that a checkpoint with a tied head leaves out."""


@dataclass(frozen=True)
class FusedWeight:
    """Weights of a block of ours that are one weight of theirs."""

    ours: tuple[str, ...]
    theirs: str

    def fuse(self, parts: list[Tensor]) -> Tensor:
        if self.theirs == EXPERTS:
            return torch.cat(parts, dim=1)
        fused = torch.cat(parts)
        return fused[:, None] if self.theirs == TAPS else fused

    def split(self, x: Tensor, config: Qwen35Config) -> tuple[Tensor, ...]:
        if self.theirs == EXPERTS:
            return x.chunk(2, dim=1)
        shape = config.delta
        keys, values = shape.key_heads * shape.key_dim, shape.value_heads * shape.value_dim
        return (x[:, 0] if self.theirs == TAPS else x).split((keys, keys, values))


EXPERTS, TAPS = "mlp.experts.gate_up_proj", "linear_attn.conv1d.weight"
_QKV = ("q", "k", "v")
FUSED = (
    FusedWeight(tuple(f"delta.{x}_proj.weight" for x in _QKV), "linear_attn.in_proj_qkv.weight"),
    FusedWeight(tuple(f"delta.{x}_taps.weight" for x in _QKV), TAPS),
    FusedWeight(("feed_forward.experts.gate", "feed_forward.experts.up"), EXPERTS),
)
_BLOCKS = (("ahead.layers.", "mtp.layers."), ("layers.", "model.layers."))
_ONE_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def to_hf(
    state_dict: Mapping[str, Tensor], config: Qwen35Config, *, per_expert: bool = False
) -> dict[str, Tensor]:
    """Our state dict under Hugging Face's names; a tied head is left out, as in their files.

    Args:
        per_expert: write one weight per expert, rather than one for all.
    """
    ours = {name: x for name, x in state_dict.items() if not (config.tied and name == TIED)}
    theirs: dict[str, Tensor] = {}
    for name in list(ours):
        fused = next((each for each in FUSED if name.endswith(each.ours[0])), None)
        if fused is not None:
            block = name.removesuffix(fused.ours[0])
            weight = fused.fuse([ours.pop(block + part) for part in fused.ours])
            theirs[_renamed(block, _BLOCKS) + fused.theirs] = weight
    theirs |= NAMES.to_theirs(ours)
    return _unstack_experts(theirs) if per_expert else theirs


def from_hf(state_dict: Mapping[str, Tensor], config: Qwen35Config) -> dict[str, Tensor]:
    """A Hugging Face state dict under our names; a tied head is added.

    Raises:
        ValueError: a name that no model of this family has.
    """
    theirs = _stack_experts(
        {
            name.replace("model.language_model.", "model."): x
            for name, x in state_dict.items()
            if not name.startswith("model.visual.")
        }
    )
    ours: dict[str, Tensor] = {}
    for name, x in theirs.items():
        if name.startswith("mtp.") and not config.num_mtp_layers:
            continue
        fused = next((each for each in FUSED if name.endswith(f".{each.theirs}")), None)
        if fused is None:
            ours[NAMES.ours(name)] = x
        else:
            to_ours = tuple((theirs, ours) for ours, theirs in _BLOCKS)
            block = _renamed(name.removesuffix(fused.theirs), to_ours)
            parts = zip(fused.ours, fused.split(x, config), strict=True)
            ours |= {block + part: weight for part, weight in parts}
    if config.tied and "embedding.weight" in ours:
        ours[TIED] = ours["embedding.weight"]
    return ours


def config_from_hf(config: Mapping[str, Any]) -> Qwen35Config:
    """Read the settings of a Hugging Face `config.json`, dense or with experts.

    Raises:
        ValueError: a setting that our model does not have.
    """
    config = config.get("text_config", config)
    _refuse_foreign(config)
    rope = config["rope_parameters"]
    layer_types = config.get("layer_types")
    every = config.get("full_attention_interval") or (
        layer_types.index("full_attention") + 1 if layer_types else 4
    )
    ours = Qwen35Config(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        feed_forward=_feed_forward(config),
        head_dim=config["head_dim"],
        delta=DeltaNetConfig(
            key_heads=config["linear_num_key_heads"],
            value_heads=config["linear_num_value_heads"],
            key_dim=config["linear_key_head_dim"],
            value_dim=config["linear_value_head_dim"],
            conv_width=config["linear_conv_kernel_dim"],
        ),
        full_attention_every=every,
        rotary_dim=int(config["head_dim"] * rope.get("partial_rotary_factor", 0.25)),
        rope_theta=rope["rope_theta"],
        rope_sections=tuple(rope.get("mrope_section", (11, 11, 10))),
        norm_eps=config["rms_norm_eps"],
        num_mtp_layers=config.get("mtp_num_hidden_layers", 0),
        tied=config.get("tie_word_embeddings", False),
    )
    if layer_types is not None and list(layer_types) != _layer_types(ours):
        raise ValueError(
            f"Every n-th layer of Qwen3.5 attends, got layer_types={layer_types}: this checkpoint "
            f"needs a model of its own."
        )
    return ours


def config_to_hf(config: Qwen35Config) -> dict[str, Any]:
    """Write the `config.json` that goes with the weights."""
    delta, feed_forward = config.delta, config.feed_forward
    dense = isinstance(feed_forward, int)
    settings: dict[str, Any] = {
        "architectures": [f"Qwen3_5{'' if dense else 'Moe'}ForCausalLM"],
        "model_type": "qwen3_5_text" if dense else "qwen3_5_moe_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "layer_types": _layer_types(config),
        "linear_num_key_heads": delta.key_heads,
        "linear_num_value_heads": delta.value_heads,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_conv_kernel_dim": delta.conv_width,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": config.rotary_dim / config.head_dim,
            "mrope_section": list(config.rope_sections),
            "mrope_interleaved": True,
        },
        "rms_norm_eps": config.norm_eps,
        "mtp_num_hidden_layers": config.num_mtp_layers,
        "tie_word_embeddings": config.tied,
    }
    if isinstance(feed_forward, int):
        return {**settings, "intermediate_size": feed_forward}
    return {
        **settings,
        "num_experts": feed_forward.num_experts,
        "num_experts_per_tok": feed_forward.top_k,
        "moe_intermediate_size": feed_forward.hidden_dim,
        "shared_expert_intermediate_size": feed_forward.shared_hidden_dim,
    }


def _feed_forward(config: Mapping[str, Any]) -> int | MoEConfig:
    if config["model_type"] == "qwen3_5_text":
        return int(config["intermediate_size"])
    return MoEConfig(
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        hidden_dim=config["moe_intermediate_size"],
        shared_hidden_dim=config["shared_expert_intermediate_size"],
    )


def _layer_types(config: Qwen35Config) -> list[str]:
    names = ("linear_attention", "full_attention")
    return [names[config.attends(layer)] for layer in range(config.num_layers)]


def _refuse_foreign(config: Mapping[str, Any]) -> None:
    """Refuse what would load but compute something else."""
    rope = config.get("rope_parameters", {})
    known = {
        "model_type": ("qwen3_5_text", "qwen3_5_moe_text"),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "attention_dropout": (0.0, None),
        "rope_type": ("default",),
    }
    settings = {**config, "rope_type": rope.get("rope_type", "default")}
    check_known_settings("Qwen3.5", settings, known)


def _renamed(block: str, pairs: tuple[tuple[str, str], ...]) -> str:
    ours, theirs = next(pair for pair in pairs if block.startswith(pair[0]))
    return theirs + block.removeprefix(ours)


def _stack_experts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with one tensor for all experts of a layer, where they had one per expert.

    Raises:
        ValueError: an expert, or a part of it, that is missing.
    """
    stacked: dict[str, Tensor] = {}
    experts: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, x in weights.items():
        match = _ONE_EXPERT.fullmatch(name)
        if match is None:
            stacked[name] = x
        else:
            experts.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = x
    for stem, parts in experts.items():
        numbers = {part: sorted(parts.get(part, ())) for part in ("gate", "up", "down")}
        if any(each != list(range(len(numbers["gate"]))) for each in numbers.values()):
            raise ValueError(
                f"Experts are stacked where all are there, got {stem} with {numbers}: merge the "
                f"files of the checkpoint first."
            )
        gate, up, down = (
            torch.stack([parts[part][number] for number in each]) for part, each in numbers.items()
        )
        stacked[f"{stem}.gate_up_proj"] = torch.cat((gate, up), dim=1)
        stacked[f"{stem}.down_proj"] = down
    return stacked


def _unstack_experts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with one tensor per expert, where they had one for all of a layer."""
    unstacked: dict[str, Tensor] = {}
    for name, x in weights.items():
        if name.endswith(".experts.gate_up_proj"):
            stem = name.removesuffix(".gate_up_proj")
            for expert, (gate, up) in enumerate(zip(*x.chunk(2, dim=1), strict=True)):
                unstacked[f"{stem}.{expert}.gate_proj.weight"] = gate
                unstacked[f"{stem}.{expert}.up_proj.weight"] = up
        elif name.endswith(".experts.down_proj"):
            stem = name.removesuffix(".down_proj")
            unstacked |= {f"{stem}.{i}.down_proj.weight": down for i, down in enumerate(x)}
        else:
            unstacked[name] = x
    return unstacked

"""Names and settings of DeepSeek-V4's published checkpoints, both ways.

Three sets of names are read: those on disk, as DeepSeek publishes them and transformers loads
them, those of a transformers model in memory, and those that its save_pretrained writes, a mixture
of both. The first are written. On disk each expert has tensors of its own; here all experts of a
layer share one tensor per projection.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtcp.models.deepseek_v4.config import WINDOW, DeepseekV4Config
from dtcp.models.deepseek_v4.rope import Yarn
from dtcp.models.known_settings import check_known_settings
from dtcp.models.names import NameMap

_ATTENTION = (
    ("q_a_proj.weight", "wq_a.weight", "q_a_proj.weight"),
    ("q_norm.weight", "q_norm.weight", "q_a_norm.weight"),
    ("q_b_proj.weight", "wq_b.weight", "q_b_proj.weight"),
    ("kv_proj.weight", "wkv.weight", "kv_proj.weight"),
    ("kv_norm.weight", "kv_norm.weight", "kv_norm.weight"),
    ("o_a_proj.weight", "wo_a.weight", "o_a_proj.weight"),
    ("o_b_proj.weight", "wo_b.weight", "o_b_proj.weight"),
    ("sink.weight", "attn_sink", "sinks"),
    ("indexer.q_proj.weight", "indexer.wq_b.weight", "compressor.indexer.q_b_proj.weight"),
    (
        "indexer.weight_proj.weight",
        "indexer.weights_proj.weight",
        "compressor.indexer.scorer.weights_proj.weight",
    ),
    *(
        (f"{ours}.{a}", f"{disk}.{b}", f"{memory}.{c}")
        for ours, disk, memory in (
            ("compressor", "compressor", "compressor"),
            ("indexer.compressor", "indexer.compressor", "compressor.indexer"),
        )
        for a, b, c in (
            ("kv_proj.weight", "wkv.weight", "kv_proj.weight"),
            ("gate_proj.weight", "wgate.weight", "gate_proj.weight"),
            ("place.weight", "ape", "position_bias"),
            ("norm.weight", "norm.weight", "kv_norm.weight"),
        )
    ),
)
_BLOCK = (
    ("attention_norm.weight", "attn_norm.weight", "input_layernorm.weight"),
    ("mixture_norm.weight", "ffn_norm.weight", "post_attention_layernorm.weight"),
    *((f"attention.{a}", f"attn.{b}", f"self_attn.{c}") for a, b, c in _ATTENTION),
    *(
        (f"{ours}.{part}", f"hc_{disk}_{part}", f"{disk}_hc.{part}")
        for ours, disk in (("attention_streams", "attn"), ("mixture_streams", "ffn"))
        for part in ("fn", "base", "scale")
    ),
    ("mixture.router.weight", "ffn.gate.weight", "mlp.gate.weight"),
    ("mixture.router.bias", "ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    ("mixture.router.experts", "ffn.gate.tid2eid", "mlp.gate.tid2eid"),
    *(
        (
            f"mixture.shared.{ours}.weight",
            f"ffn.shared_experts.{disk}.weight",
            f"mlp.shared_experts.{ours}_proj.weight",
        )
        for ours, disk in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    ),
    *((f"mixture.experts.{part}",) * 3 for part in ("gate", "up", "down")),
)
_HEAD = (
    ("norm.weight", "norm.weight", "norm.weight"),
    *(
        (f"head.{part}", f"hc_head_{part}", f"hc_head.hc_{part}")
        for part in ("fn", "base", "scale")
    ),
)
_TOP = (
    ("embedding.weight", "embed.weight", "model.embed_tokens.weight"),
    ("lm_head.weight", "head.weight", "lm_head.weight"),
    *((ours, disk, f"model.{memory}") for ours, disk, memory in _HEAD),
    *(
        (f"layers.{{i}}.{ours}", f"layers.{{i}}.{disk}", f"model.layers.{{i}}.{memory}")
        for ours, disk, memory in _BLOCK
    ),
)
_MTP = (
    ("token_norm.weight", "enorm.weight"),
    ("token_proj.weight", "e_proj.weight"),
    ("stream_norm.weight", "hnorm.weight"),
    ("stream_proj.weight", "h_proj.weight"),
    *((ours, disk) for ours, disk, _ in _HEAD),
    *((f"block.{ours}", disk) for ours, disk, _ in _BLOCK),
)
ON_DISK = NameMap(
    (
        *((ours, disk) for ours, disk, _ in _TOP),
        *((f"mtp.{{i}}.{ours}", f"mtp.{{i}}.{disk}") for ours, disk in _MTP),
    )
)
IN_MEMORY = NameMap(tuple((ours, memory) for ours, _, memory in _TOP))
SAVED = NameMap(
    (
        ("lm_head.weight", "head.weight"),
        # transformers (5.23) has one rule for this norm and for those of the compressors.
        ("layers.{i}.attention.kv_norm.weight", "model.layers.{i}.attn.norm.weight"),
        *((f"layers.{{i}}.{ours}", f"model.layers.{{i}}.{disk}") for ours, disk, _ in _BLOCK),
    )
)
"""What save_pretrained of transformers writes where it differs from both."""
_READ = NameMap((*ON_DISK.pairs, *IN_MEMORY.pairs, *SAVED.pairs))

_PROJECTIONS: Mapping[str, str] = {"gate": "w1", "up": "w3", "down": "w2"}
_STACKED = re.compile(r"(?P<block>.*)\.mixture\.experts\.(?P<part>gate|up|down)")
_SINGLE = re.compile(r"(?P<block>.*)\.ffn\.experts\.(?P<number>\d+)\.(?P<part>w[123])\.weight")
_PACKED = re.compile(r"(?P<block>.*)\.mlp\.experts\.(?P<part>gate_up|down)_proj")


def to_hf(state_dict: Mapping[str, Tensor], config: DeepseekV4Config) -> dict[str, Tensor]:
    """Our state dict under the published names, with tensors of its own for each expert."""
    out: dict[str, Tensor] = {}
    for name, x in state_dict.items():
        experts = _STACKED.fullmatch(name)
        if experts is None:
            # The published table of experts by token is int32.
            out[ON_DISK.theirs(name)] = x.int() if name.endswith(".router.experts") else x
            continue
        block = experts["block"].replace(".block", "")
        whole = x.full_tensor() if isinstance(x, DTensor) else x
        for number, expert in enumerate(whole.unbind(0)):
            part = _PROJECTIONS[experts["part"]]
            out[f"{block}.ffn.experts.{number}.{part}.weight"] = expert.contiguous()
    return out


def from_hf(state_dict: Mapping[str, Tensor], config: DeepseekV4Config) -> dict[str, Tensor]:
    """A published state dict, or one of transformers' model or of its files, for our model.

    Raises:
        ValueError: a name that no model of this family has, or quantized weights.
    """
    scaled = [name for name in state_dict if name.endswith((".scale", ".scale_inv"))]
    if any(not re.search(r"hc_\w+_scale|hc\.\w*scale", name) for name in scaled):
        raise ValueError(
            f"DeepseekV4 reads weights as they are, got quantized ones with {scaled[0]}: "
            f"dequantize the checkpoint first."
        )
    plain, experts = _without_experts(state_dict)
    ours = _READ.to_ours(plain)
    for name in [name for name in ours if name.endswith(".router.experts")]:
        ours[name] = ours[name].long()
    return {**ours, **experts}


def _without_experts(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Their weights but the experts, under their names; and the experts, stacked, under ours."""
    plain: dict[str, Tensor] = {}
    stacked: dict[str, Tensor] = {}
    single: dict[str, dict[int, Tensor]] = {}
    parts = {theirs: ours for ours, theirs in _PROJECTIONS.items()}
    for name, x in state_dict.items():
        if match := _SINGLE.fullmatch(name):
            block = match["block"].removeprefix("model.")
            block = re.sub(r"^(mtp\.\d+)", r"\1.block", block)
            numbered = single.setdefault(f"{block}.mixture.experts.{parts[match['part']]}", {})
            numbered[int(match["number"])] = x
        elif match := _PACKED.fullmatch(name):
            block = f"{match['block'].removeprefix('model.')}.mixture.experts"
            if match["part"] == "down":
                stacked[f"{block}.down"] = x
            else:
                gate, up = x.chunk(2, dim=1)
                stacked |= {f"{block}.gate": gate, f"{block}.up": up}
        else:
            plain[name] = x
    for name, numbered in single.items():
        stacked[name] = torch.stack([numbered[number] for number in sorted(numbered)])
    return plain, stacked


_SETTINGS: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "hidden_dim": "moe_intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "head_dim": "head_dim",
    "query_rank": "q_lora_rank",
    "output_groups": "o_groups",
    "output_rank": "o_lora_rank",
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "route_scale": "routed_scaling_factor",
    "index_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "num_selected": "index_topk",
    "window": "sliding_window",
    "streams": "hc_mult",
    "sinkhorn_steps": "hc_sinkhorn_iters",
    "stream_eps": "hc_eps",
    "norm_eps": "rms_norm_eps",
    "expert_limit": "swiglu_limit",
}
"""Our names of the settings that are the same there, and theirs."""


def config_from_hf(config: Mapping[str, Any]) -> DeepseekV4Config:
    """Read the settings of a Hugging Face `config.json`, of either generation of its fields.

    Raises:
        ValueError: a setting that our model does not have.
    """
    _refuse_foreign(config)
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    mtp = config.get("num_nextn_predict_layers", 0) if "compress_ratios" in config else 0
    sparse, ratios = _ratios(config, layers + mtp)
    main, compress = _rope_settings(config)
    rotary_factor = config.get("partial_rotary_factor") or 0.125
    return DeepseekV4Config(
        **{ours: config[theirs] for ours, theirs in _SETTINGS.items()},
        rope_dim=config.get("qk_rope_head_dim") or round(head_dim * rotary_factor),
        compress_ratios=ratios,
        num_mtp_layers=mtp,
        num_hash_layers=min(_num_hash_layers(config), layers),
        sparse_ratio=sparse,
        rope_theta=main["rope_theta"],
        compress_rope_theta=compress["rope_theta"],
        yarn=_yarn(compress),
    )


def config_to_hf(config: DeepseekV4Config) -> dict[str, Any]:
    """Write the `config.json` that goes with the weights."""
    compress: dict[str, Any] = {"rope_type": "default"}
    if config.yarn is not None:
        compress = {
            "rope_type": "yarn",
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_seq_len,
            "beta_fast": config.yarn.fast,
            "beta_slow": config.yarn.slow,
        }
    other = [r for r in config.compress_ratios if r not in (WINDOW, config.sparse_ratio)]
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        **{theirs: getattr(config, ours) for ours, theirs in _SETTINGS.items()},
        "num_nextn_predict_layers": config.num_mtp_layers,
        "num_key_value_heads": 1,
        "qk_rope_head_dim": config.rope_dim,
        "layer_types": [_kind(config, r) for r in config.compress_ratios[: config.num_layers]],
        "compress_rates": {
            "compressed_sparse_attention": config.sparse_ratio,
            "heavily_compressed_attention": other[0] if other else 128,
        },
        "compress_ratios": list(config.compress_ratios),
        "n_shared_experts": 1,
        "scoring_func": "sqrtsoftplus",
        "num_hash_layers": config.num_hash_layers,
        "rope_theta": config.rope_theta,
        "compress_rope_theta": config.compress_rope_theta,
        "rope_scaling": compress,
        "tie_word_embeddings": False,
    }


_KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")


def _kind(config: DeepseekV4Config, ratio: int) -> str:
    if ratio == WINDOW:
        return _KINDS[0]
    return _KINDS[1] if ratio == config.sparse_ratio else _KINDS[2]


def _num_hash_layers(config: Mapping[str, Any]) -> int:
    """How many layers, the first ones, look experts up by token."""
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return int(config.get("num_hash_layers", 3))
    count = int(kinds.count("hash_moe"))
    if kinds != ["hash_moe"] * count + ["moe"] * (len(kinds) - count):
        raise ValueError(
            f"DeepseekV4 looks experts up by token in its first layers only, got "
            f"mlp_layer_types={kinds}: this checkpoint needs a model of its own."
        )
    return count


def _ratios(config: Mapping[str, Any], layers: int) -> tuple[int, tuple[int, ...]]:
    """The ratio of layers with an indexer, and that of every layer."""
    rates = config.get("compress_rates") or {}
    by_kind = {_KINDS[0]: WINDOW, _KINDS[1]: rates.get(_KINDS[1], 4)}
    by_kind[_KINDS[2]] = rates.get(_KINDS[2], 128)
    ratios = config.get("compress_ratios")
    if ratios is None:
        ratios = [by_kind[kind] for kind in config["layer_types"]]
    return by_kind[_KINDS[1]], tuple(ratios[:layers])


def _rope_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rotary settings of window layers, and of layers that compress."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "main" in rope and "compress" in rope:
        return dict(rope["main"]), dict(rope["compress"])
    main = {"rope_theta": config.get("rope_theta", 10_000.0)}
    theta = config.get("compress_rope_theta", 160_000.0)
    return main, {**rope, "rope_theta": theta}


def _yarn(rope: Mapping[str, Any]) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn" or rope.get("attention_factor", 1.0) != 1.0:
        raise ValueError(
            f"DeepseekV4 scales rotary positions by YaRN without a factor on the scores, got "
            f"rope_type={kind}, attention_factor={rope.get('attention_factor')}: take a "
            f"checkpoint without it, or add the rule to models/deepseek_v4/rope.py."
        )
    return Yarn(
        original_seq_len=rope["original_max_position_embeddings"],
        factor=rope["factor"],
        fast=rope.get("beta_fast") or 32.0,
        slow=rope.get("beta_slow") or 1.0,
    )


def _refuse_foreign(config: Mapping[str, Any]) -> None:
    """Refuse what would load but compute something else."""
    known = {
        "model_type": ("deepseek_v4",),
        "hidden_act": ("silu",),
        "scoring_func": ("sqrtsoftplus",),
        "n_shared_experts": (1,),
        "num_key_value_heads": (1,),
        "norm_topk_prob": (True,),
        "attention_bias": (False,),
        "attention_dropout": (0.0, None),
        "mlp_bias": (False,),
        "tie_word_embeddings": (False,),
    }
    check_known_settings("DeepseekV4", config, known)

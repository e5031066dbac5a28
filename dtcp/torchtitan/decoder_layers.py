"""What the layers of a torchtitan decoder ask of their attention: read, or refused by name.

Every class of torchtitan 0.3.0's decoders that lets tokens meet is listed here with the fields of
its config. What is not listed (a layer of somebody else's, a field that a later release adds) is
refused before any rank starts: a window or a transform that nobody reads would be trained without.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from dtcp.torchtitan.attention import MixerAttention

from torchtitan.components.lora import LoRAConverter
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.module import Module

from dtcp.sequence.masks import Bidirectional, Causal, Mask, SlidingWindow

INSTEAD = (
    "write the model with dtcp's mixers (docs/add_a_model.md), and a config that returns "
    "dtcp.pretrain.trainer.Trainer.Config"
)

_MODULE = "param_init sharding_config"
_DECODER = f"{_MODULE} dim vocab_size lm_head tok_embeddings norm layers enable_weight_tying"
_BLOCK = f"{_MODULE} attention feed_forward moe attention_norm ffn_norm"
_GQA = f"{_MODULE} n_heads dim qkv_linear wo qk_norm n_kv_heads head_dim inner_attention rope"
_MLA = (
    f"{_MODULE} n_heads dim wq wq_a wq_b wkv_a wkv_b wo q_lora_rank kv_lora_rank q_norm kv_norm "
    f"qk_nope_head_dim qk_rope_head_dim v_head_dim rope inner_attention mscale"
)
_VISION = "vision_encoder"

MODELS: Mapping[str, str] = {
    "common.decoder.Decoder": _DECODER,
    "llama3.model.Llama3Model": _DECODER,
    "qwen3.model.Qwen3Model": _DECODER,
    "gpt_oss.model.GptOssModel": _DECODER,
    "deepseek_v3.model.DeepSeekV3Model": f"{_DECODER} mtp_layers",
    "kimi_k2_7.model.KimiK25Model": f"{_DECODER} mtp_layers {_VISION}",
    "muse_glimmer.model.MuseGlimmerModel": f"{_DECODER} {_VISION} vision_adapter "
    f"vision_projection perception_emb_norm",
}
"""Decoders by the name of their class under torchtitan.models, and the fields that are known."""

BLOCKS: Mapping[str, str] = {
    "llama3.model.Llama3TransformerBlock": _BLOCK,
    "qwen3.model.Qwen3TransformerBlock": _BLOCK,
    "gpt_oss.model.GptOssTransformerBlock": _BLOCK,
    "deepseek_v3.model.DeepSeekV3TransformerBlock": _BLOCK,
    "muse_glimmer.model.MuseGlimmerTransformerBlock": f"{_BLOCK} post_attention_norm post_ffn_norm",
}

ATTENTIONS: Mapping[str, str] = {
    "common.attention.GQAttention": _GQA,
    "gpt_oss.model.Attention": f"{_MODULE} n_heads n_kv_heads head_dim dim qkv_linear wo "
    f"inner_attention sliding_window_size rope",
    "deepseek_v3.model.Attention": _MLA,
    "muse_glimmer.model.Attention": f"{_GQA} use_rope scale_query_by o_gate window_size",
}

WINDOWS: Mapping[str, str] = {
    "gpt_oss.model.Attention": "sliding_window_size",
    "muse_glimmer.model.Attention": "window_size",
}
"""The field that holds a layer's window: how many tokens a query sees, itself among them."""

SINKS = "gpt_oss.model.Attention"

REFUSED_MODELS: Mapping[str, str] = {
    "qwen3_5.model.Qwen35Model": "its GatedDeltaNet layers run one device's kernels over whole "
    "rows: use dtcp's own Qwen3.5, as --config qwen3_5_tiny does",
}

REFUSED_PARTS: Mapping[str, str] = {
    "mtp_layers": "they shift tokens inside the model, which holds a shard of them: build the "
    "model with num_mtp_layers=0",
    **dict.fromkeys(
        (_VISION, "vision_adapter", "vision_projection", "perception_emb_norm"),
        "images are scattered into whole rows, which are sharded before: set it to None, which "
        "leaves the model for text",
    ),
}
"""Parts of a decoder that need whole rows; each is refused where a config has one."""

SPMD_TYPES_ONLY = ("muse_glimmer.model.MuseGlimmerModel",)
"""Decoders whose tensor parallelism torchtitan has under spmd_types alone."""

ADDS_IN_BFLOAT16 = "gpt_oss.model.GptOssModel"
"""Whose experts of 0.3.0 hand on bfloat16, to be added to tokens of that dtype alone."""

WRONG_UNDER_SPMD_TYPES: Mapping[str, str] = {
    "gpt_oss.model.GptOssModel": "torchtitan 0.3.0 adds the bias of experts there once for each "
    "rank of tp",  # its issue #4245
}
"""Decoders whose tensor parallelism is wrong there, and how."""


def with_mixers(spec: ModelSpec, *, per_token: Collection[type] = ()) -> Any:
    """The config of a decoder with a mixer for the inner attention of every layer.

    Args:
        per_token: classes of configs, not torchtitan's, whose modules treat every token alone.
    Raises:
        ValueError: the model, a layer or a field that is not read; named, with the reason.
    """
    model = spec.model
    if not isinstance(model, Decoder.Config):
        raise ValueError(
            f"Our attention goes into decoders of torchtitan, got the model {spec.name}, a "
            f"{_title(type(model))}: {INSTEAD}."
        )
    name = _known(model, MODELS, "model", refused=REFUSED_MODELS)
    for part, reason in REFUSED_PARTS.items():
        if getattr(model, part, None):
            raise ValueError(
                f"Decoders are adopted without {part}, got {spec.name} with it: {reason}."
            )
    layers = [_with_mixer(each, f"layers.{i}") for i, each in enumerate(model.layers)]
    if name == "gpt_oss.model.GptOssModel":
        _check_one_window(model)
    adopted = replace(model, layers=layers)
    for where, kind in foreign_modules(adopted).items():
        if kind not in per_token:
            raise ValueError(
                f"Beside its attention a layer treats every token alone, got {where} of "
                f"{_title(kind)}, which is not torchtitan's: where it does, say "
                f"adopt_model(spec, per_token=[{kind.__qualname__}])."
            )
    return adopted


def check_layers(spec: ModelSpec) -> None:
    """Refuse a decoder with a layer that was not adopted.

    Raises:
        ValueError: naming the layer and what it has for attention.
    """
    _known(spec.model, MODELS, "model", refused=REFUSED_MODELS)
    for index, layer in enumerate(spec.model.layers):
        _known(layer, BLOCKS, f"layers.{index}")
        _known(layer.attention, ATTENTIONS, f"layers.{index}.attention")
        inner = layer.attention.inner_attention
        if type(inner) is not MixerAttention.Config:
            raise ValueError(
                f"Every layer's attention is dtcp's, got layers.{index} of {spec.name} with "
                f"{_title(type(inner))}: pass the spec through dtcp.pretrain.adopt.adopt_model."
            )


def _with_mixer(layer: Any, where: str) -> Any:
    """The config of a layer with a mixer for its inner attention."""
    _known(layer, BLOCKS, where)
    attention = layer.attention
    if attention is None:
        raise ValueError(f"A layer to adopt has attention, got {where} with none: {INSTEAD}.")
    name = _known(attention, ATTENTIONS, f"{where}.attention")
    inner = attention.inner_attention
    if not isinstance(inner, MixerAttention.Config):
        mask = _mask(attention, name, f"{where}.attention")
        inner = MixerAttention.Config(mask=mask, sinks=name == SINKS)
    return replace(layer, attention=replace(attention, inner_attention=inner))


def _mask(attention: Any, name: str, where: str) -> Mask:
    """What a layer's queries see, by its own field and by its kernel's."""
    window = getattr(attention, WINDOWS[name]) if name in WINDOWS else None
    inner = attention.inner_attention
    kind = _without_lora(type(inner))
    if kind is FlexAttention.Config:
        default = FlexAttention.Config()
        for option in ("block_size", "kernel_options"):
            if getattr(inner, option) != getattr(default, option):
                raise ValueError(
                    f"Kernels are dtcp's, got {where}.inner_attention.{option}="
                    f"{getattr(inner, option)} for FlexAttention's: build the model with "
                    f"attn_backend='flex'."
                )
        return Causal() if window is None else Causal() & SlidingWindow(window)
    if kind is not VarlenAttention.Config:
        raise ValueError(
            f"Inner attention that can be replaced is torchtitan's FlexAttention or "
            f"VarlenAttention, got {where}.inner_attention={_title(type(inner))}: {INSTEAD}."
        )
    expected = (-1, 0) if window is None else (window - 1, 0)
    if name in WINDOWS and tuple(inner.window_size) != expected:
        raise ValueError(
            f"A layer has one window, got {where}.{WINDOWS[name]}={window} and "
            f"{where}.inner_attention.window_size={inner.window_size}: give the kernel {expected}."
        )
    return _varlen_mask(inner.window_size, where)


def _varlen_mask(window_size: tuple[int, int], where: str) -> Mask:
    """The mask of flash attention's window: tokens left and right of a query, -1 for all."""
    left, right = window_size
    if left < 0:
        if right > 0:
            raise ValueError(
                f"A window to the right has an end on the left, too, got {where}.inner_attention."
                f"window_size={window_size}: give the number of tokens on the left."
            )
        return Causal() if right == 0 else Bidirectional()
    if right == 0:
        return Causal() & SlidingWindow(left + 1)
    return SlidingWindow(left + 1, right=None if right < 0 else right)


def _check_one_window(model: Any) -> None:
    """torchtitan gives all windowed layers of gpt-oss under flex the window of the first one."""
    windows = {
        layer.attention.sliding_window_size
        for layer in model.layers
        if _without_lora(type(layer.attention.inner_attention)) is FlexAttention.Config
    } - {None}
    if len(windows) > 1:
        raise ValueError(
            f"torchtitan's FlexAttention has one window for all layers of gpt-oss, got "
            f"sliding_window_size={sorted(windows)}: build the model with attn_backend='varlen', "
            f"whose layers have each their own."
        )


def _known(
    config: Any, table: Mapping[str, str], where: str, *, refused: Mapping[str, str] | None = None
) -> str:
    """The listed class of a config, whose fields and methods are all that it has.

    A subclass may rename; it may not add, for nobody would read what it adds.
    """
    kind = type(config)
    for base in kind.__mro__:
        name = _short(base)
        if refused and name in refused:
            raise ValueError(f"{where} is not adopted, got {_title(base)}: {refused[name]}.")
        if name in table:
            break
    else:
        raise ValueError(
            f"Layers are read where they are torchtitan's own, got {where} of "
            f"{_title(type(config))}: {INSTEAD}."
        )
    added = {each.name for each in fields(config)} - set(table[name].split())
    if added:
        raise ValueError(
            f"Fields of {where} that are read are {table[name].split()}, got {sorted(added)} of "
            f"{_title(type(config))} besides: {INSTEAD}."
        )
    owner = _owner(config)
    overridden = sorted(set(_overridden(owner, _owner(base))))
    if overridden:
        raise ValueError(
            f"{where} computes as torchtitan's {name}, got {_title(owner or kind)} with its "
            f"own {overridden}: {INSTEAD}."
        )
    return name


_HARMLESS = ("Config", "init_states", "init_weights")


def _owner(config: object) -> type | None:
    """The class that a config of torchtitan builds, as its Configurable wires it (0.3.0)."""
    return getattr(config, "_owner", None)


def _overridden(owner: type | None, base: type | None) -> Iterator[str]:
    """What classes between an owner and its listed base define themselves."""
    if owner is None or base is None or not issubclass(owner, base):
        yield "class"
        return
    for each in owner.__mro__[: owner.__mro__.index(base)]:
        for name in vars(each):
            dunder = name.startswith("__") and name not in ("__init__", "__call__")
            if not dunder and name not in _HARMLESS and not name.startswith("_abc_"):
                yield name


def foreign_modules(model: Any) -> dict[str, type]:
    """Classes of configs in a decoder that are neither torchtitan's nor dtcp's, by their place.

    Raises:
        ValueError: a module or a dispatcher of torchtitan's that communicates by itself.
    """
    for where, dispatcher, _, _ in model.traverse(LocalTokenDispatcher.Config):
        if type(dispatcher) not in (LocalTokenDispatcher.Config, AllToAllTokenDispatcher.Config):
            raise ValueError(
                f"Tokens travel to experts by all-to-all, got {where} of "
                f"{_title(type(dispatcher))}: build the model with moe_comm_backend='standard'."
            )
    foreign = {}
    for where, config, _, _ in model.traverse(Module.Config, recurse=True):
        kind = _without_lora(type(config))
        if kind.__module__ == "torchtitan.models.common.dist_gemm":
            raise ValueError(
                f"Matrix products that communicate need CUDA's symmetric memory and were never run "
                f"here, got {where} of {_title(kind)}: build the model with "
                f"tp_gemm_backend='default'."
            )
        known = kind.__module__.startswith("torchtitan.") or _listed(kind)
        if not (known or kind is MixerAttention.Config):
            foreign[where] = kind
    return foreign


def _without_lora(config_class: type) -> type:
    """The class that torchtitan's LoRA has derived a config's from, to freeze or to adapt it."""
    own = (each for each in config_class.__mro__ if each.__module__ != LoRAConverter.__module__)
    return next(own)


def model_name(config: Any) -> str:
    """The listed class that a decoder's config is of."""
    return _known(config, MODELS, "model")


def _listed(config_class: type) -> bool:
    return any(
        _short(base) in (*MODELS, *BLOCKS, *ATTENTIONS) and base.__module__.startswith("torchtitan")
        for base in config_class.__mro__
    )


def _short(config_class: type) -> str:
    """The name of a class of torchtitan's models as the tables have it."""
    return _title(config_class).removeprefix("torchtitan.models.").removesuffix(".Config")


def _title(config_class: type) -> str:
    return f"{config_class.__module__}.{config_class.__qualname__}"

"""Sends attention that a transformers model writes out itself through the attention registry.

The forward of such a module is rewritten up to the attention call, by the name of its class; tests
compare it with the original.
"""

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtcp.huggingface.attend_by_name import CONFIG, ROPE, attend_by_name, check_no_cache, own_rope
from dtcp.huggingface.block_attention import BLOCKS
from dtcp.huggingface.compressed_attention import COMPRESSED
from dtcp.huggingface.picking_attention import PICKING
from dtcp.huggingface.picking_forms import own_values_of_picking
from dtcp.huggingface.relative_attention import RELATIVE, own_values_of_relative
from dtcp.softmax.distance_bias import alibi_slopes

CODEGEN_PARTS = 4


def own_attentions(model: nn.Module) -> list[Any]:
    """Modules whose forward is rewritten here."""
    return [m for m in model.modules() if written_again(m) is not None]


def written_again(module: nn.Module) -> Callable[..., Any] | None:
    """The rewritten forward of a module; None where it is not needed.

    GPT-J and CodeGen attend by the registry from transformers 5.24 on, without a table each.
    """
    forward = FORWARDS.get(type(module).__name__)
    by_registry = forward is _gptj and not hasattr(module, "embed_positions")
    return None if by_registry else forward


def implementations(model: Any) -> list[Any]:
    """Configs that choose the attention of such modules, which may have none of their own.

    And copies of a model's config, in layers that peft has copied (`modules_to_save`,
    `layer_replication`): what is chosen for the model does not reach them.
    """
    from transformers import PreTrainedModel

    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    if not own_attentions(model):
        of_models = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
        known, kinds = set(map(id, of_models)), tuple(set(map(type, of_models)))
        configs = {key: x for key, x in configs.items() if key not in known and type(x) in kinds}
    return list(configs.values())


def use_registry(model: Any, module: nn.Module) -> None:
    """Make a module of a model call attention by the name in the config."""
    vars(module)[CONFIG] = model.config
    for each in _with_own_alibi(model):
        each.use_alibi = False
    vars(module).update(own_values(module))
    module.forward = MethodType(FORWARDS[type(module).__name__], module)


def own_values(module: Any) -> dict[str, Any]:
    """What a rewritten forward needs on its module, beside what the module has.

    That is the rotary function, a slope for each head, and the parts of CodeGen's projection.
    """
    if type(module).__name__ in PICKING:
        return own_values_of_picking(module)
    if type(module).__name__ in (*COMPRESSED, *BLOCKS):
        return own_rope(module)
    if type(module).__name__ in RELATIVE:
        return own_values_of_relative(module)
    names = ("num_heads", "n_heads", "num_attention_heads")
    heads = next(getattr(module, name) for name in names if hasattr(module, name))
    # A tensor: where tp splits heads, a rank keeps the slopes of its own. On the host, whatever
    # device the model is built on, and pinned, so that no layer waits for its copy.
    with torch.device("cpu"):
        slopes = alibi_slopes(heads)
    slopes = slopes.pin_memory() if torch.cuda.is_available() else slopes
    return {**own_rope(module), "dtcp_slopes": slopes, "dtcp_parts": CODEGEN_PARTS}


def looked_up_in(module: nn.Module) -> Any:
    """The config whose name a module uses to look its attention up; None if it has none."""
    return vars(module).get(CONFIG, getattr(module, "config", None))


def use_own(model: Any, module: nn.Module) -> None:
    """Restore the forward of a module's class."""
    for each in _with_own_alibi(model):
        each.use_alibi = each.config.alibi
    for name in own_values(module):
        del vars(module)[name]
    del module.forward, vars(module)[CONFIG]


def _with_own_alibi(model: Any) -> list[Any]:
    """Models that add ALiBi to a mask of all pairs of tokens."""
    return [m for m in model.modules() if type(m).__name__ == "FalconModel"]


def _falcon(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Any,
    position_ids: Tensor | None = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    check_no_cache(self, kwargs)
    parts = self._split_heads(self.query_key_value(hidden_states))
    q, k, v = (x.transpose(1, 2) for x in parts)
    if not self.config.alibi:
        assert position_embeddings is not None
        q, k = getattr(self, ROPE)(q, k, *position_embeddings)
    else:
        # Scaled with the scores; the model rounds slopes to bf16, whatever it computes in.
        kwargs["slope"] = _slopes(self, q).bfloat16().float() * self.inv_norm_factor
    out = attend_by_name(self, q, k, v, attention_mask, scaling=self.inv_norm_factor, **kwargs)
    return self.dense(out), None


def _bloom(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Any,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    check_no_cache(self, kwargs)
    qkv = self.query_key_value(hidden_states).unflatten(-1, (self.num_heads, 3, -1))
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(-2))
    kwargs |= {"scaling": self.inv_norm_factor, "slope": _slopes(self, q)}
    out = attend_by_name(self, q, k, v, attention_mask, **kwargs)
    dropped = F.dropout(self.dense(out), p=self.hidden_dropout, training=self.training)
    return residual + dropped, None


def _mpt(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    check_no_cache(self, kwargs)
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    q, k, v = (x.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=2))
    kwargs |= {"scaling": self.softmax_scale, "slope": _slopes(self, q)}
    if self.training:
        kwargs["dropout"] = self.attn_dropout_p
    return self.out_proj(attend_by_name(self, q, k, v, attention_mask, **kwargs)), None


def _gptj(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Of CodeGen as well."""
    check_no_cache(self, kwargs)
    q, k, v = _turned(self, *_gptjs_heads(self, hidden_states), position_ids)
    kwargs |= {"scaling": 1 / self.scale_attn}
    kwargs["dropout"] = self.attn_dropout.p if self.training else 0.0
    out = attend_by_name(self, q, k, v, attention_mask, **kwargs)
    return self.resid_dropout(self.out_proj(out)), None


def _gptjs_heads(module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, L, H, D], by three projections or by CodeGen's one."""
    if hasattr(module, "qkv_proj"):
        # In parts of as many heads, each with all queries, values and keys of its own.
        shape = module.dtcp_parts, 3, -1, module.head_dim
        qvk = module.qkv_proj(hidden_states).unflatten(-1, shape)
        q, v, k = (x.flatten(2, 3) for x in qvk.unbind(-3))
    else:
        projections = module.q_proj, module.k_proj, module.v_proj
        q, k, v = (x(hidden_states).unflatten(-1, (-1, module.head_dim)) for x in projections)
    return q, k, v


def _turned(
    module: Any, q: Tensor, k: Tensor, v: Tensor, positions: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L, H, D] -> [B, H, L, D], some channels of queries and keys rotated, as GPT-J does."""
    table = module.embed_positions.to(q.device)
    sin, cos = table[positions].to(q.dtype).chunk(2, dim=-1)
    width = module.rotary_dim or q.shape[-1]

    def turned(x: Tensor) -> Tensor:
        first, rest = x[..., :width], x[..., width:]
        return torch.cat((getattr(module, ROPE)(first, sin, cos), rest), dim=-1)

    return turned(q).transpose(1, 2), turned(k).transpose(1, 2), v.transpose(1, 2)


def _slopes(module: Any, q: Tensor) -> Tensor:
    """Instead of ALiBi for every key: [H], a slope for each head that the module computes."""
    slopes: Tensor = module.dtcp_slopes
    return slopes.to(q.device, non_blocking=True)


FORWARDS: Mapping[str, Callable[..., Any]] = {
    "FalconAttention": _falcon,
    "BloomAttention": _bloom,
    "MptAttention": _mpt,
    "GPTJAttention": _gptj,
    "CodeGenAttention": _gptj,
    **PICKING,
    **COMPRESSED,
    **BLOCKS,
    **RELATIVE,
}
"""By the name of the class."""

"""Attention that a model of transformers writes out by itself, sent through the registry after all.

The forward of such a module is written again, up to the call of attention: by the name of its
class, and held against the one that it stands for.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn

_ROPE = "dtcp_rope"


def own_attentions(model: nn.Module) -> list[Any]:
    """Modules whose forward is written again here."""
    return [m for m in model.modules() if type(m).__name__ in FORWARDS]


def use_registry(module: nn.Module) -> None:
    """Let a module call attention by the name in its config."""
    rope = getattr(inspect.getmodule(type(module)), "apply_rotary_pos_emb", None)
    vars(module)[_ROPE] = rope
    module.forward = MethodType(FORWARDS[type(module).__name__], module)


def use_own(module: nn.Module) -> None:
    """Give a module the forward of its class back."""
    del module.forward, vars(module)[_ROPE]


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **arguments: Any) -> Tensor:
    """[B, H or G, L, D] -> [B, L, H * D], by the registry."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    out: Tensor = attend(module, q, k, v, mask, **arguments)[0]
    return out.flatten(2)


def _falcon(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Any,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if alibi is not None or layer_past is not None or position_embeddings is None:
        raise ValueError(
            f"Attention of Falcon that mixers carry out rotates by positions, got alibi="
            f"{type(alibi).__name__}, layer_past={type(layer_past).__name__}: set config.alibi = "
            f"False, and use no cache."
        )
    parts = self._split_heads(self.query_key_value(hidden_states))
    q, k, v = (x.transpose(1, 2) for x in parts)
    q, k = getattr(self, _ROPE)(q, k, *position_embeddings)
    out = _attend(self, q, k, v, attention_mask, scaling=self.inv_norm_factor, **kwargs)
    return self.dense(out), None


FORWARDS: Mapping[str, Callable[..., Any]] = {"FalconAttention": _falcon}
"""By the name of the class."""

"""How rewritten forwards of transformers attend: by the name in their model's config."""

import inspect
from typing import Any

from torch import Tensor, nn

ROPE, CONFIG = "dtcp_rope", "dtcp_config"
"""Where a module keeps the function that turns by positions, and the config with that name."""
ATTEND = "attend_by_name"
"""The name under which such forwards call `attend_by_name`."""
CACHES = ("past_key_values", "cache", "layer_past", "cache_params")
"""Arguments that hold a cache; from transformers 5.24 on it is `cache` everywhere."""


def own_rope(module: nn.Module) -> dict[str, Any]:
    """The rotary function of the module's own file."""
    return {ROPE: getattr(inspect.getmodule(type(module)), "apply_rotary_pos_emb", None)}


def attend_by_name(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **arguments: Any
) -> Tensor:
    """[B, H or G, L, D] -> [B, L, H * D], by the registry."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS[getattr(module, CONFIG)._attn_implementation]
    out: Tensor = attend(module, q, k, v, mask, **arguments)[0]
    return out.flatten(2)


def check_no_cache(module: nn.Module, arguments: dict[str, Any]) -> None:
    """Refuse a cache among the arguments of a forward, and drop the arguments that hold none."""
    for name in CACHES:
        cache = arguments.pop(name, None)
        if cache is not None:
            raise ValueError(
                f"Attention that mixers carry out reads the tokens of its batch, got a cache of "
                f"type {type(cache).__name__} in {type(module).__name__}: leave it out."
            )

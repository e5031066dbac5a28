"""Routers' logits of a model of transformers, without the balance loss that it makes of them.

Its own is a product of means over the tokens of one shard, padding among them. What
`dtcp.router_balance.balance_loss` makes of the logits is that of all tokens.
"""

from collections.abc import Callable
from typing import Any


def leave_out_own_balance(
    model: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Give router_logits if they are asked for, whatever the config says, and no aux_loss."""
    asked = bool(kwargs.get("output_router_logits"))
    out = forward(*args, **{**kwargs, "output_router_logits": asked})
    if getattr(out, "aux_loss", None) is not None:
        out.aux_loss = None
    return out

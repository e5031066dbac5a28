"""Router logits of a transformers model, without the balance loss that the model makes of them.

Its own loss is a product of means over the tokens of one shard, padding included;
`dtcp.router_balance.balance_loss` computes that of all tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dtcp.router_balance import balance_loss
from dtcp.sequence.host import on_device
from dtcp.sharded_batch import ShardedBatch


def leave_out_own_balance(
    model: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Return router_logits if the call asks for them, whatever the config says, and no aux_loss."""
    asked = bool(kwargs.get("output_router_logits"))
    out = forward(*args, **{**kwargs, "output_router_logits": asked})
    if getattr(out, "aux_loss", None) is not None:
        out.aux_loss = None
    return out


@contextmanager
def without_router_logits(config: Any) -> Iterator[None]:
    """Inside, a model of this config gives no routers' logits by itself, nor a loss of them."""
    asked = getattr(config, "output_router_logits", None)
    if asked:
        config.output_router_logits = False
    try:
        yield
    finally:
        if asked:
            config.output_router_logits = asked


def is_balanced(model: Any) -> bool:
    """Whether a model's config asks for the balance loss of its experts."""
    config = getattr(model, "config", None)
    text = None if config is None else config.get_text_config()
    return bool(getattr(text, "output_router_logits", False))


def balance_loss_of_batch(model: Any, router_logits: Any, sharded: ShardedBatch) -> Tensor:
    """The balance loss over the tokens of all ranks; the config says what to weigh it by.

    The same on all ranks of mesh.loss, each with the gradient of its own tokens.
    """
    config = model.config.get_text_config()
    padding = sharded.shard(sharded.documents.document() < 0, pad=True)
    return balance_loss(
        router_logits,
        sharded.mesh.loss,
        experts_per_token=config.num_experts_per_tok,
        padding_mask=on_device(padding, router_logits[0].device),
    )


def balance_weight(model: Any) -> float:
    """The weight of the balance loss in a model's config.

    Raises:
        ValueError: it has none: transformers makes no balance loss for this model.
    """
    config = model.config.get_text_config()
    weights = (getattr(config, name, None) for name in ("router_aux_loss_coef", "aux_loss_coef"))
    weight: float | None = next((x for x in weights if x is not None), None)
    if weight is None:
        raise ValueError(
            f"A balance loss is weighed by router_aux_loss_coef, got output_router_logits=True in "
            f"the config of a {type(model).__name__}, which has none: set it to False."
        )
    return weight

"""Scales queries with their position, as Llama 4 does, by the positions of the batch.

Its layers without rotary positions count the tokens of their input from 0, whatever positions the
model is given, and a shard does not start where its row does. So they leave queries unscaled here,
and the layer around them passes positions on to the attention call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.forward import wrap_forward
from dtcp.huggingface.positions import KEY

QUERY_POSITIONS = "query_positions"
"""The argument of an attention call whose queries are scaled by their positions."""


def install_query_temperature(model: nn.Module) -> None:
    """Let layers that scale their queries by position read it from the batch."""
    for layer in list(model.modules()):
        attention: Any = getattr(layer, "self_attn", None)
        if getattr(attention, "attn_temperature_tuning", False) and not attention.use_rope:
            attention.attn_temperature_tuning = False
            wrap_forward(layer, _handing_on_positions)


def tempered(module: Any, query: Tensor, positions: Tensor) -> Tensor:
    """Queries [B, H, L, D] as a module of Llama 4 scales them, by their positions [B or 1, L]."""
    steps = torch.floor((positions.float() + 1.0) / module.floor_scale)
    scale = torch.log1p(steps) * module.attn_scale + 1.0
    return (query * scale[:, None, :, None]).to(query.dtype)


def _handing_on_positions(
    layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if kwargs.get(KEY) is None:
        raise ValueError(
            f"Queries of {type(layer).__name__} are scaled by the positions of its batch, got "
            f"{KEY}=None: call the model that parallelize_hf returned, with the {KEY} of "
            f"shard_hf_batch."
        )
    return forward(*args, **{**kwargs, QUERY_POSITIONS: kwargs[KEY]})

"""Attention of transformers whose queries bias their scores by distance: Inkling's.

There every layer makes a bias of all pairs of tokens, [B, H, L, S], of what each query says of a
few profiles, and counts the positions that it scales by from the start of its input. The forwards
are written again: what queries say goes to the mixer as it is, and the model hands its layers the
positions of the batch.

From Thinking Machines Lab 2026, Inkling, as of transformers 5.24 (models/inkling).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtcp.huggingface.attend_by_name import attend_by_name, check_no_cache

POSITIONS = "dtcp_positions_of_tokens"
"""The argument in which a model hands its layers positions."""


class RelativeBias(NamedTuple):
    """What a query adds to the score of the key w tokens before: relative @ profiles[:, w].

    Args:
        relative: [B, L, H, C].
        profiles: [C, W].
    """

    relative: Tensor
    profiles: Tensor


def _attend(
    self: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """InklingAttention."""
    check_no_cache(self, kwargs)
    positions = kwargs.pop(POSITIONS)
    of_batch = {key: kwargs.get(key) for key in ("conv_mask", "attn_metadata")}
    q, relative = self.q_proj(hidden_states), self.r_proj(hidden_states)
    k = self.k_sconv(self.k_proj(hidden_states), **of_batch)
    v = self.v_sconv(self.v_proj(hidden_states), **of_batch)
    q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
    q, k = self.q_norm(q), self.k_norm(k)
    relative = relative.unflatten(-1, (q.shape[2], -1))
    if not self.is_sliding and self.config.log_scaling_n_floor is not None:
        q, relative = (_scaled_by_position(x, positions, self.config) for x in (q, relative))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    arguments = {
        "scaling": self.scaling,
        "dropout": self.attention_dropout if self.training else 0.0,
        "relative_bias": self.rel_logits_proj(relative),
    }
    out = attend_by_name(self, q, k, v, attention_mask, **arguments, **kwargs)
    return self.o_proj(out), None


def _scaled_by_position(x: Tensor, positions: Tensor, config: Any) -> Tensor:
    """[B, L, H, D], as the number of tokens that may be seen from each one grows."""
    tokens = ((positions + 1).float() / config.log_scaling_n_floor).clamp(min=1.0)
    factor = 1.0 + config.log_scaling_alpha * torch.log(tokens)
    return (x.float() * factor[..., None, None]).to(x.dtype)


def _bias(self: Any, relative: Tensor, *_: Any) -> RelativeBias:
    """InklingRelativeLogits, which would make the bias of all pairs of tokens."""
    return RelativeBias(relative, self.proj)


def _hand_on_positions(
    self: Any, *args: Any, position_ids: Tensor | None = None, **kwargs: Any
) -> Any:
    """InklingTextModel, whose layers count their own positions."""
    if position_ids is None:
        tokens = kwargs.get("input_ids") if not args else args[0]
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]
    kwargs[POSITIONS] = position_ids
    return type(self).forward(self, *args, position_ids=position_ids, **kwargs)


RELATIVE: Mapping[str, Callable[..., Any]] = {
    "InklingAttention": _attend,
    "InklingRelativeLogits": _bias,
    "InklingTextModel": _hand_on_positions,
}
"""By the name of the class."""

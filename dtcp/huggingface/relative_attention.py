"""Attention of transformers whose queries bias their scores by distance: Inkling's.

There every layer makes a bias of all pairs of tokens, [B, H, L, S], of what each query says of a
few profiles. The forwards are written again: what queries say goes to the mixer as it is. Inkling's
layers count the positions that they scale by from the start of their input, so its model hands them
those of the batch; Inkling 2's are handed them, and distances of all pairs, which are left out.

From Thinking Machines Lab 2026, Inkling, as of transformers 5.24 (models/inkling, models/inkling2).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dtcp.huggingface.attend_by_name import attend_by_name, check_no_cache
from dtcp.huggingface.renamed_globals import with_names

POSITIONS = "dtcp_positions_of_tokens"
"""The argument in which a model hands its layers positions."""
DISTANCES, WITHOUT_DISTANCES = "get_relative_distance", "dtcp_without_distances"
"""The function that makes distances of all pairs of tokens, and a model's forward without it."""


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
        "sliding_window": self.sliding_window,
        "dropout": self.attention_dropout if self.training else 0.0,
        "relative_bias": self.rel_logits_proj(relative),
    }
    out = attend_by_name(self, q, k, v, attention_mask, **arguments, **kwargs)
    return self.o_proj(out), None


def _scaled_by_position(x: Tensor, positions: Tensor, config: Any) -> Tensor:
    """[B, L, H, D], scaled by how many tokens each one may see."""
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


def _attend_2(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    conv_mask: Any = None,
    key_hidden_states: Tensor | None = None,
    value_hidden_states: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Inkling2SlidingAttention and Inkling2FullAttention, whose queries have sinks of their own."""
    check_no_cache(self, kwargs)
    for name in ("relative_distance", "cache_offset"):
        kwargs.pop(name, None)
    position_ids, of_batch = kwargs["position_ids"], kwargs.get("attn_metadata")
    of_keys = hidden_states if key_hidden_states is None else key_hidden_states
    of_values = hidden_states if value_hidden_states is None else value_hidden_states
    q = self.q_proj(hidden_states, position_ids)
    k, v = (
        project(x, conv_mask=conv_mask, attn_metadata=of_batch)
        for project, x in ((self.k_proj, of_keys), (self.v_proj, of_values))
    )
    arguments = {
        "scaling": self.scaling,
        "sliding_window": self.sliding_window,
        "dropout": self.attention_dropout if self.training else 0.0,
        "relative_bias": self.relative_position_bias(hidden_states, None, position_ids),
        "s_aux": self.sink_proj(hidden_states),
    }
    out = attend_by_name(self, q, k, v, attention_mask, **arguments, **kwargs)
    return self.o_proj(out, hidden_states), None


def _bias_2(self: Any, hidden_states: Tensor, _: Any, position_ids: Tensor) -> RelativeBias:
    """Inkling2RelativePositionBias."""
    relative = self.linear(hidden_states).unflatten(-1, (-1, self.proj.shape[0]))
    return RelativeBias(self.norm(relative, position_ids), self.proj)


def _over_blocks(self: Any, block_states: Tensor, states: Tensor, *at: int) -> Any:
    """Inkling2BlockAttentionResidual: a token attends to its own states after blocks of layers.

    It calls attention by name, and no tokens meet. Inkling 2's loop has queries for each layer.
    """
    stacked = self.norm(torch.cat((block_states, states.unsqueeze(-2)), dim=-2).float())
    width = stacked.shape[-1]
    query = (self.query[at] if at else self.query.view(-1, width)).float()
    scores = torch.einsum("qe,blne->blqn", query, stacked) * width**-0.5
    out = torch.einsum("blqn,blne->blqe", scores.softmax(-1), stacked)
    return out if at else out.unbind(-2)


def _without_distances(self: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
    """Inkling2TextModel."""
    return getattr(self, WITHOUT_DISTANCES)(self, *args, position_ids=position_ids, **kwargs)


def own_values_of_relative(module: nn.Module) -> dict[str, Any]:
    """The forward of a model's class, where that makes distances of all pairs of tokens."""
    if RELATIVE[type(module).__name__] is not _without_distances:
        return {}
    return {WITHOUT_DISTANCES: with_names(type(module).forward, {DISTANCES: _no_distances})}


def _no_distances(*_: Any, **__: Any) -> None:
    """Replaces [L, L] numbers that nothing reads."""


RELATIVE: Mapping[str, Callable[..., Any]] = {
    "InklingAttention": _attend,
    "InklingRelativeLogits": _bias,
    "InklingTextModel": _hand_on_positions,
    "Inkling2SlidingAttention": _attend_2,
    "Inkling2FullAttention": _attend_2,
    "Inkling2RelativePositionBias": _bias_2,
    "Inkling2BlockAttentionResidual": _over_blocks,
    "Inkling2TextModel": _without_distances,
    "Inkling2LoopSlidingAttention": _attend_2,
    "Inkling2LoopFullAttention": _attend_2,
    "Inkling2LoopRelativePositionBias": _bias_2,
    "Inkling2LoopBlockAttentionResidual": _over_blocks,
    "Inkling2LoopMessageAttentionResidual": _over_blocks,
    "Inkling2LoopTextModel": _without_distances,
}
"""By the name of the class."""

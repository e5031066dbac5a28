"""Relative position biases of transformers' models, passed as a table instead of L x S numbers.

T5 and its kin look up a bias for every pair of tokens, in a method of their attention,
`compute_bias`, and pass it from layer to layer. Here the method returns one number per head and
distance, [H, 2 R + 1], which the mixer adds where it computes scores. Whether the method goes by
distance, in T5's buckets, is tested by calling it, not read from names.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtcp.softmax.distance_bias import t5_distance_bias

BIASES = ("position_bias",)
"""Arguments of an attention call that a bias comes in."""

TABLE = "relative_attention_bias"
"""Where attention keeps an embedding with a column for each head."""

_METHOD, _HAS = "compute_bias", "has_relative_attention_bias"
_MADE = "dtcp_bias_by_distance"


def is_of_bias(value: Any) -> bool:
    """Whether an argument of an attention call came from a surveyed method."""
    return getattr(value, _MADE, False)


def biased_attentions(model: nn.Module) -> list[Any]:
    """Modules of attention whose bias is that of T5, and those of their kind that have none."""
    with_bias = [m for m in model.modules() if hasattr(m, _METHOD) and hasattr(m, _HAS)]
    return [m for m in with_bias if not hasattr(m, TABLE) or _is_t5s(m)]


def install_bias_tables(model: nn.Module) -> None:
    """Let attention that biases scores pass on a table; attention without a bias passes nothing."""
    for attention in biased_attentions(model):
        _replace(attention, _table)


@contextmanager
def noting_bias_tables(model: nn.Module) -> Iterator[None]:
    """Inside, attention that biases scores passes on a table that `is_of_bias` recognizes."""
    attentions = [m for m in biased_attentions(model) if _METHOD not in vars(m)]
    before = [getattr(m, _HAS) for m in attentions]
    for attention in attentions:
        _replace(attention, _noted_table)
    try:
        yield
    finally:
        for attention, has in zip(attentions, before, strict=True):
            del vars(attention)[_METHOD]
            setattr(attention, _HAS, has)


def _replace(attention: Any, table: Any) -> None:
    vars(attention)[_METHOD] = MethodType(table, attention)
    # Without, it would make L x S zeros.
    setattr(attention, _HAS, True)


def _table(attention: Any, *_: Any, **__: Any) -> Tensor | None:
    """Replaces compute_bias: [H, 2 R + 1]; None for a module without a bias."""
    embedding = getattr(attention, TABLE, None)
    if embedding is None:
        return None
    weight = embedding.weight
    if isinstance(weight, DTensor):
        # Its columns are those of this tp rank's heads.
        weight = weight.to_local(grad_placements=weight.placements)
    table = t5_distance_bias(
        weight,
        bidirectional=not attention.is_decoder,
        max_distance=attention.relative_attention_max_distance,
    )
    # Blocks hand it on, and FSDP warns of modules that return views.
    return table.contiguous()


def _noted_table(attention: Any, *_: Any, **__: Any) -> Tensor | None:
    table = _table(attention)
    if table is not None:
        setattr(table, _MADE, True)
    return table


@torch.no_grad()
def _is_t5s(attention: Any) -> bool:
    """Whether what a module adds to scores depends on distance alone, as the table says.

    Tried with one query, and twice as many keys on either side as the table reaches.
    """
    if _METHOD in vars(attention) or getattr(attention, TABLE).weight.is_meta:
        # On the meta device a narrow copy was tried.
        return True
    try:
        table = _table(attention)
        assert table is not None
        reach = table.shape[1] // 2
        dense = getattr(attention, _METHOD)(1, 4 * reach + 1, past_seen_tokens=2 * reach)
    except (AttributeError, TypeError, ValueError):
        return False
    place = torch.arange(-2 * reach, 2 * reach + 1).clamp(-reach, reach) + reach
    return torch.equal(dense[0, :, 0], table[:, place.to(table.device)])

"""Score biases by distance of transformers' models, handed on as a table instead of L x S numbers.

T5 and its kin look a bias up for every pair of tokens, in a method of their attention,
`compute_bias`, and hand it from layer to layer. Here the method gives one number per head for each
distance, [H, 2 R + 1], and the mixer adds it where it computes scores. That the method goes by
distance, by T5's buckets, is tried and not read from names.
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
    """Whether a value of an attention call is what a surveyed method gave."""
    return getattr(value, _MADE, False)


def biased_attentions(model: nn.Module) -> list[Any]:
    """Modules of attention whose bias is that of T5, and those of their kind that have none."""
    with_bias = [m for m in model.modules() if hasattr(m, _METHOD) and hasattr(m, _HAS)]
    return [m for m in with_bias if not hasattr(m, TABLE) or _is_t5s(m)]


def install_bias_tables(model: nn.Module) -> None:
    """Let attention that biases scores hand on a table; one without hands on nothing."""
    for attention in biased_attentions(model):
        _replace(attention, _table)


@contextmanager
def noting_bias_tables(model: nn.Module) -> Iterator[None]:
    """Inside, attention that biases scores hands on a table that `is_of_bias` knows."""
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
    """In the place of compute_bias: [H, 2 R + 1]; of a module without a bias, None."""
    embedding = getattr(attention, TABLE, None)
    if embedding is None:
        return None
    weight = embedding.weight
    if isinstance(weight, DTensor):
        # Its columns are those of the heads that this rank of tp makes.
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
    """Whether what the module adds to scores goes by distance, as the table says, and no further.

    One query with twice as many keys on either side as the table reaches to.
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

"""DeepSeek-V4's helpers as NeMo Automodel names them: groups, gathers and the dense mask.

Names and signatures are those of nemo_automodel.components.models.deepseek_v4.cp, for training
loops written against them. dtcp's own model (dtcp.models.deepseek_v4) needs none of these: it
gathers no raw keys, builds no mask of [L, S], and its shards need not be multiples of any ratio.
"""

from functools import reduce
from math import lcm
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from dtcp.cp_utils.seq_padding import _pad_position_ids_seq_dim_ as _pad_position_ids_seq_dim_
from dtcp.cp_utils.seq_padding import _pad_tensor_seq_dim_ as _pad_tensor_seq_dim_
from dtcp.distributed.collectives import all_gather_over
from dtcp.sequence.arguments import FLOATS, WHOLE_NUMBERS, check_ints, check_tensor

OVERLAPPING = 4
"""The ratio whose windows read the window before them, too."""


def dsv4_cp_local_seq_multiple(model_or_config: Any) -> int:
    """What a shard's length must be a multiple of, so that no window is cut.

    Args:
        model_or_config: has `compress_ratios`, or a `config` that has.
    Returns:
        the least common multiple of the ratios, of 8 for a ratio of 4; 1 without any.
    """
    config = getattr(model_or_config, "config", model_or_config)
    ratios = [int(ratio) for ratio in getattr(config, "compress_ratios", None) or () if ratio]
    multiples = (2 * ratio if ratio == OVERLAPPING else ratio for ratio in ratios if ratio > 0)
    return reduce(_lcm, multiples, 1)


def _lcm(a: int, b: int) -> int:
    """The least common multiple; if one of them is 0, the other one."""
    return lcm(a, b) if a and b else max(a, b)


def dsv4_cp_enabled(cp_group: dist.ProcessGroup | None) -> bool:
    """Whether there is a group of more than one rank."""
    there = cp_group is not None and dist.is_available() and dist.is_initialized()
    return there and dist.get_world_size(cp_group) > 1


def dsv4_cp_rank(cp_group: dist.ProcessGroup | None) -> int:
    """This rank's number in the group; 0 without one."""
    return dist.get_rank(cp_group) if dsv4_cp_enabled(cp_group) else 0


def dsv4_cp_size(cp_group: dist.ProcessGroup | None) -> int:
    """Ranks in the group; 1 without one."""
    return dist.get_world_size(cp_group) if dsv4_cp_enabled(cp_group) else 1


def dsv4_cp_all_gather(tensor: Tensor, dim: int, cp_group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the tensors of all ranks along dim; all have the same shape.

    In backward each rank gets its own part's gradient, summed over the ranks.
    """
    if cp_group is None or not dsv4_cp_enabled(cp_group):
        return tensor
    return all_gather_over(tensor.contiguous(), cp_group, dim=dim)


def dsv4_cp_all_gather_metadata(
    tensor: Tensor | None, dim: int, cp_group: dist.ProcessGroup | None
) -> Tensor | None:
    """`dsv4_cp_all_gather` of masks, positions and ids, which need no gradient; None stays None."""
    if tensor is None:
        return None
    return dsv4_cp_all_gather(tensor.detach(), dim, cp_group)


def build_dsv4_cp_causal_padding_mask(
    position_ids: Tensor,
    key_len: int,
    dtype: torch.dtype,
    device: torch.device | str,
    cp_group: dist.ProcessGroup | None,
    padding_mask: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """The mask to add to scores of local queries and all keys: 0 for keys seen, else dtype's min.

    For one document per row: position_ids are indices in the row. Never -inf, so the output of a
    query that sees nothing stays finite.

    Args:
        position_ids: [L] or [B, L] of this rank's queries.
        key_len: S; keys 0 .. S - 1 in the order of the sequence.
        padding_mask: [B, L] of this rank, True for padding; given by all ranks or by none.
        sliding_window: keys a query sees, its own included.
    Returns:
        [B, 1, L, S].

    Traffic per rank, with padding_mask: an all-gather of it.
    """
    subject = "The mask of DeepSeek-V4"
    check_tensor(subject, shape="[B, L]", dtypes=WHOLE_NUMBERS, position_ids=position_ids)
    check_ints(subject, least=0, key_len=key_len)
    check_ints(subject, least=1, sliding_window=1 if sliding_window is None else sliding_window)
    if padding_mask is not None:
        check_tensor(subject, shape="[B, L]", ndim=2, padding_mask=padding_mask)
    if position_ids.ndim not in (1, 2) or dtype not in FLOATS:
        raise ValueError(
            f"{subject} is added to scores of queries with a position each, got position_ids."
            f"shape={tuple(position_ids.shape)}, dtype={dtype}: give [B, L] and the scores' dtype."
        )
    position_ids = position_ids.to(device)
    query = position_ids[None] if position_ids.ndim == 1 else position_ids
    key = torch.arange(key_len, device=device)
    seen = key <= query[..., None]  # [B, L, S]
    if sliding_window is not None:
        seen = seen & (query[..., None] - key < sliding_window)
    padding = dsv4_cp_all_gather_metadata(padding_mask, 1, cp_group)
    if padding is not None:
        if padding.shape[1] != key_len:
            raise ValueError(
                f"A padding mask covers every key, got {padding.shape[1]} tokens of all ranks "
                f"with key_len={key_len}: give each rank's part of one mask."
            )
        seen = seen & ~padding.to(device).bool()[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]

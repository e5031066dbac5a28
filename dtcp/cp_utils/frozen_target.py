"""A target model that is only read; `dtcp.sdpa.frozen.FrozenTarget` does it in one call."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.sdpa.frozen import gather_outputs, shard_target_inputs


def make_target_cp_ctx(
    cp_mesh: DeviceMesh, input_ids: Tensor, position_ids: Tensor | None = None
) -> tuple[AbstractContextManager[Any], Tensor, Tensor, int]:
    """Shard the inputs of a frozen target, contiguously, and make the context to run it in.

    Args:
        cp_mesh: the 1-D axis of the sequence; None or one rank: whole rows, and a context that
            does nothing.
        input_ids: [B, S], whole on every rank of the axis; not changed.
        position_ids: [B, S] or [1, S], restarting with each document; None counts from 0.
    Returns:
        the context, the local ids and positions [B, L], and S, for `gather_cp_seq`.
    """
    return shard_target_inputs(cp_mesh, input_ids, position_ids)


def gather_cp_seq(
    cp_mesh: DeviceMesh, tensors: list[Tensor], seq_dim: int, orig_len: int
) -> list[Tensor]:
    """Gather whole tensors, in order, from the shards of `make_target_cp_ctx`; no gradient.

    Args:
        seq_dim: the sequence's dim of all of them.
        orig_len: tokens before padding.
    """
    return gather_outputs(cp_mesh, tensors, orig_len, dim=seq_dim)

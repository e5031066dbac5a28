"""Context parallelism for a training loop that shards its batch and opens a context around a step.

The names and signatures are NeMo Automodel's (nemo_automodel.components.distributed.cp_utils).
Batches are sharded when they are made, out of place; a context only says what the shards are, and
only inside it: nothing in torch is patched, and backward passes need no context.
"""

from dtcp.cp_utils.batch import BatchSharder, _build_position_ids, make_cp_batch_and_ctx
from dtcp.cp_utils.context import create_context_parallel_ctx, get_train_context
from dtcp.cp_utils.deepseek_v4 import (
    _lcm,
    build_dsv4_cp_causal_padding_mask,
    dsv4_cp_all_gather,
    dsv4_cp_all_gather_metadata,
    dsv4_cp_enabled,
    dsv4_cp_local_seq_multiple,
    dsv4_cp_rank,
    dsv4_cp_size,
)
from dtcp.cp_utils.deepseek_v4_batch import make_dsv4_contiguous_shard_cp_batch_and_ctx
from dtcp.cp_utils.delta_net import CPAwareGatedDeltaNet, _AllGatherConcatFn, apply_cp
from dtcp.cp_utils.frozen_target import gather_cp_seq, make_target_cp_ctx
from dtcp.cp_utils.hooks import attach_context_parallel_hooks, attach_cp_sdpa_hooks
from dtcp.cp_utils.seq_padding import _pad_position_ids_seq_dim_, _pad_tensor_seq_dim_
from dtcp.cp_utils.thd import _shard_thd_chunk_for_te, make_cp_batch_for_te

__all__ = [
    "BatchSharder",
    "CPAwareGatedDeltaNet",
    "_AllGatherConcatFn",
    "_build_position_ids",
    "_lcm",
    "_pad_position_ids_seq_dim_",
    "_pad_tensor_seq_dim_",
    "_shard_thd_chunk_for_te",
    "apply_cp",
    "attach_context_parallel_hooks",
    "attach_cp_sdpa_hooks",
    "build_dsv4_cp_causal_padding_mask",
    "create_context_parallel_ctx",
    "dsv4_cp_all_gather",
    "dsv4_cp_all_gather_metadata",
    "dsv4_cp_enabled",
    "dsv4_cp_local_seq_multiple",
    "dsv4_cp_rank",
    "dsv4_cp_size",
    "gather_cp_seq",
    "get_train_context",
    "make_cp_batch_and_ctx",
    "make_cp_batch_for_te",
    "make_dsv4_contiguous_shard_cp_batch_and_ctx",
    "make_target_cp_ctx",
]

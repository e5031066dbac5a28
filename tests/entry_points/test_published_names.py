"""D: every function and argument of the published pages is here, under its name, and works.

The tables are those of NeMo Automodel's pages of cp_utils, deepseek_v4.cp, gemma4_moe.cp_batch and
qwen3_5_moe.cp_linear_attn: names of parameters in order, and their defaults.
"""

import inspect
from contextlib import nullcontext

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from dtcp import cp_utils
from dtcp.cp_utils import deepseek_v4, gemma4
from tests.harness.spmd import spmd

NO = inspect.Parameter.empty
PACKED = {"padding_token_id": 0, "num_chunks": 1, "seq_lens_padding_value": -1000}
MESHES = {"cp_mesh": NO, "tp_mesh": NO}
PADDED = {"seq_dim": NO, "pad_len": NO}

CP_UTILS = {
    "_build_position_ids": {"batch": NO, "device": NO},
    "_shard_thd_chunk_for_te": {
        "batch": NO,
        "cp_mesh": NO,
        "qkv_format": NO,
        "seq_lens_padding_value": NO,
        "padding_token_id": NO,
    },
    "attach_context_parallel_hooks": {"model": NO},
    "attach_cp_sdpa_hooks": {"model": NO, "cp_mesh": NO},
    "create_context_parallel_ctx": {
        "cp_mesh": NO,
        "cp_buffers": NO,
        "cp_seq_dims": NO,
        "cp_no_restore_buffers": NO,
        "cp_rotate_method": None,
    },
    "gather_cp_seq": {"cp_mesh": NO, "tensors": NO, "seq_dim": NO, "orig_len": NO},
    "get_train_context": {
        "enable_loss_parallel": NO,
        "enable_compiled_autograd": NO,
        "cp_context": None,
    },
    "make_cp_batch_and_ctx": {
        "device_mesh": NO,
        "batch": NO,
        "loss_mask": None,
        "use_te": False,
        **PACKED,
    },
    "make_cp_batch_for_te": {"cp_mesh": NO, "batch": NO, "qkv_format": "thd", **PACKED},
    "make_target_cp_ctx": {"cp_mesh": NO, "input_ids": NO, "position_ids": None},
}

DEEPSEEK_V4 = {
    "_lcm": {"a": NO, "b": NO},
    "_pad_position_ids_seq_dim_": {"position_ids": NO, **PADDED},
    "_pad_tensor_seq_dim_": {"tensor": NO, **PADDED, "value": NO},
    "build_dsv4_cp_causal_padding_mask": {
        "position_ids": NO,
        "key_len": NO,
        "dtype": NO,
        "device": NO,
        "cp_group": NO,
        "padding_mask": None,
        "sliding_window": None,
    },
    "dsv4_cp_all_gather": {"tensor": NO, "dim": NO, "cp_group": NO},
    "dsv4_cp_all_gather_metadata": {"tensor": NO, "dim": NO, "cp_group": NO},
    "dsv4_cp_enabled": {"cp_group": NO},
    "dsv4_cp_local_seq_multiple": {"model_or_config": NO},
    "dsv4_cp_rank": {"cp_group": NO},
    "dsv4_cp_size": {"cp_group": NO},
    "make_dsv4_contiguous_shard_cp_batch_and_ctx": {
        **MESHES,
        "batch": NO,
        "loss_mask": None,
        "padding_token_id": 0,
        "pad_multiple": None,
    },
}

GEMMA4 = {
    "_make_contiguous_shard_cp_batch": {
        "cp_mesh": NO,
        "batch": NO,
        "primary_key": NO,
        "seq_len": NO,
        "labels": NO,
        "position_ids": NO,
        "pos_seq_dim": NO,
        "loss_mask": NO,
        "padding_token_id": NO,
    },
    "_pad_position_ids_seq_dim_": {"position_ids": NO, **PADDED},
    "_pad_tensor_seq_dim_": {"tensor": NO, **PADDED, "value": 0},
    "_prepare_manual_cp_batch": {**MESHES, "batch": NO, "loss_mask": NO},
    "_synthesize_single_document_seq_ids": {"batch": NO, "primary_key": NO, "seq_len": NO},
    "make_contiguous_shard_cp_batch_and_ctx": {
        **MESHES,
        "batch": NO,
        "loss_mask": None,
        "padding_token_id": 0,
    },
}

LOADS = {"original_positions": NO, "cp_group": NO}
GATED_DELTA_NET = {
    "__new__": {"config": NO, "layer_idx": NO},
    "forward": {
        "hidden_states": NO,
        **dict.fromkeys(
            (
                "cache_params",
                "cache_position",
                "attention_mask",
                "position_ids",
                "qkv_format",
                "cu_seqlens",
                "seq_index",
            )
        ),
    },
    "_conv1d_with_cp": {"mixed_qkv": NO, "cp_context": NO},
    "_extract_local_positions": {"position_ids": NO, "seq_index": NO, "seq_len": NO},
    "_all_gather_concat": {"tensor": NO, "cp_group": NO, "dim": NO, "differentiable": False},
    "_undo_attention_load_balancing": {"hidden_states": NO, **LOADS},
    "_redo_attention_load_balancing": {
        "output": NO,
        "original_positions": NO,
        "sorted_positions": NO,
        "cp_group": NO,
    },
    "_forward_with_cp": {"hidden_states": NO, "position_ids": NO, "seq_index": NO},
}
GATHER = {
    "forward": {"ctx": NO, "local_tensor": NO, "group": NO, "dim": NO},
    "backward": {"ctx": NO, "grad_output": NO},
}

PAGES = {
    "cp_utils": (cp_utils, CP_UTILS),
    "deepseek_v4": (cp_utils, DEEPSEEK_V4),
    "deepseek_v4-module": (
        deepseek_v4,
        {k: x for k, x in DEEPSEEK_V4.items() if not k.startswith("make_")},
    ),
    "gemma4": (gemma4, GEMMA4),
    "delta-net": (cp_utils.CPAwareGatedDeltaNet, GATED_DELTA_NET),
    "gather": (cp_utils._AllGatherConcatFn, GATHER),
}
NAMES = [
    pytest.param(where, name, parameters, id=f"D-{page}-{name}")
    for page, (where, table) in PAGES.items()
    for name, parameters in table.items()
]


@pytest.mark.parametrize(("where", "name", "published"), NAMES)
def test_a_published_name_takes_its_published_arguments(where, name, published):
    """In their order; where the page has a default ours has it, and what ours adds has one."""
    parameters = dict(inspect.signature(getattr(where, name)).parameters)
    for own in ("self", "cls"):
        parameters.pop(own, None)
    assert list(parameters)[: len(published)] == list(published)
    for each, default in published.items():
        assert default is NO or parameters[each].default == default
    free = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    added = list(parameters.values())[len(published) :]
    assert all(x.default is not NO or x.kind in free for x in added)


def a_batch():
    ids = torch.arange(16).view(2, 8)
    return {"input_ids": ids, "labels": ids + 1, "attention_mask": torch.ones(2, 8)}


def unchanged(mesh):
    batch = a_batch()
    mask = torch.ones(2, 8)
    context, local = cp_utils.make_cp_batch_and_ctx(mesh, batch, loss_mask=mask)
    assert context is nullcontext and local.keys() == batch.keys() == a_batch().keys()
    assert all(local[key] is x for key, x in batch.items())


def test_D_a_loss_mask_on_one_rank_is_no_part_of_the_batch():
    unchanged(None)


@spmd(axes={"tp": 2})
def test_D_a_loss_mask_without_a_cp_axis_is_no_part_of_the_batch(mesh):
    unchanged(mesh)
    unchanged(init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "cp")))


def test_D_least_common_multiples():
    assert [deepseek_v4._lcm(*x) for x in ((4, 6), (0, 6), (6, 0), (0, 0), (1, 128))] == [
        12,
        6,
        6,
        0,
        128,
    ]
    config = type("Config", (), {"compress_ratios": (0, 4, 128, 6)})
    assert cp_utils.dsv4_cp_local_seq_multiple(config) == 384


@pytest.mark.parametrize("where", [gemma4, deepseek_v4], ids=["D-gemma4", "D-deepseek_v4"])
def test_a_sequence_is_padded_on_the_right_and_positions_count_on(where):
    x = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert where._pad_tensor_seq_dim_(x, 1, 2, 9).tolist() == [[1, 2, 3, 9, 9], [4, 5, 6, 9, 9]]
    assert where._pad_tensor_seq_dim_(x, 0, 1, -100).tolist()[2] == [-100] * 3
    assert where._pad_tensor_seq_dim_(x.bool(), 1, 1, True).dtype == torch.bool
    assert where._pad_tensor_seq_dim_(x, 1, 0, 9) is x
    assert where._pad_position_ids_seq_dim_(x, 1, -1) is x
    counted = where._pad_position_ids_seq_dim_(x, 1, 2)
    assert counted.tolist() == [[1, 2, 3, 4, 5], [4, 5, 6, 7, 8]] and x.shape == (2, 3)
    axes = torch.stack((x, x + 10, x + 20))
    assert where._pad_position_ids_seq_dim_(axes, 2, 1)[:, 0, 3].tolist() == [4, 14, 24]
    with pytest.raises(ValueError, match=r"seq_dim=3 for shape \(2, 3\)"):
        where._pad_tensor_seq_dim_(x, 3, 1, 0)
    with pytest.raises(ValueError, match="without any"):
        where._pad_position_ids_seq_dim_(x[:, :0], 1, 1)

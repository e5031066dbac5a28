"""The seed's way to shard a batch for Gemma 4, and training by it: hook, sharder, ring."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.testing import assert_close

from dtcp.cp_utils import make_cp_batch_and_ctx
from dtcp.cp_utils.gemma4 import (
    _pad_position_ids_seq_dim_,
    _pad_tensor_seq_dim_,
    _prepare_manual_cp_batch,
    _synthesize_single_document_seq_ids,
    make_contiguous_shard_cp_batch_and_ctx,
    prepare_model_inputs_for_cp,
)
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.mixer_plan import apply_plan
from dtcp.models.gemma4 import Gemma4, tiny
from dtcp.parallelize import gemma4_plan, parallelize
from dtcp.sequence.layout import Contiguous
from dtcp.softmax import RingAttention
from tests.harness.hf_gemma4 import Seen, Tower, seen
from tests.harness.parity import gradients
from tests.harness.spmd import run_ranks, spmd

RING = RingAttention()


def step_by_hook(mesh: Any, expected: Seen) -> None:
    """A training step as a loop of the seed's makes it, every layer by the ring."""
    whole, ranks = expected.truth, mesh.size()
    model = Gemma4(whole.config).double()
    model.load_state_dict(whole.weights)
    tower = Tower(whole.config.dim)
    tower.load_state_dict(expected.weights)
    on = ParallelMesh.from_degrees(Degrees(cp=ranks), "cpu")
    plan = replace(gemma4_plan(whole.config, on, RING), cp={"layers.*.attention.mixer": RING})
    parallelize(model, on, plan)
    register_fsdp_forward_method(model, "embed")

    ids = whole.documents.document() + 1
    batch = {
        "input_ids": whole.input_ids,
        "labels": whole.input_ids,
        "mm_token_type_ids": whole.mm_token_type_ids,
        "_packed_seq_ids": ids,
        "position_ids": whole.documents.position_ids(),
        "padding_mask": ids == 0,
    }
    features = tower(expected.pixels)
    prepared = prepare_model_inputs_for_cp(model, batch, image_features=features)
    context, local = make_cp_batch_and_ctx(mesh, prepared)
    with context():
        logits = model(
            None,
            local["position_ids"],
            local["attn_metadata"],
            inputs_embeds=local["inputs_embeds"],
        )
    part = Contiguous(whole.input_ids.shape[1], ranks)
    grad, logits_there = (part.shard(x, on.rank("cp")) for x in (whole.grad_logits, whole.logits))
    logits.backward(grad)
    real = ~local["padding_mask"]
    assert_close(logits[real], logits_there[real])
    for name, parameter in tower.named_parameters():
        total = parameter.grad.clone()
        dist.all_reduce(total, group=on.cp.get_group())
        assert_close(total, expected.gradients[name])
    actual = gradients(model)
    assert_close(actual, {name: whole.gradients[name] for name in actual})


@pytest.mark.parametrize("ranks", [2, 3])
def test_gemma4_by_the_seed_equals_the_published_model_and_its_tower_learns_once(ranks):
    run_ranks(step_by_hook, ranks, seen())


BATCH = {
    "input_ids": torch.arange(1, 15).view(2, 7),
    "labels": torch.arange(14).view(2, 7),
    "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
    "mm_token_type_ids": torch.tensor([[0, 1, 1, 0, 0, 1, 1], [0] * 7]),
    "per_layer_inputs": torch.ones(2, 7, 3, 2),
    "scores": torch.ones(7, 2),
    "_cp_metadata_seq_dims": {"scores": 0, "labels": 0},
    "_cp_metadata_pad_values": {"scores": 9.0, "labels": 9},
}
SHARDS = {
    "input_ids": [[[1, 2, 3, 4], [8, 9, 10, 11]], [[5, 6, 7, 50], [12, 13, 14, 50]]],
    "labels": [[[0, 1, 2, 3], [7, 8, 9, 10]], [[4, 5, 6, -100], [11, 12, 13, -100]]],
    "position_ids": [[[0, 1, 2, 3]] * 2, [[4, 5, 6, 7]] * 2],
    "padding_mask": [
        [[False] * 4] * 2,
        [[False, False, False, True], [False, True, True, True]],
    ],
    "_packed_seq_ids": [[[1] * 4] * 2, [[1, 1, 1, 0], [1, 0, 0, 0]]],
    "mm_token_type_ids": [[[0, 1, 1, 0], [0] * 4], [[0, 1, 1, 0], [0] * 4]],
    "loss_mask": [[[1] * 4] * 2, [[1, 1, 1, 0]] * 2],
    "scores": [[[1.0, 1.0]] * 4, [[1.0, 1.0]] * 3 + [[9.0, 9.0]]],
}
"""What two ranks hold of it, padded from 7 tokens to a multiple of 4."""


@spmd(ranks=2)
def test_a_gemma4_batch_of_the_seed_is_padded_and_cut(mesh):
    before = dict(BATCH)
    context, local = make_contiguous_shard_cp_batch_and_ctx(
        mesh, None, BATCH, loss_mask=torch.ones(2, 7, dtype=torch.int64), padding_token_id=50
    )
    with context():
        pass
    for key, parts in SHARDS.items():
        expected = torch.tensor(parts[mesh.get_local_rank()])
        assert_close(local[key], expected.to(local[key].dtype), rtol=0, atol=0)
    assert local["per_layer_inputs"].shape == (2, 4, 3, 2)
    assert local.keys() == {*SHARDS, "per_layer_inputs"}
    assert before == BATCH or BATCH.keys() == before.keys()


@spmd(ranks=2)
def test_a_hooked_gemma4_batch_numbers_images_in_whole_rows(mesh):
    """A rank that starts at 0 again would make two images of one row one block."""
    model = Gemma4(replace(tiny(), vision_blocks=True))
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    parallelize(model, on, gemma4_plan(model.config, on, RING))
    batch = {key: BATCH[key] for key in ("input_ids", "labels", "mm_token_type_ids")}
    _, local = make_cp_batch_and_ctx(mesh, prepare_model_inputs_for_cp(model, batch))
    expected = [[-1, 0, 0, -1], [-1, 1, 1, -1]][mesh.get_local_rank()]
    assert local["_gemma4_vision_group_ids"][0].tolist() == expected
    assert local["attn_metadata"]


@spmd(axes={"tp": 2, "cp": 2})
def test_a_hooked_gemma4_batch_on_another_axis_than_its_plan_is_refused(mesh):
    model = Gemma4(tiny())
    plan = gemma4_plan(model.config, ParallelMesh.of_sequence(mesh["cp"]), RING)
    apply_plan(model, mesh["cp"], plan.cp)
    batch = {key: BATCH[key] for key in ("input_ids", "labels", "mm_token_type_ids")}
    prepared = prepare_model_inputs_for_cp(model, batch)
    with pytest.raises(ValueError, match="cut for the ranks that its mixers exchange with"):
        prepared["_cp_make_batch_fn"](mesh["tp"], None, prepared)
    _, local = prepared["_cp_make_batch_fn"](mesh["cp"], None, prepared)
    assert local["attn_metadata"]


def test_the_seeds_helpers_for_gemma4_do_as_documented():
    x = torch.tensor([[1, 2]])
    assert _pad_tensor_seq_dim_(x, 1, 0) is x and _pad_position_ids_seq_dim_(x, 1, 0) is x
    assert _pad_tensor_seq_dim_(x, 1, 2, value=7).tolist() == [[1, 2, 7, 7]]
    three = torch.tensor([[[0, 4]], [[1, 1]], [[2, 5]]])
    assert _pad_position_ids_seq_dim_(three, 2, 2)[:, 0].tolist() == [
        [0, 4, 5, 6],
        [1, 1, 2, 3],
        [2, 5, 6, 7],
    ]
    packed = {"_packed_seq_ids": x, "input_ids": x}
    _synthesize_single_document_seq_ids(packed, "input_ids", 2)
    assert packed["_packed_seq_ids"] is x
    single = {"inputs_embeds": torch.ones(2, 3, 4)}
    _synthesize_single_document_seq_ids(single, "inputs_embeds", 3)
    assert single["_packed_seq_ids"].tolist() == [[1, 1, 1]] * 2

    four = torch.full((1, 1, 2, 2), torch.finfo(torch.float32).min)
    four[0, 0, 0, 0] = 0.0
    batch: dict[str, Any] = {"input_ids": x, "attention_mask": four}
    prepared = _prepare_manual_cp_batch(None, None, batch, torch.tensor([[1, 0]]))
    key, seq_len, labels, position_ids, dim, loss_mask = prepared
    assert (key, seq_len, dim, loss_mask) == ("input_ids", 2, 1, None)
    assert labels.tolist() == [[1, 0]] and position_ids.tolist() == [[0, 1]]
    assert batch["padding_mask"].tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"inputs_embeds": torch.ones(2, 7, 4)}, ValueError, "either input_ids or inputs_embeds"),
        ({"labels": None}, KeyError, "labels"),
    ],
)
def test_a_gemma4_batch_of_the_seed_that_says_too_much_or_little_is_refused(change, error, match):
    with pytest.raises(error, match=match):
        make_contiguous_shard_cp_batch_and_ctx(None, None, {**BATCH, **change})


def test_gemma4_refuses_a_hooked_batch_that_does_not_say_where_images_are():
    model = Gemma4(replace(tiny(), vision_blocks=True))
    ids = torch.ones(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="without mm_token_type_ids"):
        prepare_model_inputs_for_cp(model, {"input_ids": ids, "labels": ids})
    types = torch.tensor([[0, 1, 1, 0, 0, 0, 0, 0]])
    batch = {"input_ids": ids, "labels": ids, "mm_token_type_ids": types}
    with pytest.raises(ValueError, match="3 of them for 2 tokens"):
        prepare_model_inputs_for_cp(model, batch, image_features=torch.ones(3, 128))
    seq_ids = torch.tensor([[1, 2, 1, 0, 0, 0, 0, 0]])
    hooked = prepare_model_inputs_for_cp(model, {**batch, "_packed_seq_ids": seq_ids})
    with pytest.raises(ValueError, match="an id in several stretches of row 0"):
        hooked["_cp_make_batch_fn"](None, None, hooked)


@spmd(ranks=2)
def test_a_rank_that_refuses_its_hooked_batch_leaves_no_other_waiting(mesh):
    batch = {key: BATCH[key] for key in ("input_ids", "labels")}
    prepared = prepare_model_inputs_for_cp(Gemma4(replace(tiny(), vision_blocks=False)), batch)
    if mesh.get_local_rank():
        del prepared["labels"]
    error, match = ((ValueError, "refused its batch"), (KeyError, "labels"))[mesh.get_local_rank()]
    with pytest.raises(error, match=match):
        make_cp_batch_and_ctx(mesh, prepared)

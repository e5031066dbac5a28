"""Rows of a trainer are laid out in a thread before its model is called with them."""

import threading

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainingArguments

from dtcp.distributed.mesh import Degrees
from dtcp.huggingface import batch as hf_batch
from dtcp.huggingface import prepare_hf_batch, shard_hf_batch
from dtcp.huggingface.prefetched_rows import PrefetchedRows
from dtcp.labels import IGNORED
from tests.harness.hf_models import build
from tests.harness.spmd import spmd
from tests.huggingface.test_encoder_decoder import build as build_of_two
from tests.trainers.test_trainer import ONE_RANK, MeshTrainer
from tests.trainers.test_whole_rows import on_mesh, padded_rows


def test_rows_ahead_are_taken_by_the_tensors_they_were_made_of():
    made = []

    def prepare(rows):
        made.append(threading.current_thread())
        return dict(rows)

    ahead = PrefetchedRows(prepare)
    batches = [{"input_ids": torch.arange(4)[None] + index} for index in range(3)]
    for batch in batches:
        ahead.start(batch)
    assert ahead.take(dict(batches[0]))() == batches[0]
    # One was left out by its loop; those after it are as they were.
    assert ahead.take(dict(batches[2]))() == batches[2]
    assert ahead.take(dict(batches[1])) is None
    assert len(set(made)) == 1 and threading.current_thread() not in made


@pytest.mark.parametrize("change", ["written to", "another tensor", "one key more"])
def test_rows_ahead_that_a_loop_changes_are_made_on_their_use_and_no_more_ahead(change):
    ahead = PrefetchedRows(dict)
    rows = {"input_ids": torch.arange(4)[None]}
    ahead.start(rows)
    called = dict(rows)
    if change == "written to":
        rows["input_ids"][0, 0] = 7
    elif change == "another tensor":
        called["input_ids"] = rows["input_ids"].clone()
    else:
        called["labels"] = rows["input_ids"]
    assert ahead.take(called) is None
    ahead.start(rows)
    assert ahead.take(rows) is None


@spmd(ranks=2)
def test_trainer_calls_its_model_with_rows_that_were_laid_out_ahead(mesh):
    """And what is wrong with them is raised by the call, on all ranks alike."""
    _, model = on_mesh("llama", Degrees(cp=2))
    rows = padded_rows()
    expected = model(**rows).loss
    here, made_in, rows_of = threading.current_thread(), [], hf_batch._rows_of

    def noted(*args, **kwargs):
        made_in.append(threading.current_thread())
        return rows_of(*args, **kwargs)

    hf_batch._rows_of = noted
    try:
        model.prepare_ahead({**rows, "use_cache": False})
        assert_close(model(**rows).loss, expected, rtol=0.0, atol=0.0)
        padded_left = rows | {"attention_mask": rows["attention_mask"].flip(1)}
        model.prepare_ahead(padded_left)
        with pytest.raises(ValueError, match="padding"):
            model(**padded_left)
        assert len(made_in) == 2 and here not in made_in
    finally:
        hf_batch._rows_of = rows_of
    # Written to since: the call reads them as they are.
    model.prepare_ahead(rows)
    rows["labels"][:, :9] = IGNORED
    fresh = {key: x.clone() for key, x in rows.items()}
    assert_close(model(**rows).loss, model(**fresh).loss, rtol=0.0, atol=0.0)


def test_trainer_of_transformers_lays_out_each_batch_but_the_first_while_another_step_runs(
    tmp_path,
):
    rows = [{"input_ids": [1, 2, 3, index], "labels": [1, 2, 3, index]} for index in range(1, 5)]
    options = {"per_device_train_batch_size": 1, "max_steps": 4, "use_cpu": True}
    args = TrainingArguments(str(tmp_path), report_to=[], save_strategy="no", **options)
    trainer = MeshTrainer(build("llama"), args, mesh=ONE_RANK, train_dataset=rows)
    ahead, order = trainer.rows_model._prefetched, []
    start, take = ahead.start, ahead.take

    def started(batch):
        order.append("start")
        start(batch)

    def taken(batch):
        found = take(batch)
        order.append("take" if found else "made on its use")
        return found

    ahead.start, ahead.take = started, taken
    trainer.train()
    assert order == ["start", *["start", "take"] * 3, "take"]


def test_batch_of_two_sequences_is_not_prepared_ahead():
    model, rows = build_of_two("t5"), padded_rows()
    with pytest.raises(ValueError, match="which has an encoder: call shard_hf_batch without"):
        prepare_hf_batch(rows, ONE_RANK, model=model)
    with pytest.raises(ValueError, match="which has an encoder: call shard_hf_batch without"):
        shard_hf_batch(rows, ONE_RANK, model=model, prepared=dict)

"""Decoders of torchtitan, compiled: a block takes what has arrived, in training and validation."""

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from dtcp._torch.dtensor import local_tensor, wait_for_shard
from tests.harness.spmd import spmd
from tests.harness.train_run import trained


@spmd(ranks=2)
def test_a_shard_that_is_on_its_way_is_waited_for(mesh):
    x = DTensor.from_local(torch.ones(2, 3), mesh, [Partial()])
    with torch.no_grad():
        x = x.redistribute(placements=[Replicate()], async_op=True)
    assert type(local_tensor(x)) is not torch.Tensor
    wait_for_shard(x)
    assert type(local_tensor(x)) is torch.Tensor
    assert torch.equal(local_tensor(x), torch.full((2, 3), 2.0))
    wait_for_shard(torch.ones(1))  # an embedding without tp


@pytest.mark.slow
def test_a_decoder_on_tp_trains_and_validates_under_inductor(tmp_path):
    """Its embedding's output is on its way when the first block is called (pytorch #187073)."""
    output = trained(
        *("--training.steps", "1", "--training.seq_len", "64", "--validator.steps", "1"),
        *("--training.local_batch_size", "1", "--parallelism.context_parallel_degree", "1"),
        *("--dump_folder", str(tmp_path)),
        config="titan_llama3_tiny",
        ranks=2,
    )
    assert "step     1/1  validation loss" in output

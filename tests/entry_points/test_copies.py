"""A8: a copied model computes with its own weights, whatever was put on it; or says it cannot."""

import copy
import io
import pickle

import pytest
import torch

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface.batch import shard_hf_batch
from dtcp.models.llama import Llama
from dtcp.parallelize import (
    Compile,
    FullCheckpoint,
    NoCheckpoint,
    SelectiveCheckpoint,
    llama_plan,
    parallelize,
    parallelize_hf,
)
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import RingAttention
from tests.harness.hf_models import build
from tests.harness.parity import CONFIG
from tests.harness.spmd import spmd


def assert_independent(model, run):
    """A copy gives what the model gave, also once the model's own weights are others."""
    with torch.no_grad():
        before = run(model)
        copied = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert not torch.allclose(run(model), before)
        torch.testing.assert_close(run(copied), before)


WAYS = [
    (NoCheckpoint(), None),
    (FullCheckpoint(), None),
    pytest.param(*(SelectiveCheckpoint(), Compile(backend="aot_eager")), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("checkpoint", "compile"), WAYS)
@spmd(axes={"tp": 2})
def test_A8_copies_of_a_tensor_parallel_model_have_their_own_weights(mesh, checkpoint, compile):
    whole = ParallelMesh.from_device_mesh(mesh)
    model = Llama(CONFIG)
    plan = llama_plan(CONFIG, whole, RingAttention())
    parallelize(model, whole, plan, activation_checkpoint=checkpoint, compile=compile)
    ids = torch.arange(16)[None] % CONFIG.vocab_size
    local, sharded = shard_batch({"input_ids": ids}, whole, HeadTail, model=model)
    position_ids = Documents.single(1, 16).position_ids()

    def run(each):
        logits = each(local["input_ids"], position_ids, sharded.attn_metadata)
        return getattr(logits, "to_local", lambda: logits)().clone()

    assert_independent(model, run)


def test_A8_copies_of_a_model_of_transformers_have_their_own_weights():
    """On one device, where no FSDP refuses the copy."""
    model = build("llama")
    one = ParallelMesh(Degrees(), None, *[None] * 7)
    parallelize_hf(model, one)
    local, sharded = shard_hf_batch({"input_ids": torch.arange(8)[None]}, one, model=model)

    def run(each):
        return each(**local, attn_metadata=sharded.attn_metadata).logits

    assert_independent(model, run)


@spmd(ranks=2)
def test_A8_copies_that_fsdp_would_share_are_refused(mesh):
    model, whole = Llama(CONFIG), ParallelMesh.from_device_mesh(mesh)
    parallelize(model, whole, llama_plan(CONFIG, whole, RingAttention()))
    with pytest.raises(AssertionError, match=r"FSDP does not support deepcopy.*state dict"):
        copy.deepcopy(model)


def assert_refuses_pickle(model):
    for store in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(TypeError, match=r"save model.state_dict\(\)"):
            store(model)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@spmd(axes={"tp": 2})
def test_A8_copies_of_a_tensor_parallel_model_of_transformers_have_their_own_weights(mesh, kind):
    whole = ParallelMesh.from_device_mesh(mesh)
    model = parallelize_hf(build(kind), whole)
    local, sharded = shard_hf_batch({"input_ids": torch.arange(8)[None]}, whole, model=model)

    def run(each):
        return each(**local, attn_metadata=sharded.attn_metadata).logits.full_tensor()

    assert_independent(model, run)
    assert_refuses_pickle(model)


@spmd(ranks=2)
def test_A8_pickles_of_a_context_parallel_model_of_transformers_are_refused(mesh):
    model = parallelize_hf(build("llama"), ParallelMesh.from_device_mesh(mesh))
    # torch's own, before any of ours is asked.
    with pytest.raises(pickle.PicklingError, match=r"Can't pickle .*FSDPLlamaForCausalLM"):
        pickle.dumps(model)


@pytest.mark.parametrize("head", ["CausalLM", "SequenceClassification"])
def test_A8_pickles_of_a_model_with_mixers_are_refused_and_copies_are_exact(head):
    model = build("llama", head=head, num_labels=3)
    one = ParallelMesh(Degrees(), None, *[None] * 7)
    parallelize_hf(model, one)
    assert_refuses_pickle(model)
    batch = {"input_ids": torch.arange(1, 9)[None]}
    local, sharded = shard_hf_batch(batch, one, model=model)

    def run(each):
        return each(**local, attn_metadata=sharded.attn_metadata).logits

    assert_independent(model, run)

"""Under torch.autocast our ops compute what they compute without it, forward and backward."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import ParallelMesh
from dtcp.kernels.sparse.pooling import Prepool
from dtcp.linear_logits import LinearLogits
from dtcp.loss import token_mean_loss
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.recurrent import GatedDeltaCP, GatedDeltaRule, GatherStates
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous
from dtcp.sparse.metadata import Compression
from dtcp.sparse.mixer import CompressedSparseAttention, Index
from dtcp.sparse_latent import LightningIndexer, SparseLatentAttention
from tests.harness.mixer_cases import DOCUMENTS, MEMORY, mixer_cases
from tests.harness.spmd import spmd

LATENTS = ("latents", "picked latents")
"""On one device these are torch's matmuls beside an op: of their own test."""
KINDS = tuple(name for name in mixer_cases() if name not in LATENTS)


def results(call, leaves, cotangent, *, autocast):
    """out and all gradients."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = call(*leaves)
        return [out, *torch.autograd.grad(out, leaves, cotangent)]


def assert_same_under_autocast(call, leaves):
    leaves = [x.requires_grad_() for x in leaves]
    cotangent = torch.randn_like(call(*leaves))
    without, under = (results(call, leaves, cotangent, autocast=each) for each in (False, True))
    assert all(map(torch.equal, without, under))


@pytest.mark.parametrize("kind", KINDS)
def test_mixers_compute_in_the_dtypes_they_are_given_under_autocast(kind):
    case = mixer_cases()[kind]
    metadata = batch_metadata(case.mixer, DOCUMENTS, memory=MEMORY if case.memory else None)

    def call(*leaves):
        inputs = zip(case.shapes, leaves, strict=True)
        inputs = {name: case.prepared.get(name, torch.clone)(x) for name, x in inputs}
        return case.mixer(**inputs, attn_metadata=metadata)

    assert_same_under_autocast(call, [torch.randn(shape) for shape in case.shapes.values()])


@pytest.mark.parametrize("kind", LATENTS)
def test_latents_are_taken_in_the_dtypes_they_are_given_under_autocast(kind):
    """As on shards, where keys are made inside an op. Backward runs outside, as torch asks."""
    case = mixer_cases()[kind]
    attend = partial(case.mixer, attn_metadata=batch_metadata(case.mixer, DOCUMENTS))
    leaves = [torch.randn(shape, requires_grad=True) for shape in case.shapes.values()]
    out = attend(*leaves)
    cotangent = torch.randn_like(out)
    with torch.autocast("cpu", torch.bfloat16):
        under = attend(*leaves)
    assert torch.equal(under, out)
    assert_close(
        torch.autograd.grad(under, leaves, cotangent),
        torch.autograd.grad(out, leaves, cotangent),
        rtol=0,
        atol=0,
    )


def test_picked_latents_are_taken_in_the_dtypes_they_are_given_under_autocast():
    """Of a model's wide norms or weights; backward runs outside, as torch asks."""
    documents = Documents(((5, 8, 3), (16,)), 20)
    pick, mixer = LightningIndexer(3), SparseLatentAttention()
    metadata = batch_metadata(nn.ModuleList((pick, mixer)), documents)
    index = torch.randn(2, 20, 2, 8), torch.randn(2, 20, 2), torch.randn(2, 20, 8)
    shapes = (2, 20, 2, 12), (2, 20, 16), (2, 20, 4), (2, 20, 16)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def attend():
        return mixer(*leaves, pick(*index, metadata), metadata)

    out = attend()
    with torch.autocast("cpu", torch.bfloat16):
        under = attend()
    assert torch.equal(under, out)
    grads = [torch.autograd.grad(x, leaves, torch.ones_like(out)) for x in (under, out)]
    assert all(map(torch.equal, *grads))


def test_sparse_attention_computes_in_the_dtypes_it_is_given_under_autocast():
    documents = Documents(((5, 8, 3), (16,)), 20)
    mixer = CompressedSparseAttention(4, Compression(2, selected=2), scale=0.3)
    metadata = batch_metadata(mixer, documents)
    index = Index(
        torch.randn(2, 20, 2, 8), torch.randn(2, 20, 2), Prepool(*_tokens(), lambda x, _: x)
    )

    def call(q, keys, sink, *tokens):
        pooled = Prepool(*tokens, lambda x, _: x)
        return mixer(q, keys, metadata, sink=sink, tokens=pooled, index=index)

    leaves = [torch.randn(2, 20, 2, 8), torch.randn(2, 20, 8), torch.randn(2), *_tokens()]
    assert_same_under_autocast(call, leaves)


def _tokens():
    return torch.randn(2, 20, 8), torch.randn(2, 20, 8), torch.randn(2, 8)


@spmd(ranks=2)
def test_states_that_ranks_gather_are_composed_in_fp32_under_autocast(mesh):
    documents = Documents.single(1, 32)
    mixer = GatedDeltaRule()
    apply_plan(nn.ModuleList([mixer]), mesh, {"0": GatedDeltaCP(GatherStates())})
    batch = {"input_ids": torch.zeros(1, 32, dtype=torch.int64)}
    ranks = ParallelMesh.of_sequence(mesh)
    metadata = shard_batch(batch, ranks, Contiguous, model=mixer, documents=documents)[1]
    shapes = ((1, 16, 1, 4), (1, 16, 1, 4), (1, 16, 2, 4), (1, 16, 2), (1, 16, 2))

    def call(q, k, v, g, beta):
        return mixer(q, k, v, -F.softplus(g), beta.sigmoid(), metadata.attn_metadata)

    assert_same_under_autocast(call, [torch.randn(shape) for shape in shapes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_under_autocast_has_one_loss_forward_and_backward(dtype):
    """That of its operands in bf16, as a linear layer's: whatever norms have made of the hidden."""
    hidden, weight = torch.randn(2, 6, 5, dtype=dtype), torch.randn(11, 5)
    labels = torch.randint(11, (2, 6))
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    expected = token_mean_loss(LinearLogits(*(x.bfloat16() for x in leaves)), labels, 12)
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_mean_loss(LinearLogits(*leaves), labels, 12)
    assert_close(loss, expected, rtol=0, atol=0)
    grads, right = (torch.autograd.grad(x, leaves) for x in (loss, expected))
    assert_close(grads, right, rtol=0, atol=0)

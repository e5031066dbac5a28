"""A3: ranks that share a batch find out that one of them reads other rows; nobody hangs."""

import pytest
import torch
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.cp_utils.batch import make_cp_batch_and_ctx
from dtcp.cp_utils.deepseek_v4_batch import make_dsv4_contiguous_shard_cp_batch_and_ctx
from dtcp.cp_utils.gemma4 import make_contiguous_shard_cp_batch_and_ctx
from dtcp.distributed.mesh import ParallelMesh
from dtcp.huggingface import causal_lm_loss, shard_hf_batch
from dtcp.sequence.buckets import Buckets, MultiplesOf
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.softmax import AllGatherAttention, RingAttention
from tests.harness.attention_parity import mixer_on
from tests.harness.hf_models import Placed
from tests.harness.spmd import spmd

IDS = torch.arange(1, 33).view(2, 16)


def a_batch(change, odd):
    """(batch, documents) of a rank; the odd one has something else."""
    batch = {"input_ids": IDS.clone(), "labels": IDS + 1}
    documents = Documents(((6, 10), (16,)), 16)
    if not odd:
        return batch, documents
    if change == "ids":
        batch["input_ids"][1, 3] += 1
    elif change == "labels":
        batch["labels"][1, 3] += 1
    elif change == "documents":
        documents = Documents(((6, 10), (7, 9)), 16)
    elif change == "length":
        batch = {key: x[:, :12] for key, x in batch.items()}
        documents = Documents(((6, 6), (12,)), 12)
    elif change == "rows":
        batch = {key: x[:1] for key, x in batch.items()}
        documents = Documents(((6, 10),), 16)
    elif change == "keys":
        batch["loss_mask"] = torch.ones(2, 16)
    else:
        batch["input_ids"] = IDS[:, :15]
    return batch, documents


SAID = {
    "ids": "{} has other token ids in row 1",
    "labels": "{} has other labels, positions or other keys in row 1",
    "documents": "{} has other documents in row 1",
    "length": "{} has 2 rows of 12 tokens, not 2 of 16",
    "rows": "{} has 1 rows of 16 tokens, not 2 of 16",
    "keys": "{} has other keys",
    "refused": "{} refused its batch",
}


def refused_everywhere(change, name, odd, call):
    own = change == "refused" and odd
    match = "rows of one length" if own else SAID[change].format(name)
    with pytest.raises(ValueError, match=match):
        call(*a_batch(change, odd))


@pytest.mark.parametrize("change", SAID, ids=lambda change: f"A3-{change}")
@spmd(ranks=2)
def test_rank_that_reads_other_rows_is_named_on_every_rank(mesh, change):
    whole, odd = ParallelMesh.from_device_mesh(mesh), mesh.get_local_rank() == 1

    def shard(batch, documents):
        shard_batch(batch, whole, documents=documents)

    refused_everywhere(change, "cp rank 1", odd, shard)
    refused_everywhere(change, "cp rank 1", odd, shard)
    shard(*a_batch(change, odd=False))


@pytest.mark.parametrize("change", ["ids", "refused"], ids=lambda change: f"A3-{change}")
@spmd(axes={"cp": 2, "tp": 2})
def test_ranks_of_cp_and_tp_hear_of_one_that_differs(mesh, change):
    """Also those whose own cp group and tp group agree."""
    whole = ParallelMesh.from_device_mesh(mesh)
    odd = whole.rank("cp") == 1 and whole.rank("tp") == 1

    def shard(batch, documents):
        shard_batch(batch, whole, documents=documents)

    refused_everywhere(change, "cp rank 1, tp rank 1", odd, shard)
    shard(*a_batch(change, odd=False))


@pytest.mark.parametrize("change", ["ids", "length"], ids=lambda change: f"A3-{change}")
@spmd(axes={"tp": 2})
def test_ranks_of_tp_alone_compare_their_rows(mesh, change):
    whole = ParallelMesh.from_device_mesh(mesh)

    def shard(batch, documents):
        shard_batch(batch, whole, documents=documents)

    refused_everywhere(change, "tp rank 1", whole.rank("tp") == 1, shard)


@pytest.mark.parametrize("other", ["layout", "buckets", "window", "style", "balance"])
@spmd(ranks=2)
def test_rank_that_does_something_else_with_its_rows_is_named_A3(mesh, other):
    """Its tokens would be others, or its exchanges would not end."""
    whole, odd = ParallelMesh.from_device_mesh(mesh), mesh.get_local_rank() == 1

    def shard(odd):
        mask = Causal() & SlidingWindow(3 + (odd and other == "window"))
        style = AllGatherAttention() if odd and other == "style" else RingAttention()
        model = mixer_on(mesh, style, mask)
        layout = Contiguous if odd and other == "layout" else HeadTail
        buckets = Buckets(MultiplesOf(24)) if odd and other == "buckets" else None
        options = {"model": model, "buckets": buckets}
        if other == "balance":
            layout = DocumentBalanced
            options["balance_for"] = SlidingWindow(1, right=0) if odd else Causal()
        shard_batch({"input_ids": IDS}, whole, layout, **options)

    with pytest.raises(ValueError, match="cp rank 1 has another layout, other buckets or another"):
        shard(odd)
    shard(False)


@spmd(ranks=3)
def test_every_entry_compares_the_ranks_A3(mesh):
    whole, odd = ParallelMesh.from_device_mesh(mesh), mesh.get_local_rank() == 2
    model = Placed()
    batch = {"input_ids": IDS[:, :12].clone(), "labels": IDS[:, :12].clone()}
    if odd:
        batch["input_ids"][0, 5] = 99
    axis, lengths = mesh["cp"], torch.tensor([[12], [12]])
    slots = {"seq_lens": lengths, "seq_lens_padded": lengths}
    calls = {
        "hf": lambda: shard_hf_batch(batch, whole, model=model),
        "loss": lambda: causal_lm_loss(model, batch, whole),
        "cp_utils": lambda: make_cp_batch_and_ctx(mesh, batch),
        "thd": lambda: make_cp_batch_and_ctx(mesh, {**batch, **slots}, use_te=True),
        "dsv4": lambda: make_dsv4_contiguous_shard_cp_batch_and_ctx(axis, None, batch),
        "gemma4": lambda: make_contiguous_shard_cp_batch_and_ctx(axis, None, batch),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match="cp rank 2 has other token ids in row 0"):
            call()


@spmd(ranks=2)
def test_one_argument_turns_the_comparison_off_A3(mesh):
    """Then each rank's part is of its own rows, as a caller may want who knows better."""
    whole = ParallelMesh.from_device_mesh(mesh)
    ids = IDS + mesh.get_local_rank()
    local, sharded = shard_batch({"input_ids": ids}, whole, compare_ranks=False)
    assert_close(local["input_ids"], sharded.layout.shard(ids, mesh.get_local_rank(), dim=1))


@spmd(ranks=2)
def test_every_kind_of_key_is_compared_A3(mesh):
    """Vectors, several axes, flags and further keys; a difference in any is found."""
    whole, odd = ParallelMesh.from_device_mesh(mesh), mesh.get_local_rank() == 1
    base = {
        "inputs_embeds": torch.ones(2, 16, 3, dtype=torch.bfloat16),
        "position_ids": torch.arange(16).expand(3, 2, 16).clone(),
        "padding_mask": torch.arange(16).expand(2, 16) > 13,
        "block": torch.zeros(2, 16, dtype=torch.int64),
    }
    shard_batch(base, whole)
    for key in base:
        batch = {name: x.clone() for name, x in base.items()}
        if odd:
            where = (0, 0, 15) if key == "position_ids" else (0, 13)
            batch[key][where] = not batch[key][where] if key == "padding_mask" else 7
        with pytest.raises(ValueError, match="cp rank 1 has other"):
            shard_batch(batch, whole)


@pytest.mark.parametrize("length", [16, 13])
@spmd(ranks=(2, 4))
def test_loss_that_every_rank_computes_alike_has_its_own_gradient_A7(mesh, ranks, length):
    """Of pooled tokens; the plain gather counts such a loss once for every rank."""
    whole = ParallelMesh.from_device_mesh(mesh)
    ids = torch.arange(2 * length).view(2, length)
    _, sharded = shard_batch({"input_ids": ids}, whole)
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)

    def loss(hidden):
        return hidden.softmax(1).square().sum(1).prod(-1).sum()

    expected = loss(x)
    (truth,) = torch.autograd.grad(expected, x)
    local = sharded.shard(x.detach()).requires_grad_()
    actual = loss(sharded.gather(local, replicated_loss=True))
    assert_close(actual, expected)
    (grad,) = torch.autograd.grad(actual, local)
    assert_close(grad, sharded.shard(truth))
    (summed,) = torch.autograd.grad(loss(sharded.gather(local)), local)
    assert_close(summed, ranks * grad)

"""transformers' own DeepSeek-V4: the unmodified class, which attends to compressed entries.

Its compressors pool the windows of a row, wherever documents start, so packed rows are held against
one document at a time.
"""

from functools import cache

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.compile import count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import install_mixers
from dtcp.huggingface.registry import MIXER
from dtcp.labels import shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.mixer import ClaimedMixer
from dtcp.mixer_metadata import batch_metadata
from dtcp.parallelize import Compile, SelectiveCheckpoint, parallelize_hf
from dtcp.parallelize.plans.mixer_styles import carried_out_by
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import AllGatherAttention, HaloAttention, RingAttention, UlyssesAttention
from dtcp.sparse import CompressedSparseCP, SparseShape
from dtcp.sparse.mixer import CompressedSparseAttention, Compression
from tests.harness import hf_deepseek_v4 as published
from tests.harness.parity import gradients, summed
from tests.harness.spmd import spmd

SEQ_LEN = 48
ROWS = ((19, 3, 23), (35, 13))
"""Unaligned with windows and shards; one shorter than a window; padding in a row."""
SMALL = {
    "num_hidden_layers": 3,
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    ],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    "index_topk": 3,
    "num_hash_layers": 1,
    "n_routed_experts": 4,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 2,
}
BOUND = 1e-5
"""Relative error where graphs are compiled: there casts to fp32 are what they are."""


def documents():
    return Documents(ROWS, SEQ_LEN)


@cache
def truth():
    """Ids, logits, loss and gradients of the unmodified model, document by document, in fp64."""
    model = published.build(**SMALL)
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, 64, (len(ROWS), SEQ_LEN), generator=generator)
    logits = published.one_by_one(model, input_ids, documents())
    loss = F.cross_entropy(logits.flatten(0, 1), shift_labels(input_ids, documents()).flatten())
    loss.backward()
    return input_ids, logits.detach(), loss.detach(), gradients(model)


def assert_parity(degrees, layout=HeadTail, *, exact=True, experts="eager", **options):
    """Assert that logits, loss and all gradients are those of the unmodified model."""
    input_ids, expected_logits, expected_loss, expected = truth()
    model = published.build(**SMALL)
    model.set_experts_implementation(experts)
    mesh = ParallelMesh.from_degrees(degrees, "cpu")
    parallelize_hf(model, mesh, **options)
    mine = slice(mesh.rank("batch"), None, mesh.size("batch"))
    packed = documents()
    batch = {
        "input_ids": input_ids[mine],
        "labels": shift_labels(input_ids, packed)[mine],
        "position_ids": packed.position_ids()[mine],
    }
    packed = Documents(ROWS[mine], SEQ_LEN)
    local, sharded = shard_batch(batch, mesh, layout, model=model, documents=packed)
    labels, traffic = local.pop("labels"), {}
    with published.in_fp64() if exact else count_graphs() as graphs:
        with count_traffic() as traffic["forward"]:
            logits = model(**local, attn_metadata=sharded.attn_metadata).logits
        share = token_mean_loss(logits, labels, global_token_count(labels, mesh.loss))
        with count_traffic() as traffic["backward"]:
            share.backward()
    assert exact or graphs.breaks == 0
    near = {} if exact else {"rtol": BOUND, "atol": BOUND}
    logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
    real = sharded.shard((packed.document() >= 0)[..., None])
    assert_close(logits * real, sharded.shard(expected_logits[mine]), **near)
    assert_close(summed(share, mesh), expected_loss, **near)
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradient is None) == (actual[name] is None) == (".indexer." in name), name
        if gradient is not None:
            scale = 1.0 if exact else gradient.abs().max()
            mine_too = actual[name].reshape(gradient.shape)
            assert_close(mine_too / scale, gradient / scale, **near, msg=lambda m, n=name: n + m)
    return model, sharded, traffic


@pytest.mark.slow_where(lambda ranks: ranks != 2)
@spmd(ranks=(1, 2, 3, 4))
def test_unmodified_deepseek_v4_equals_itself_document_by_document(mesh, ranks):
    """Logits and all gradients in fp64; what travels is what the formula says."""
    model, sharded, traffic = assert_parity(Degrees(cp=ranks))
    shape = SparseShape(len(ROWS), 32, 16, 8)
    mixers = [each for each in model.modules() if isinstance(each, ClaimedMixer)]
    assert [type(each.style) for each in mixers] == [CompressedSparseCP] * (3 if ranks > 1 else 0)
    of_rank = (sharded.coords, sharded.layout, mesh.get_local_rank(), shape)
    moved = [each.style.received(each, *of_rank) for each in mixers]
    assert traffic["forward"].received == sum(each.forward for each in moved)
    assert traffic["backward"].received == sum(each.backward for each in moved)


@pytest.mark.slow
@spmd(ranks=4)
def test_unmodified_deepseek_v4_beside_tp_and_fsdp(mesh):
    assert_parity(Degrees(cp=2, tp=2), experts="batched_mm")
    assert_parity(Degrees(dp_shard=2, cp=2), Contiguous, attention=AllGatherAttention())
    assert_parity(Degrees(cp=4), DocumentBalanced)


@pytest.mark.slow
@spmd(ranks=2)
def test_unmodified_deepseek_v4_compiled_and_recomputed(mesh):
    options = {"compile": Compile("aot_eager"), "activation_checkpoint": SelectiveCheckpoint()}
    assert_parity(Degrees(cp=2), PerDocument, exact=False, experts="batched_mm", **options)


def test_layers_have_the_mixers_that_they_need():
    """The window alone, entries that an indexer picks, and entries that are all read."""
    model = published.build(**SMALL)
    install_mixers(model)
    mixers = [layer.self_attn.get_submodule(MIXER) for layer in model.model.layers]
    assert all(type(mixer) is CompressedSparseAttention for mixer in mixers)
    compressions = [None, Compression(4, overlap=True, selected=3), Compression(8)]
    assert [mixer.compression for mixer in mixers] == compressions
    assert {(mixer.window, mixer.scale) for mixer in mixers} == {(8, 32**-0.5)}


def test_what_packed_rows_cannot_be_read_by_is_refused():
    model = published.build(**SMALL)
    install_mixers(model)
    metadata = batch_metadata(model, documents())
    ids, position_ids = torch.ones(len(ROWS), SEQ_LEN).long(), documents().position_ids()
    batch = {"input_ids": ids, "position_ids": position_ids, "attn_metadata": metadata}
    with pytest.raises(ValueError, match="position_ids are those of its batch"):
        model(**{**batch, "position_ids": position_ids + 1})
    with pytest.raises(ValueError, match=r"cache .* have no sharded form"):
        model(**batch, use_cache=True)
    with pytest.raises(ValueError, match="positions that count a document's tokens from 0"):
        batch_metadata(model, documents(), position_ids=position_ids + 1)


def test_a_strategy_for_all_keys_of_a_query_is_refused():
    surveyed, *_ = install_mixers(published.build(**SMALL)).attentions
    for style in (UlyssesAttention(), HaloAttention(7), RingAttention(reduce_dtype=torch.float32)):
        with pytest.raises(ValueError, match=r"in a way of their own .* leave attention out"):
            carried_out_by(surveyed, style)
    given = AllGatherAttention(ranks_per_node=2)
    assert carried_out_by(surveyed, given) == CompressedSparseCP(ranks_per_node=2)


def test_entries_beside_all_keys_are_refused():
    """A window so wide that it counts as none."""
    model = published.build(**SMALL, sliding_window=2**21)
    with pytest.raises(ValueError, match=r"read beside a window .* give its config a sliding_w"):
        install_mixers(model)

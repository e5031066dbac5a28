"""Packed rows without a batch dim: what they hold, who gets which tokens, attention on them."""

from itertools import chain, pairwise

import pytest
import torch
from torch.testing import assert_close

from dtcp.cp_utils import _shard_thd_chunk_for_te, make_cp_batch_and_ctx, make_cp_batch_for_te
from dtcp.sequence.masks import Bidirectional, Causal
from dtcp.softmax import AllGatherAttention, RingAttention
from dtcp.thd import partition_indices, thd_layout, to_thd
from dtcp.thd_attention import PackedAttention
from tests.harness import reference
from tests.harness.spmd import spmd

LENGTHS = ((22, 3), (48, -1000), (5, 24))
SLOTS = ((24, 24), (48, -1000), (24, 24))
SEQ_LEN, ROWS = 48, 3
REAL, ALL_SLOTS = (22, 3, 48, 5, 24), (24, 24, 48, 24, 24)
TOTAL = ROWS * SEQ_LEN


def rows(**more):
    ids = torch.arange(ROWS * SEQ_LEN).view(ROWS, SEQ_LEN) + 1
    lengths = {"seq_lens": torch.tensor(LENGTHS), "seq_lens_padded": torch.tensor(SLOTS)}
    return {"input_ids": ids, "labels": ids + 100, **lengths, **more}


def te_partition(cu_seqlens, n, rank):
    """Transformer Engine's rule, token by token: chunk c of 2n goes to rank min(c, 2n-1-c)."""
    taken = []
    for start, stop in pairwise(cu_seqlens):
        chunk = (stop - start) // (2 * n)
        for index in range(start, stop):
            part = (index - start) // chunk
            if min(part, 2 * n - 1 - part) == rank:
                taken.append(index)
    return taken


def bounds(lengths):
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_partition_is_transformer_engines(n):
    cu_seqlens = torch.tensor([*bounds(ALL_SLOTS), -1000, -1000], dtype=torch.int32)
    ranks = [partition_indices(cu_seqlens, TOTAL, n, rank).tolist() for rank in range(n)]
    assert ranks == [te_partition(bounds(ALL_SLOTS), n, rank) for rank in range(n)]
    assert sorted(chain(*ranks)) == list(range(TOTAL))


def test_rows_become_one_stretch_of_slots():
    batch = to_thd(rows())
    assert_close(batch["input_ids"], torch.arange(TOTAL) + 1)
    assert batch["cu_seqlens"].tolist() == bounds(REAL)
    assert batch["cu_seqlens_padded"].tolist() == bounds(ALL_SLOTS)
    assert batch["max_seqlen"] == 48 and batch["qkv_format"] == "thd"
    for key in ("cu_seqlens", "cu_seqlens_padded", "max_seqlen"):
        assert batch[key].dtype == torch.int32
    position_ids = [t for slot in ALL_SLOTS for t in range(slot)]
    padding = [t >= real for real, s in zip(REAL, ALL_SLOTS, strict=True) for t in range(s)]
    assert batch["position_ids"].tolist() == position_ids
    assert batch["padding_mask"].tolist() == padding
    assert "seq_lens" not in batch


def test_what_slots_leave_of_a_row_lengthens_the_last():
    lengths = {"seq_lens": torch.tensor([[3], [4]]), "seq_lens_padded": torch.tensor([[4], [8]])}
    ids = torch.ones(2, 8).long()
    batch = to_thd({"input_ids": ids, "labels": ids, **lengths})
    assert batch["cu_seqlens_padded"].tolist() == [0, 8, 16]
    assert batch["padding_mask"].sum() == 9


@pytest.mark.parametrize("num_chunks", [1, 2])
@spmd(ranks=(1, 2, 3, 4))
def test_every_key_and_row_is_kept(mesh, ranks, num_chunks):
    """Three rows in two chunks: padding fills the second; all tokens of all ranks are there."""
    extra = {
        "weights": torch.rand(ROWS, SEQ_LEN),
        "position_ids": torch.arange(3 * ROWS * SEQ_LEN).view(3, ROWS, SEQ_LEN),
        "pixels": torch.rand(5, 2),
        "name": "kept",
    }
    batch = rows(**extra)
    context, local = make_cp_batch_and_ctx(mesh, batch, use_te=True, num_chunks=num_chunks)
    with context():
        pass
    assert local["name"] == "kept" and local["pixels"] is extra["pixels"]
    rank, n = mesh.get_local_rank(), ranks
    per_chunk = {1: [ALL_SLOTS], 2: [(24, 24, 48), (24, 24, 48)]}[num_chunks]
    ids = torch.cat((batch["input_ids"].flatten(), torch.zeros(SEQ_LEN * (num_chunks - 1)).long()))
    weights = torch.cat((extra["weights"].flatten(), torch.zeros(SEQ_LEN * (num_chunks - 1))))
    position_ids = torch.cat(
        (extra["position_ids"].flatten(1), torch.zeros(3, len(ids) - TOTAL).long()), dim=1
    )
    for index, slots in enumerate(per_chunk):
        mine = torch.tensor(te_partition(bounds(slots), n, rank)) + index * 2 * SEQ_LEN
        of = (
            (lambda key, i=index: local[key])
            if num_chunks == 1
            else (lambda key, i=index: local[key][i])
        )
        assert_close(of("input_ids"), ids[mine])
        assert_close(of("weights"), weights[mine])
        assert_close(of("position_ids"), position_ids[:, None, mine])
        assert [x for x in of("cu_seqlens_padded").tolist() if x >= 0] == bounds(slots)
        assert of("max_seqlen") == 48
        assert ((of("input_ids") == 0) <= of("padding_mask")).all()
        assert ((of("input_ids") == 0) == (of("labels") == -100)).all()
    if n > 1:
        assert (local["cp_size"], local["cp_rank"]) == (n, rank)


@spmd(ranks=2)
def test_embeddings_are_sharded_with_their_gradient(mesh):
    embeds = torch.randn(ROWS, SEQ_LEN, 4, requires_grad=True)
    local = make_cp_batch_for_te(mesh, {**rows(), "input_ids": embeds})
    mine = te_partition(bounds(ALL_SLOTS), 2, mesh.get_local_rank())
    assert_close(local["input_ids"], embeds.flatten(0, 1)[mine])
    local["input_ids"].sum().backward()
    assert_close(embeds.grad.flatten(0, 1).sum(1).nonzero().flatten(), torch.tensor(sorted(mine)))


@pytest.mark.slow_where(lambda compiled, ranks, **_: compiled and ranks > 2)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("style", [RingAttention(), AllGatherAttention()])
@spmd(ranks=(1, 2, 3, 4))
def test_attention_on_slots_equals_attention_of_each_document(mesh, ranks, style, compiled):
    """Output and gradients; padding in a slot sees nothing, and nothing sees it."""
    batch, n = to_thd(rows()), ranks
    local = _shard_thd_chunk_for_te(batch, mesh, "thd", -1000, 0)
    q, k, v = (torch.randn(TOTAL, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    grad = torch.randn(TOTAL, 4, 8, dtype=torch.float64)
    mine = torch.tensor(te_partition(bounds(ALL_SLOTS), n, mesh.get_local_rank()))
    real = ~batch["padding_mask"]
    for mask, rule in ((Causal(), reference.causal), (Bidirectional(), reference.bidirectional)):
        seen = reference.visible((ALL_SLOTS,), TOTAL, rule) & real[:, None] & real
        out, _ = reference.attention(q[None], k[None], v[None], seen)
        expected = torch.autograd.grad(out[0], (q, k, v), grad)
        with torch.device("meta"):  # planned on the host, whatever is the default
            attend = PackedAttention.of(local, mesh if n > 1 else None, mask=mask, style=style)
        run = (
            torch.compile(lambda *x, a=attend: a(*x), backend="aot_eager", fullgraph=True)
            if compiled
            else attend
        )
        inputs = [x[mine].detach().requires_grad_() for x in (q, k, v)]
        actual = run(*inputs)
        assert_close(actual, out[0, mine])
        assert_close(
            torch.autograd.grad(actual, inputs, grad[mine]), tuple(x[mine] for x in expected)
        )


@spmd(ranks=2)
def test_bad_batches_are_refused(mesh):
    for match, change in (
        ("either input_ids or inputs_embeds", {"inputs_embeds": torch.zeros(ROWS, SEQ_LEN, 2)}),
        ("either input_ids or inputs_embeds", {"input_ids": None}),
        ("fit their slots", {"seq_lens": torch.tensor(LENGTHS) + 30}),
        ("slots their row", {"seq_lens_padded": torch.tensor(SLOTS) * 2}),
        ("Labels go with tokens", {"labels": torch.zeros(ROWS, 5)}),
        ("equal chunks", {"seq_lens_padded": torch.tensor([(26, 22), (48, -1000), (24, 24)])}),
    ):
        with pytest.raises(ValueError, match=match):
            make_cp_batch_for_te(mesh, {**rows(), **change})
    with pytest.raises(ValueError, match="qkv_format='bshd'"):
        make_cp_batch_for_te(mesh, rows(), qkv_format="bshd")
    with pytest.raises(ValueError, match="num_chunks=4 for 3 rows"):
        make_cp_batch_for_te(mesh, rows(), num_chunks=4)
    for key in ("labels", "seq_lens", "seq_lens_padded"):
        with pytest.raises(KeyError, match=key):
            make_cp_batch_for_te(mesh, {k: x for k, x in rows().items() if k != key})


def test_slots_that_leave_tokens_out_are_refused():
    with pytest.raises(ValueError, match="got 24 tokens in slots, of 32: lengthen the last one"):
        thd_layout([0, 8, 24], 32, 2)


@pytest.mark.parametrize("axes", [(), (3,)])
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_positions_of_one_row_stand_for_all(num_chunks, axes):
    positions = torch.arange(SEQ_LEN).expand(*axes, 1, SEQ_LEN)
    whole = {"seq_lens": torch.full((ROWS, 1), SEQ_LEN)}
    whole["seq_lens_padded"] = whole["seq_lens"]
    of_one, of_each = (
        make_cp_batch_for_te(None, rows(**whole, position_ids=x), num_chunks=num_chunks)
        for x in (positions, positions.expand(*axes, ROWS, SEQ_LEN).contiguous())
    )
    assert_close(of_one["position_ids"], of_each["position_ids"])
    assert of_one["position_ids"].numel() == of_one["input_ids"].numel() * max(1, *axes, 0)

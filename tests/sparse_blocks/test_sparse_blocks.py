"""Attention to the tokens of picked blocks equals dense attention to them, in fp64."""

import functools
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing import assert_close

from dtcp.compile import EagerIsland, count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.kernels.sparse import block_indexer, indexer, reference
from dtcp.mixer_metadata import batch_metadata
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from dtcp.sparse_blocks import (
    BlockIndex,
    ScoredBlockAttention,
    ScoreIndex,
    SparseBlockAttention,
    SparseBlockCP,
    SparseBlockShape,
)
from tests.harness import packings
from tests.harness.attention_parity import LAYOUTS
from tests.harness.picked import Truth, dense, drawn, sharded_for, tokens_of_others_in_sight
from tests.harness.picked import step as picked_step
from tests.harness.spmd import spmd

SEQ_LEN = 48
HEADS, KV_HEADS, DIM, VALUE = 4, 2, 6, 5
INDEX_HEADS, INDEX_DIM, TABLE = 2, 8, 3
BLOCKS, BLOCK_LEN, LOCAL = 2, 3, 1
"""Two heads of an indexer: a quarter of all scores are 0, equal to each other."""
FORMS = pytest.mark.parametrize("scored", [False, True], ids=["pooled", "scored"])
"""Blocks are picked by pooled keys, or by scores of their tokens."""


class Inputs(NamedTuple):
    """All that the mixer reads, of whole rows; the first three have gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    index_q: Tensor
    index_key: Tensor
    table: Tensor


def finish(key: Tensor, table: Tensor) -> Tensor:
    """Something of the mean, and of the first token."""
    return key.tanh() + table.sum(-1, keepdim=True) * 0.2


def inputs(batch: int) -> Inputs:
    """Random ones, on every rank alike."""
    rows = (batch, SEQ_LEN)
    shapes = [
        (*rows, HEADS, DIM),
        (*rows, KV_HEADS, DIM),
        (*rows, KV_HEADS, VALUE),
        (*rows, INDEX_HEADS, INDEX_DIM),
        (*rows, INDEX_DIM),
        (*rows, TABLE),
    ]
    return drawn(Inputs, shapes)


def read(x: Inputs, documents: Documents, number: int) -> Tensor:
    """Which tokens each query reads, from the definition: [B, S, S] bool."""
    out = torch.zeros(documents.batch, SEQ_LEN, SEQ_LEN, dtype=torch.bool)
    for row, lengths in enumerate(documents.lengths):
        start = 0
        for length in lengths:
            for token in range(start, start + length):
                complete = (token + 1 - start) // BLOCK_LEN
                tail = start + complete * BLOCK_LEN
                out[row, token, tail : token + 1] = True
                if not complete:
                    continue
                places = torch.arange(start, tail).view(complete, BLOCK_LEN)
                key = finish(x.index_key[row, places].mean(1), x.table[row, places[:, 0]])
                score = (x.index_q[row, token] @ key.mT).relu().sum(0)
                # Of equal ones the earlier block.
                best = score.sort(descending=True, stable=True).indices[:number]
                out[row, token, places[best].flatten()] = True
            start += length
    return out


def read_by_scores(x: Inputs, documents: Documents, number: int) -> Tensor:
    """The same where tokens are scored, for each head of keys and values: [B, G, S, S] bool."""
    out = torch.zeros(documents.batch, KV_HEADS, SEQ_LEN, SEQ_LEN, dtype=torch.bool)
    for row, lengths in enumerate(documents.lengths):
        for start, length in zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False):
            for head, token in product(range(KV_HEADS), range(start, start + length)):
                score = x.index_key[row, start : token + 1] @ x.index_q[row, token, head]
                best = torch.stack([block.max() for block in score.split(BLOCK_LEN)])
                best[-LOCAL:] = torch.inf
                picked = best.sort(descending=True, stable=True).indices[:number].tolist()
                for first in (start + block * BLOCK_LEN for block in picked):
                    out[row, head, token, first : min(first + BLOCK_LEN, token + 1)] = True
    return out


@functools.cache
@torch.enable_grad()
def truth(packing: packings.Packing, num_shards: int, number: int, scored: bool) -> Truth:
    """Dense attention to the tokens of picked blocks."""
    documents = packing(SEQ_LEN, num_shards)
    x = inputs(documents.batch)
    if scored:
        sees = read_by_scores(x, documents, number).repeat_interleave(HEADS // KV_HEADS, dim=1)
    else:
        sees = read(x, documents, number)[:, None]
    k, v = (each.repeat_interleave(HEADS // KV_HEADS, dim=2) for each in (x.k, x.v))
    return dense(x, documents, sees, (k, v), trained=3)


class Layer(nn.Module):
    """The mixer between per-token operations."""

    def __init__(self, number: int = BLOCKS, *, scored: bool = False) -> None:
        super().__init__()
        self.scored, pooled = scored, SparseBlockAttention(number, BLOCK_LEN, scale=0.3)
        by_scores = ScoredBlockAttention(number, BLOCK_LEN, LOCAL, scale=0.3)
        self.mixer = by_scores if scored else pooled

    def forward(self, x: Inputs, attn_metadata: object) -> Tensor:
        index = BlockIndex(-x.index_q, x.index_key * 1, x.table, lambda k, t: -finish(k, t))
        if self.scored:
            index = ScoreIndex(-x.index_q, -x.index_key)
        return -self.mixer(-x.q, -x.k, -x.v, index, attn_metadata)


def claimed(mesh, style, *, scored: bool = False) -> Layer:
    layer = Layer(scored=scored)
    parallelize_module(layer, mesh, {"mixer": style})
    return layer


def step(layer, mesh, packing, layout, *, call=None):
    ranks = mesh["cp"].size()
    expected = truth(packing, ranks, BLOCKS, layer.scored)
    return picked_step(layer, mesh, expected, packing(SEQ_LEN, ranks), layout, call=call)


@pytest.mark.parametrize("packing", [packings.across_borders, packings.two_rows])
@pytest.mark.parametrize("number", [1, BLOCKS, SEQ_LEN])
@FORMS
def test_one_device_equals_dense_attention_to_what_is_picked(packing, number, scored, monkeypatch):
    """In one tile; and, cut again, in many. All that is in sight where more could be picked."""
    expected, layer = truth(packing, 1, number, scored), Layer(number, scored=scored)
    mine = Inputs(*(x.clone().requires_grad_() for x in expected.inputs))
    metadata = batch_metadata(layer, packing(SEQ_LEN, 1))
    for most in (2**24, 3 * SEQ_LEN):
        monkeypatch.setattr(reference, "MAX_TILE_SCORES", most)
        monkeypatch.setattr(indexer, "MAX_INDEX_SCORES", most)
        monkeypatch.setattr(block_indexer, "MAX_INDEX_SCORES", most)
        out = layer(mine, metadata)
        assert_close(out, expected.out)
        grads = torch.autograd.grad(out, mine[:3], expected.grad_out)
        assert_close(grads, expected.grads)


def test_picked_blocks_are_fewer_than_all_and_scores_are_tied():
    """What the other tests would not tell apart."""
    x, documents = inputs(1), packings.one_document(SEQ_LEN, 1)
    sees = read(x, documents, BLOCKS)
    most = [min(i + 1, BLOCKS * BLOCK_LEN + (i + 1) % BLOCK_LEN) for i in range(SEQ_LEN)]
    assert sees.sum(-1).tolist() == [most]
    firsts = torch.arange(0, SEQ_LEN, BLOCK_LEN)
    key = finish(x.index_key[0].unflatten(0, (-1, BLOCK_LEN)).mean(1), x.table[0, firsts])
    score = torch.einsum("shd,pd->shp", x.index_q[0], key).relu().sum(1)
    may = firsts + BLOCK_LEN - 1 <= torch.arange(SEQ_LEN)[:, None]
    picked = sees[0][:, firsts] & may
    least = score.masked_fill(~picked, torch.inf).amin(-1, keepdim=True)
    assert (may & ~picked & (score == least)).any()


@pytest.mark.slow_where(lambda ranks, scored: ranks != 2)
@FORMS
@spmd(ranks=(1, 2, 3, 4))
def test_ranks_equal_dense_attention_and_receive_what_they_may_read(mesh, scored, ranks):
    """Packed rows, padding, rows packed differently, every layout; bytes counted token by token."""
    layer = claimed(mesh, style := SparseBlockCP(), scored=scored)
    layouts = (*LAYOUTS, DocumentBalanced) if ranks in (2, 4) else (HeadTail,)
    rank = mesh["cp"].get_local_rank()
    for number, layout in enumerate(layouts):
        rows = [packings.across_borders, packings.last_shard_padding][number % 2]
        several = packings.two_rows if layout in (Contiguous, HeadTail) else packings.equal_rows
        for packing in (rows, several):
            sharded, there, back = step(layer, mesh, packing, layout)
            assert (there.received, back.received) == of_formula(style, layer, sharded, rank)
    sharded, there, back = step(layer, mesh, packings.across_borders, Contiguous)
    others = tokens_of_others_in_sight(packings.across_borders(SEQ_LEN, ranks), ranks)
    of_token = KV_HEADS * (DIM + VALUE) * 8
    assert there.received == others[rank] * (of_token + of_index(layer) * 8)
    assert back.received == ([0, *others, 0][rank + 2] if ranks > 1 else 0) * of_token


def of_formula(style, layer, sharded, rank):
    """Bytes received, forward and backward."""
    shape = SparseBlockShape(sharded.coords.rows, KV_HEADS, DIM, VALUE, of_index(layer), 8)
    received = style.received(layer.mixer, sharded.coords, sharded.layout, rank, shape)
    return received.forward, received.backward


def of_index(layer: Layer) -> int:
    """Channels of an indexer that travel."""
    return INDEX_DIM if layer.scored else INDEX_DIM + TABLE


@FORMS
@spmd(ranks=2)
def test_compiled_layer_is_one_graph_and_equals_dense_attention(mesh, scored):
    layer = claimed(mesh, SparseBlockCP(), scored=scored)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with count_graphs() as graphs:
        for packing in (packings.across_borders, packings.one_document):
            step(layer, mesh, packing, HeadTail, call=compiled)
    assert (graphs.graphs, graphs.breaks) == (1, 0)


@pytest.mark.slow
@FORMS
@spmd(ranks=4)
def test_layer_on_two_nodes_on_islands_and_in_wide_sums_equals_dense_attention(mesh, scored):
    rank = mesh["cp"].get_local_rank()
    for style in (
        SparseBlockCP(ranks_per_node=2),
        SparseBlockCP(boundary=EagerIsland()),
        SparseBlockCP(reduce_dtype=torch.float32),
    ):
        layer = claimed(mesh, style, scored=scored)
        for layout in (HeadTail, PerDocument):
            sharded, there, back = step(layer, mesh, packings.before_borders, layout)
            assert (there.received, back.received) == of_formula(style, layer, sharded, rank)


@spmd(ranks=2)
def test_gradients_of_keys_are_summed_unrounded_where_asked(mesh):
    """What goes home is fp32: twice the bytes back, in bf16. What comes travels in q's dtype."""
    packing, received = packings.one_document, []
    for dtype in (None, torch.float32):
        layer = claimed(mesh, SparseBlockCP(reduce_dtype=dtype))
        sharded = sharded_for(layer, mesh, packing(SEQ_LEN, 2), HeadTail)
        local = (sharded.shard(x).detach().bfloat16().requires_grad_() for x in inputs(1))
        mine = Inputs(*local)
        with count_traffic() as there:
            out = layer(mine, sharded.attn_metadata)
        with count_traffic() as back:
            grads = torch.autograd.grad(out.float().sum(), mine[:3])
        assert {x.dtype for x in (out, *grads)} == {torch.bfloat16}
        received.append((there.received, back.received))
    assert received[1] == (received[0][0], 2 * received[0][1])
    assert min(received[0]) > 0


@FORMS
def test_rows_shorter_than_a_block_are_read_whole(scored):
    layer = Layer(scored=scored)
    mine = Inputs(*(x[:, :2] for x in inputs(1)))
    out = layer(mine, batch_metadata(layer, Documents.single(1, 2)))
    k, v = (each.repeat_interleave(2, dim=2).transpose(1, 2) for each in (mine.k, mine.v))
    expected = nn.functional.scaled_dot_product_attention(
        mine.q.transpose(1, 2), k, v, is_causal=True, scale=0.3
    )
    assert_close(out, expected.transpose(1, 2))


def test_operands_that_do_not_fit_are_refused():
    x, layer = inputs(1), Layer()
    metadata = batch_metadata(layer, Documents.single(1, SEQ_LEN))
    index = BlockIndex(x.index_q, x.index_key, x.table, finish)
    for wrong in (
        (x.q, x.k[..., :1], x.v, index),
        (x.q, x.k, x.v[:, :, :1], index),
        (x.q[:, :, :3], x.k, x.v, index),
        (x.q, x.k, x.v, index._replace(key=x.index_key[..., :1])),
        (x.q, x.k, x.v, index._replace(table=x.table[:, :8])),
    ):
        with pytest.raises(ValueError, match=r"by heads, and an index of them, got shapes"):
            layer.mixer(*wrong, metadata)
    with pytest.raises(TypeError, match="index_q"):
        layer.mixer(x.q, x.k, x.v, index._replace(q=None), metadata)
    with pytest.raises(TypeError, match=r"one floating dtype, got q.dtype=torch.float64, k.dtype="):
        layer.mixer(x.q, x.k.float(), x.v, index, metadata)
    keys = ScoreIndex(x.index_q[:, :, :1], x.index_key)
    with pytest.raises(
        ValueError, match=r"give .* index.q \[B, L, G, W\] and index.key \[B, L, W\]"
    ):
        Layer(scored=True).mixer(x.q, x.k, x.v, keys, metadata)
    with pytest.raises(ValueError, match=r"got num_local=3 of num_blocks=2: pick as many"):
        ScoredBlockAttention(2, 4, 3)
    with pytest.raises(ValueError, match="block_len >= 1"):
        SparseBlockAttention(1, 0)
    with pytest.raises(ValueError, match="finite"):
        SparseBlockAttention(1, 1, scale=float("inf"))
    with pytest.raises(ValueError, match="gradients of keys and values in the model's dtype"):
        SparseBlockCP(reduce_dtype=torch.bfloat16)


@spmd(ranks=2)
def test_metadata_of_another_batch_are_refused(mesh):
    one = Layer()
    with pytest.raises(ValueError, match="An indexer reads the metadata of its own batch"):
        one(inputs(1), batch_metadata(one, Documents.single(1, 32)))
    scored = Layer(scored=True)
    with pytest.raises(ValueError, match="An indexer of blocks reads the metadata of its own"):
        scored(inputs(1), batch_metadata(scored, Documents.single(1, 32)))
    layer = claimed(mesh, SparseBlockCP())
    mine = Inputs(*(x[:, : SEQ_LEN // 2] for x in inputs(1)))
    for seq_len in (SEQ_LEN // 2, 2 * SEQ_LEN):
        other = sharded_for(layer, mesh, Documents.single(1, seq_len), HeadTail)
        with pytest.raises(ValueError, match="metadata of their own batch, got some for"):
            layer(mine, other.attn_metadata)


def test_coords_are_read_alike_on_one_device_and_on_one_rank():
    """The same blocks and tiles, whether tokens are exchanged or not."""
    coords = Coords.of(packings.two_rows(SEQ_LEN, 1))
    for mixer in (Layer().mixer, Layer(scored=True).mixer):
        alone = mixer.whole_row_metadata(coords)
        one = SparseBlockCP().make_metadata(mixer, coords, Contiguous(SEQ_LEN, 1), 0)
        for name in ("start", "closing", "tiles"):
            assert torch.equal(getattr(alone, name), getattr(one, name))

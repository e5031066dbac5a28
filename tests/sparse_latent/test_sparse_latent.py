"""Attention to the latents of picked tokens equals dense attention to them, in fp64."""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing import assert_close

from dtcp.compile import EagerIsland, count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.kernels.sparse import indexer, reference
from dtcp.mixer_metadata import batch_metadata, mixers_of
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from dtcp.sparse_latent import (
    LightningIndexer,
    SparseLatentAttention,
    SparseLatentCP,
    SparseLatentShape,
)
from tests.harness import packings
from tests.harness.attention_parity import LAYOUTS
from tests.harness.picked import (
    Truth,
    dense,
    drawn,
    keys_of_latents,
    sharded_for,
    tokens_of_others_in_sight,
)
from tests.harness.picked import step as picked_step
from tests.harness.spmd import spmd

SEQ_LEN = 48
HEADS, CONTENT, ROTARY, VALUE, LATENT = 3, 6, 4, 5, 12
INDEX_HEADS, INDEX_DIM, SELECTED = 2, 8, 5
"""Two heads of an indexer: a quarter of all scores are 0, equal to each other."""


OF_HEADS = ("up", "sink")


class Inputs(NamedTuple):
    """All that the mixers read, of whole rows; the first five have gradients."""

    q: Tensor
    latent: Tensor
    rotary: Tensor
    up: Tensor
    sink: Tensor
    index_q: Tensor
    index_weight: Tensor
    index_key: Tensor


def inputs(batch: int) -> Inputs:
    """Random ones, on every rank alike."""
    rows = (batch, SEQ_LEN)
    shapes = [
        (*rows, HEADS, CONTENT + ROTARY),
        (*rows, LATENT),
        (*rows, ROTARY),
        (HEADS, CONTENT + VALUE, LATENT),
        (HEADS,),
        (*rows, INDEX_HEADS, INDEX_DIM),
        (*rows, INDEX_HEADS),
        (*rows, INDEX_DIM),
    ]
    return drawn(Inputs, shapes)


def picked(x: Inputs, documents: Documents, number: int) -> Tensor:
    """Which tokens each query reads, from the definition: [B, S, S] bool."""
    document = documents.document()
    token = torch.arange(SEQ_LEN)
    visible = (document[:, :, None] == document[:, None]) & (document >= 0)[:, :, None]
    visible = visible & (token[:, None] >= token)
    scores = torch.einsum("bshd,btd->bsht", x.index_q, x.index_key).relu()
    score = torch.einsum("bsht,bsh->bst", scores, x.index_weight)
    score = score.masked_fill(~visible, -torch.inf)
    # Of equal ones the earlier token.
    rank = score.sort(descending=True, stable=True).indices.argsort()
    return (rank < number) & visible


@functools.cache
@torch.enable_grad()
def truth(packing: packings.Packing, num_shards: int, number: int, sinks: bool) -> Truth:
    """Keys and values of every token, and dense attention to those that were picked."""
    documents = packing(SEQ_LEN, num_shards)
    x = inputs(documents.batch)
    sees, kv = picked(x, documents, number)[:, None], keys_of_latents(x, CONTENT)
    return dense(x, documents, sees, kv, trained=4 + sinks, sink=x.sink if sinks else None)


class Layer(nn.Module):
    """An indexer and the attention that reads what it picks, between per-token operations."""

    def __init__(self, number: int = SELECTED, *, sinks: bool = False) -> None:
        super().__init__()
        self.indexer, self.attention = LightningIndexer(number), SparseLatentAttention(scale=0.3)
        self.sinks = sinks

    def forward(self, x: Inputs, attn_metadata: object) -> Tensor:
        selected = self.indexer(-x.index_q, x.index_weight, -x.index_key, attn_metadata)
        operands = (-x.q, x.latent, -x.rotary, -x.up, selected, attn_metadata)
        return -self.attention(*operands, sink=x.sink if self.sinks else None)


def claimed(mesh, style) -> Layer:
    layer = Layer()
    parallelize_module(layer, mesh, {"indexer": style, "attention": style})
    return layer


def step(layer, mesh, packing, layout, *, call=None):
    ranks = mesh["cp"].size()
    expected, documents = truth(packing, ranks, SELECTED, layer.sinks), packing(SEQ_LEN, ranks)
    return picked_step(layer, mesh, expected, documents, layout, weights=OF_HEADS, call=call)


@pytest.mark.parametrize("packing", [packings.across_borders, packings.two_rows])
@pytest.mark.parametrize("number", [1, SELECTED, SEQ_LEN + 1])
@pytest.mark.parametrize("sinks", [False, True])
def test_one_device_equals_dense_attention_to_what_is_picked(packing, number, sinks, monkeypatch):
    """In one tile; and, cut again, in many. All that is in sight where more could be picked."""
    expected, layer = truth(packing, 1, number, sinks), Layer(number, sinks=sinks)
    mine = Inputs(*(x.clone().requires_grad_() for x in expected.inputs))
    metadata = batch_metadata(layer, packing(SEQ_LEN, 1))
    for most in (2**24, 3 * SEQ_LEN):
        monkeypatch.setattr(reference, "MAX_TILE_SCORES", most)
        monkeypatch.setattr(indexer, "MAX_INDEX_SCORES", most)
        out = layer(mine, metadata)
        assert_close(out, expected.out)
        grads = torch.autograd.grad(out, mine[: len(expected.grads)], expected.grad_out)
        assert_close(grads, expected.grads)


def test_picked_tokens_are_fewer_than_all_and_scores_are_tied():
    """What the other tests would not tell apart."""
    x, documents = inputs(1), packings.one_document(SEQ_LEN, 1)
    scores = torch.einsum("bshd,btd->bsht", x.index_q, x.index_key).relu()
    score = torch.einsum("bsht,bsh->bst", scores, x.index_weight)
    read = picked(x, documents, SELECTED)
    assert read.sum(-1).tolist() == [[min(i + 1, SELECTED) for i in range(SEQ_LEN)]]
    least = score.masked_fill(~read, torch.inf).amin(-1, keepdim=True)
    left_out = ~read & (score == least) & torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()
    assert left_out.any()


@pytest.mark.slow_where(lambda ranks: ranks != 2)
@spmd(ranks=(1, 2, 3, 4))
def test_ranks_equal_dense_attention_and_receive_what_they_may_read(mesh, ranks):
    """Packed rows, padding, rows packed differently, every layout; bytes counted token by token.

    Every second layout with sinks, which are weights and do not travel.
    """
    layer = claimed(mesh, style := SparseLatentCP())
    layouts = (*LAYOUTS, DocumentBalanced) if ranks in (2, 4) else (HeadTail,)
    rank = mesh["cp"].get_local_rank()
    for number, layout in enumerate(layouts):
        rows = [packings.across_borders, packings.last_shard_padding][number % 2]
        several = packings.two_rows if layout in (Contiguous, HeadTail) else packings.equal_rows
        layer.sinks = number % 2 == 1
        for packing in (rows, several):
            sharded, there, back = step(layer, mesh, packing, layout)
            assert (there.received, back.received) == of_formula(style, layer, sharded, rank)
    token_bytes = (INDEX_DIM + LATENT + ROTARY) * 8
    sharded, there, back = step(layer, mesh, packings.across_borders, Contiguous)
    others = tokens_of_others_in_sight(packings.across_borders(SEQ_LEN, ranks), ranks)
    assert there.received == others[rank] * token_bytes
    sent = [0, *others, 0][rank + 2] if ranks > 1 else 0
    assert back.received == sent * (LATENT + ROTARY) * 8


def of_formula(style, layer, sharded, rank):
    """Bytes received, forward and backward, in both exchanges."""
    shape = SparseLatentShape(sharded.coords.rows, LATENT + ROTARY, INDEX_DIM, 8)
    formula = [
        style.received(mixer, sharded.coords, sharded.layout, rank, shape)
        for mixer in (layer.indexer, layer.attention)
    ]
    assert formula[0].backward == 0
    return sum(x.forward for x in formula), sum(x.backward for x in formula)


@spmd(ranks=2)
def test_compiled_layer_is_one_graph_and_equals_dense_attention(mesh):
    layer = claimed(mesh, SparseLatentCP())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    layer.sinks = True
    with count_graphs() as graphs:
        for packing in (packings.across_borders, packings.one_document):
            step(layer, mesh, packing, HeadTail, call=compiled)
    assert (graphs.graphs, graphs.breaks) == (1, 0)


@pytest.mark.slow
@spmd(ranks=4)
def test_layer_on_two_nodes_on_islands_and_in_wide_sums_equals_dense_attention(mesh):
    rank = mesh["cp"].get_local_rank()
    for style in (
        SparseLatentCP(ranks_per_node=2),
        SparseLatentCP(boundary=EagerIsland()),
        SparseLatentCP(reduce_dtype=torch.float32),
    ):
        layer = claimed(mesh, style)
        for layout in (HeadTail, PerDocument):
            sharded, there, back = step(layer, mesh, packings.before_borders, layout)
            assert (there.received, back.received) == of_formula(style, layer, sharded, rank)


@spmd(ranks=2)
def test_gradients_of_latents_are_summed_unrounded_where_asked(mesh):
    """What goes home is fp32: twice the bytes back, in bf16. What comes travels in q's dtype.

    Latents in fp32 are those of a tp group that sums their gradients, or of norms under autocast.
    """
    packing, received = packings.one_document, []
    for dtype, of_latents in (
        (None, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
    ):
        layer = claimed(mesh, SparseLatentCP(reduce_dtype=dtype))
        sharded = sharded_for(layer, mesh, packing(SEQ_LEN, 2), HeadTail)
        whole = inputs(1)._asdict().items()
        local = (x if name in OF_HEADS else sharded.shard(x) for name, x in whole)
        mine = Inputs(*(x.detach().bfloat16() for x in local))
        latents = (x.to(of_latents) for x in (mine.latent, mine.rotary))
        mine = Inputs(mine.q, *latents, *mine[3:])
        mine = Inputs(*(x.requires_grad_() for x in mine))
        with count_traffic() as there:
            out = layer(mine, sharded.attn_metadata)
        with count_traffic() as back:
            grads = torch.autograd.grad(out.float().sum(), mine[:4])
        assert [x.dtype for x in (out, *grads)] == [torch.bfloat16, *(x.dtype for x in mine[:4])]
        received.append((there.received, back.received))
    assert received[1] == received[2] == (received[0][0], 2 * received[0][1])
    assert min(received[0]) > 0


def test_the_indexer_and_its_attention_share_their_metadata():
    layer = Layer()
    assert len({mixer.metadata_key for mixer in mixers_of(layer)}) == 1
    assert len(batch_metadata(layer, Documents.single(1, 8))) == 1


def test_operands_that_do_not_fit_are_refused():
    x, layer = inputs(1), Layer()
    metadata = batch_metadata(layer, Documents.single(1, SEQ_LEN))
    for wrong in (
        (x.index_weight[..., :1], x.index_key),
        (x.index_weight, x.index_key[..., :1]),
        (x.index_weight, x.index_key[:, :8]),
    ):
        with pytest.raises(ValueError, match="a weight for each head and a key for each token"):
            layer.indexer(x.index_q, *wrong, metadata)
    selected = layer.indexer(x.index_q, x.index_weight, x.index_key, metadata)
    operands = (x.q, x.latent, x.rotary, x.up)
    with pytest.raises(ValueError, match=r"selected of torch\.int64"):
        layer.attention(*operands, selected.long(), metadata)
    with pytest.raises(ValueError, match=r"shape \(1, 8, 5\)"):
        layer.attention(*operands, selected[:, :8], metadata)
    with pytest.raises(ValueError, match=r"one score per query head, got sink\.shape=\(2,\)"):
        layer.attention(*operands, selected, metadata, sink=x.sink[:2])
    with pytest.raises(TypeError, match="selected"):
        layer.attention(*operands, None, metadata)
    with pytest.raises(ValueError, match="num_selected >= 1"):
        LightningIndexer(0)
    with pytest.raises(ValueError, match="finite"):
        SparseLatentAttention(scale=float("inf"))
    with pytest.raises(ValueError, match="fp32"):
        SparseLatentCP(reduce_dtype=torch.bfloat16)


@spmd(ranks=2)
def test_metadata_of_another_batch_are_refused(mesh):
    """They would bring other tokens than the queries', before anyone looks at a size."""
    x, one = inputs(1), Layer()
    shorter = batch_metadata(one, Documents.single(1, 32))
    with pytest.raises(ValueError, match="An indexer reads the metadata of its own batch"):
        one(x, shorter)
    layer = claimed(mesh, SparseLatentCP())
    own, *others = (
        sharded_for(layer, mesh, Documents.single(1, seq_len), HeadTail)
        for seq_len in (SEQ_LEN, SEQ_LEN // 2, 2 * SEQ_LEN)
    )
    local = Inputs(*(v if n in OF_HEADS else own.shard(v) for n, v in x._asdict().items()))
    selected = layer.indexer(*local[5:], own.attn_metadata)
    for other in others:
        for call in (
            lambda: layer.indexer(*local[5:], other.attn_metadata),  # noqa: B023
            lambda: layer.attention(*local[:4], selected, other.attn_metadata),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="metadata of their own batch, got some for"):
                call()


def test_coords_are_read_alike_on_one_device_and_on_one_rank():
    """The same runs and tiles, whether tokens are exchanged or not."""
    coords = Coords.of(packings.two_rows(SEQ_LEN, 1))
    alone = Layer().attention.whole_row_metadata(coords)
    style = SparseLatentCP()
    one = style.make_metadata(Layer().attention, coords, Contiguous(SEQ_LEN, 1), 0)
    for name in ("last", "token_index", "run", "readers", "tiles"):
        assert torch.equal(getattr(alone, name), getattr(one, name))

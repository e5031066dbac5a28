"""Attention to the tokens of picked pools equals dense attention to them, in fp64."""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing import assert_close

from dtcp.compile import count_graphs
from dtcp.mixer_metadata import batch_metadata, mixers_of
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from dtcp.sequence.per_document import PerDocument
from dtcp.sparse_latent import (
    PooledIndexer,
    SparseLatentAttention,
    SparseLatentCP,
    SparseLatentShape,
)
from tests.harness.attention_parity import LAYOUTS
from tests.harness.picked import Truth, dense, drawn, keys_of_latents
from tests.harness.picked import step as picked_step
from tests.harness.spmd import spmd

SEQ_LEN, POOL, POOLS = 48, 3, 2
HEADS, CONTENT, VALUE, LATENT, INDEX_HEADS, INDEX_DIM = 3, 6, 5, 12, 2, 8
WHOLE = ("up", "bias")
ROWS = {
    # Documents of odd lengths, some shorter than a pool, which borders cut; padding behind them.
    "one row": ((7, 2, 17, 1, 15, 3),),
    "two rows": ((29, 2, 10), (1, 2, 3, 4, 5, 31)),
    "alike": ((11, 2, 35), (11, 2, 35)),
    "one document": ((48,),),
}


class Inputs(NamedTuple):
    """All that the mixers read, of whole rows; the first four have gradients."""

    q: Tensor
    latent: Tensor
    rotary: Tensor
    up: Tensor
    index_q: Tensor
    index_weight: Tensor
    index_key: Tensor
    gate: Tensor
    bias: Tensor


def inputs(batch: int) -> Inputs:
    shapes = [
        (batch, SEQ_LEN, HEADS, CONTENT),
        (batch, SEQ_LEN, LATENT),
        (batch, SEQ_LEN, 0),
        (HEADS, CONTENT + VALUE, LATENT),
        (batch, SEQ_LEN, INDEX_HEADS, INDEX_DIM),
        (batch, SEQ_LEN, INDEX_HEADS),
        (batch, SEQ_LEN, INDEX_DIM),
        (batch, SEQ_LEN, INDEX_DIM),
        (POOL, INDEX_DIM),
    ]
    return drawn(Inputs, shapes)


def read_of_document(x: Inputs, row: int, begin: int, end: int) -> Tensor:
    """Which tokens each query of one document reads, from the definition: [l, l] bool."""
    length, read = end - begin, torch.zeros(end - begin, end - begin, dtype=torch.bool)
    pools = []
    for start in range(begin, end - POOL + 1, POOL):
        own = slice(start, start + POOL)
        weights = (x.gate[row, own] + x.bias).softmax(0)
        pools.append((weights * x.index_key[row, own]).sum(0))
    for query in range(length):
        complete = (query + 1) // POOL
        scores = [
            sum(
                float(x.index_weight[row, begin + query, h])
                * max(0.0, float(x.index_q[row, begin + query, h] @ key))
                for h in range(INDEX_HEADS)
            )
            for key in pools[:complete]
        ]
        # Of equal ones the earlier.
        best = sorted(range(complete), key=lambda pool: (-scores[pool], pool))[:POOLS]
        for pool in best:
            read[query, pool * POOL : (pool + 1) * POOL] = True
        read[query, complete * POOL : query + 1] = True
    return read


@functools.cache
@torch.enable_grad()
def truth(rows: str) -> Truth:
    """Keys and values of every token, and dense attention to those that are read."""
    x = inputs(len(ROWS[rows]))
    read = torch.zeros(len(ROWS[rows]), SEQ_LEN, SEQ_LEN, dtype=torch.bool)
    for row, lengths in enumerate(ROWS[rows]):
        begin = 0
        for length in lengths:
            own = slice(begin, begin + length)
            read[row, own, own] = read_of_document(x, row, begin, begin + length)
            begin += length
    documents, kv = Documents(ROWS[rows], SEQ_LEN), keys_of_latents(x, CONTENT)
    return dense(x, documents, read[:, None], kv, trained=4)


class Layer(nn.Module):
    """An indexer and the attention that reads what it picks, between per-token operations."""

    def __init__(self) -> None:
        super().__init__()
        self.indexer, self.attention = PooledIndexer(POOLS, POOL), SparseLatentAttention(scale=0.3)

    def forward(self, x: Inputs, attn_metadata: object) -> Tensor:
        index = (-x.index_q, x.index_weight, -x.index_key, x.gate, x.bias)
        selected = self.indexer(*index, attn_metadata)
        return -self.attention(-x.q, x.latent, x.rotary, -x.up, selected, attn_metadata)


def claimed(mesh, style) -> Layer:
    layer = Layer()
    parallelize_module(layer, mesh, {"indexer": style, "attention": style})
    return layer


def step(layer, mesh, rows, layout, *, call=None):
    documents = Documents(ROWS[rows], SEQ_LEN)
    return picked_step(layer, mesh, truth(rows), documents, layout, weights=WHOLE, call=call)


@pytest.mark.parametrize("rows", ROWS)
def test_one_device_equals_dense_attention_to_picked_pools(rows):
    expected, layer = truth(rows), Layer()
    mine = Inputs(*(x.clone().requires_grad_() for x in expected.inputs))
    out = layer(mine, batch_metadata(layer, Documents(ROWS[rows], SEQ_LEN)))
    assert_close(out, expected.out)
    grads = torch.autograd.grad(out, mine[:4], expected.grad_out)
    assert_close(grads, expected.grads)


def test_few_of_the_pools_are_picked_and_scores_are_tied():
    """What the other tests would not tell apart."""
    x = truth("one document").inputs
    read = read_of_document(x, 0, 0, SEQ_LEN)
    pools, last = SEQ_LEN // POOL, SEQ_LEN - 1
    assert read.sum(-1).tolist() == [
        min((i + 1) // POOL, POOLS) * POOL + (i + 1) % POOL for i in range(SEQ_LEN)
    ]
    assert not read[last, : (pools - POOLS) * POOL].all() and not read[last, -POOLS * POOL :].all()
    tied = torch.einsum("lhd,td->lht", x.index_q[0], x.index_key[0]).relu() == 0
    assert tied.all(1).any()


@pytest.mark.slow_where(lambda ranks: ranks != 2)
@spmd(ranks=(1, 2, 3, 4))
def test_ranks_equal_dense_attention_and_receive_what_the_formula_says(mesh, ranks):
    layer = claimed(mesh, style := SparseLatentCP())
    layouts = (*LAYOUTS, DocumentBalanced) if ranks in (2, 4) else (HeadTail,)
    rank, moved = mesh["cp"].get_local_rank(), 0
    for number, layout in enumerate(layouts):
        several = "two rows" if layout in LAYOUTS[:2] or number == 0 else "alike"
        for rows in ("one row", several, "one document"):
            if layout is HeadTail or rows != "two rows" or layout is LAYOUTS[0]:
                sharded, there, back = step(layer, mesh, rows, layout)
                assert (there.received, back.received) == of_formula(style, layer, sharded, rank)
                moved += there.received
    assert (moved > 0) == (ranks > 1)


def of_formula(style, layer, sharded, rank):
    shape = SparseLatentShape(sharded.coords.rows, LATENT, 2 * INDEX_DIM, 8)
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
    with count_graphs() as graphs:
        for rows in ("one row", "one document"):
            step(layer, mesh, rows, HeadTail, call=compiled)
    assert (graphs.graphs, graphs.breaks) == (1, 0)


@pytest.mark.slow
@spmd(ranks=4)
def test_layer_on_two_nodes_and_in_wide_sums_equals_dense_attention(mesh):
    for style in (SparseLatentCP(ranks_per_node=2), SparseLatentCP(reduce_dtype=torch.float32)):
        layer = claimed(mesh, style)
        for layout in (HeadTail, PerDocument):
            step(layer, mesh, "one row", layout)


def test_the_attention_has_metadata_of_its_own():
    layer = Layer()
    assert len({mixer.metadata_key for mixer in mixers_of(layer)}) == 2
    other = PooledIndexer(POOLS, POOL + 1)
    assert other.metadata_key != layer.indexer.metadata_key
    assert PooledIndexer(POOLS + 1, POOL).metadata_key == layer.indexer.metadata_key


def test_operands_that_do_not_fit_are_refused():
    x, layer = inputs(1), Layer()
    metadata = batch_metadata(layer, Documents.single(1, SEQ_LEN))
    for gate, bias in ((x.gate[..., :1], x.bias), (x.gate, x.bias[:1]), (x.gate, x.bias[:, :1])):
        with pytest.raises(ValueError, match=r"give gate \[B, L, D\] and bias \[3, D\]"):
            layer.indexer(x.index_q, x.index_weight, x.index_key, gate, bias, metadata)
    wrong = (x.index_weight[..., :1], x.index_key, x.gate, x.bias)
    with pytest.raises(ValueError, match="a weight for each head and a key for each token"):
        layer.indexer(x.index_q, *wrong, metadata)
    with pytest.raises(ValueError, match="pool_len >= 1"):
        PooledIndexer(1, 0)

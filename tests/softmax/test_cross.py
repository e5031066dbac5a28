"""Cross attention: keys of another sequence, which is sharded by a layout of its own."""

import functools
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.compile import EagerIsland, count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import ParallelMesh
from dtcp.mixer_metadata import batch_metadata
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.mask_work import MaskWork
from dtcp.sequence.masks import Causal, MemoryDocument
from dtcp.sequence.memory import Memory
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import (
    AllGatherAttention,
    HaloAttention,
    HybridAttention,
    RingAttention,
    UlyssesAttention,
)
from dtcp.softmax.mixer import CrossAttention
from dtcp.softmax.style import AttentionShape
from tests.harness import reference
from tests.harness.attention_parity import in_tiles, refused
from tests.harness.spmd import spmd

HEADS, KV_HEADS, KEY_DIM, VALUE_DIM = 4, 2, 8, 6
LAYOUTS = [
    (HeadTail, Contiguous),
    (Contiguous, HeadTail),
    (DocumentBalanced, HeadTail),
    (BlockBalanced, DocumentBalanced),
    (HeadTail, PerDocument),
]


@dataclass(frozen=True)
class CrossCase:
    """Documents of the queries, and those of the memory: as many in each row."""

    queries: tuple[tuple[int, ...], ...]
    keys: tuple[tuple[int, ...], ...]
    query_len: int = 48
    key_len: int = 36

    @property
    def documents(self):
        return Documents(self.queries, self.query_len)

    @property
    def memory(self):
        return Documents(self.keys, self.key_len)

    def visible(self):
        """[B, Sq, Sk], pair by pair."""
        table = torch.zeros(len(self.queries), self.query_len, self.key_len, dtype=torch.bool)
        for row, (queries, keys) in enumerate(zip(self.queries, self.keys, strict=True)):
            query = key = 0
            for q_len, k_len in zip(queries, keys, strict=True):
                table[row, query : query + q_len, key : key + k_len] = True
                query, key = query + q_len, key + k_len
        return table


WHOLE = CrossCase(((48,),), ((36,),))
PACKED = CrossCase(((20, 1, 17),), ((3, 18, 11),))
TWO_ROWS = CrossCase(((30, 18), (5, 9, 4)), ((1, 35), (10, 2, 12)))
SHORT = CrossCase(((11, 37), (48,)), ((2, 1), (5,)), key_len=8)
CASES = (WHOLE, PACKED, TWO_ROWS, SHORT)


class Truth(NamedTuple):
    inputs: tuple[Tensor, ...]
    grad_out: Tensor
    out: Tensor
    grads: tuple[Tensor, ...]


@functools.cache
@torch.enable_grad()
def truth(case):
    draw = torch.Generator().manual_seed(3)
    rows = len(case.queries)
    shapes = [
        (rows, case.query_len, HEADS, KEY_DIM),
        (rows, case.key_len, KV_HEADS, KEY_DIM),
        (rows, case.key_len, KV_HEADS, VALUE_DIM),
    ]
    inputs = tuple(
        torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    out, _ = reference.attention(*inputs, case.visible())
    grad_out = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    grads = torch.autograd.grad(out, inputs, grad_out)
    return Truth(tuple(x.detach() for x in inputs), grad_out, out.detach(), grads)


def claimed(mesh, style):
    mixer = CrossAttention()
    parallelize_module(nn.Sequential(mixer), mesh, {"0": style})
    return mixer


def sharded_pair(case, mixer, mesh, layouts):
    """The queries' batch and the memory's, each on its layout."""
    on, of_queries, of_keys = ParallelMesh.of_sequence(mesh), *layouts
    memory = {"input_ids": torch.zeros(len(case.keys), case.key_len, dtype=torch.int64)}
    _, keys = shard_batch(memory, on, of_keys, documents=case.memory)
    batch = {"input_ids": torch.zeros(len(case.queries), case.query_len, dtype=torch.int64)}
    _, queries = shard_batch(
        batch, on, of_queries, model=mixer, documents=case.documents, memory=keys
    )
    return queries, keys


def run(case, attend, queries, keys):
    """Output and gradients of this rank, and what they have to be."""
    expected = truth(case)
    q, k, v = expected.inputs
    inputs = [x.clone().requires_grad_() for x in (queries.shard(q), keys.shard(k), keys.shard(v))]
    out = attend(*inputs, queries.attn_metadata)
    grads = torch.autograd.grad(out, inputs, queries.shard(expected.grad_out))
    dq, dk, dv = expected.grads
    whole = [queries.shard(expected.out), queries.shard(dq), keys.shard(dk), keys.shard(dv)]
    return [out, *grads], whole


@pytest.mark.slow_where(lambda ranks: ranks == 4)
@spmd(ranks=(1, 2, 3, 4))
def test_cross_attention_equals_one_device(mesh, ranks):
    """Output and all gradients, those of the memory's keys and values on their owners."""
    island = AllGatherAttention(boundary=EagerIsland())
    heads = [UlyssesAttention(), HybridAttention(inner_ranks=2)] if ranks in (2, 4) else []
    for i, style in enumerate((RingAttention(), AllGatherAttention(), island, *heads)):
        mixer = claimed(mesh, in_tiles(style, 5))
        for j, case in enumerate(CASES):
            turns = (i + j, i + j + 2) if ranks == 2 else (i + j + ranks,)
            for pair in (LAYOUTS[turn % 5] for turn in turns):
                actual, expected = run(case, mixer, *sharded_pair(case, mixer, mesh, pair))
                assert_close(actual, expected)


def test_cross_attention_on_one_device_reads_the_documents_of_its_memory():
    mixer = CrossAttention()
    for case in CASES:
        expected = truth(case)
        inputs = [x.clone().requires_grad_() for x in expected.inputs]
        out = mixer(*inputs, batch_metadata(mixer, case.documents, memory=case.memory))
        assert_close(out, expected.out)
        assert_close(torch.autograd.grad(out, inputs, expected.grad_out), expected.grads)
        coords = Coords.of(case.documents), Coords.of(case.memory)
        assert_close(mixer.mask.visible(*coords), case.visible())


@spmd(axes={"cp": 2, "tp": 2})
def test_cross_attention_with_heads_sharded_equals_one_device(mesh):
    mixer, tp = claimed(mesh["cp", "tp"], AllGatherAttention()), mesh["tp"].get_local_rank()
    pair = sharded_pair(TWO_ROWS, mixer, mesh["cp"], (DocumentBalanced, HeadTail))

    def on_own_heads(q, k, v, attn_metadata):
        """Every rank has all heads; gradients of those of others are zero here."""
        own = [x.chunk(2, dim=2)[tp] for x in (q, k, v)]
        out = mixer(*own, attn_metadata)
        return torch.cat([out if rank == tp else out.new_zeros(out.shape) for rank in range(2)], 2)

    actual, expected = run(TWO_ROWS, on_own_heads, *pair)
    for x, whole in zip(actual, expected, strict=True):
        assert_close(x.chunk(2, dim=2)[tp], whole.chunk(2, dim=2)[tp])


class Block(nn.Module):
    """A mixer between per-token operations that cancel: a small block to compile."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, q, k, v, attn_metadata):
        return -self.mixer(-q, -k, -v, attn_metadata)


@spmd(ranks=2)
def test_compiled_cross_attention_is_one_graph_for_all_batches(mesh):
    packed_otherwise = CrossCase(((48,), (10, 38)), ((30,), (20, 3)))
    for style in (RingAttention(), UlyssesAttention()):
        torch._dynamo.reset()
        mixer = claimed(mesh, style)
        attend = torch.compile(Block(mixer), backend="aot_eager", fullgraph=True)
        with count_graphs() as graphs:
            for case in (TWO_ROWS, packed_otherwise):
                pair = sharded_pair(case, mixer, mesh, (DocumentBalanced, HeadTail))
                assert_close(*run(case, attend, *pair))
        assert (graphs.graphs, graphs.breaks) == (1, 0)


@spmd(ranks=(2, 3))
def test_cross_attention_moves_the_keys_that_are_read_and_no_others(mesh, ranks):
    """Worked out from who sees whom, stated by the formula, counted by the ops."""
    rank, row = mesh.get_local_rank(), KV_HEADS * (KEY_DIM + VALUE_DIM) * 8
    styles = [RingAttention(), AllGatherAttention(), *[UlyssesAttention()] * (ranks == 2)]
    cases = (WHOLE, PACKED, TWO_ROWS)
    for (i, style), (j, case) in product(enumerate(styles), enumerate(cases)):
        mixer, pair = claimed(mesh, style), LAYOUTS[(i + j + ranks) % 3]
        queries, keys = sharded_pair(case, mixer, mesh, pair)
        out, inputs = None, [queries.shard(truth(case).inputs[0])]
        inputs = [x.requires_grad_() for x in (*inputs, *map(keys.shard, truth(case).inputs[1:]))]
        with count_traffic() as forward:
            out = mixer(*inputs, queries.attn_metadata)
        with count_traffic() as backward:
            torch.autograd.grad(out, inputs, torch.ones_like(out))
        shape = AttentionShape(len(case.queries), HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, 8)
        planned = style.received(mixer, queries.coords, queries.layout, rank, shape)
        assert (forward.received, backward.received) == (planned.forward, planned.backward)
        if pair[0] is not DocumentBalanced and not isinstance(style, UlyssesAttention):
            # Rows that share a layout send the same tokens, those that any of them reads.
            seen = case.visible().any(0)[queries.layout.token_indices(rank)].any(0)
            mine = set(keys.layout.token_indices(rank).tolist())
            others = [key for key in seen.nonzero().flatten().tolist() if key not in mine]
            assert forward.received == len(others) * row * len(case.queries)


def test_cross_attention_is_balanced_by_the_lengths_of_memories():
    """Work of a query: the keys of its document's memory, beside its own causal attention."""
    lengths, of_memory = (40, 300, 80, 220, 384), (900, 4, 300, 60, 10)
    documents, memory = Documents((lengths,), 1024), Documents((of_memory,), 1280)
    coords = Coords.of(documents, memory=Memory(memory))
    work = MaskWork.under({Causal(): 1, MemoryDocument(): 1}, coords)

    def most(layout):
        each = [int(work()[layout.token_indices(rank)].sum()) for rank in range(4)]
        return max(each) * 4 / sum(each)

    assert most(DocumentBalanced.for_batch(documents, 4, work=work)) < 1.01
    assert most(HeadTail(1024, 4)) > 1.2


@spmd(ranks=2)
def test_cross_attention_without_its_memory_is_refused(mesh):
    mixer = claimed(mesh, RingAttention())
    on = ParallelMesh.of_sequence(mesh)
    batch = {"input_ids": torch.zeros(1, 48, dtype=torch.int64)}
    missing = "keys of another sequence, got memory=None"
    refused(missing, lambda: shard_batch(batch, on, model=mixer))
    whole = replace(shard_batch(batch, on)[1], layout=Contiguous(48, 1))
    refused(
        "sharded on as many, got a memory laid out as",
        lambda: shard_batch(batch, on, model=mixer, memory=whole),
    )
    with pytest.raises(TypeError, match="memory"):
        shard_batch(batch, on, model=mixer, memory=batch)
    with pytest.raises(ValueError, match="Keys of another sequence lie in no window"):
        claimed(mesh, HaloAttention(4))


def test_cross_attention_to_documents_that_do_not_pair_is_refused():
    mixer, memory = CrossAttention(), Documents(((3, 5), (8,)), 8)
    with pytest.raises(ValueError, match=r"3 documents and 2 of memory in row 0"):
        batch_metadata(mixer, Documents(((1, 2, 1), (4,)), 4), memory=memory)
    with pytest.raises(ValueError, match="2 rows of memory for a batch of 1"):
        batch_metadata(mixer, Documents(((1, 2),), 4), memory=memory)
    with pytest.raises(TypeError, match="memory of a batch takes documents of Documents"):
        batch_metadata(mixer, Documents(((1, 2),), 4), memory=((3, 5),))
    with pytest.raises(ValueError, match="got memory=None"):
        batch_metadata(mixer, Documents(((1, 2),), 4))
    with pytest.raises(TypeError, match="Masks are combined where they are of one sequence"):
        _ = Causal() & MemoryDocument()
    metadata = batch_metadata(mixer, Documents(((4,), (4,)), 4), memory=Documents(((5,), (8,)), 8))
    q, k = torch.zeros(2, 4, 1, 4), torch.zeros(2, 7, 1, 4)
    with pytest.raises(ValueError, match="got 7 keys where the batch has 8"):
        mixer(q, k, k, metadata)

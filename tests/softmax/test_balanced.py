"""Attention on DocumentBalanced: documents of any lengths, in pieces of any lengths."""

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch

from dtcp.compile import count_graphs
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention
from tests.harness import packings
from tests.harness.attention_parity import (
    CAUSAL,
    MASK_CASES,
    WINDOW,
    Block,
    Case,
    accepts,
    assert_equals_one_device,
    in_tiles,
    local_inputs,
    mixer_on,
    refused,
    run,
    shard_case,
    styles,
)
from tests.harness.spmd import spmd


def random_documents(seq_len, num_shards):
    return Documents(((2, 17, 1, 9, 3, 11),), seq_len)


def many_short(seq_len, num_shards):
    return Documents(((1, 2, 3, 1, 4, 2, 1) * 3,), seq_len)


def one_long(seq_len, num_shards):
    return Documents(((3, seq_len - 9, 4),), seq_len)


def all_padding(seq_len, num_shards):
    return Documents(((),), seq_len)


DOCUMENTS = (random_documents, many_short, one_long)
ROWS = (packings.two_rows, packings.equal_rows, packings.empty_row)
BY_DOCUMENT = (DocumentBalanced, PerDocument, BlockBalanced)


def heads(ranks):
    return {"heads": 6, "kv_heads": 3} if ranks == 3 else {"heads": 4, "kv_heads": 2}


@spmd(ranks=(2, 3, 4))
def test_every_strategy_on_balanced_documents_equals_one_device(mesh, ranks):
    """On two ranks under every mask, on three and four each under every other one."""
    for (i, style), (j, mask_case) in product(enumerate(styles(ranks)), enumerate(MASK_CASES)):
        case = Case(mask_case, DOCUMENTS[(i + j + ranks) % 3], **heads(ranks))
        mine = ranks == 2 or (i + j) % 2 == ranks % 2
        if mine and accepts(style, DocumentBalanced, case, ranks):
            mixer = mixer_on(mesh, in_tiles(style, 8), mask_case.mask)
            assert_equals_one_device(case, mixer, mixer, mesh, DocumentBalanced)


@spmd(ranks=(2, 3, 4))
def test_rows_of_different_documents_are_balanced_each_by_itself(mesh, ranks):
    for (i, style), (j, layout) in product(enumerate(styles(ranks)), enumerate(BY_DOCUMENT)):
        case = Case(MASK_CASES[2 * j], ROWS[(i + j + ranks) % 3], **heads(ranks))
        if accepts(style, layout, case, ranks):
            mixer = mixer_on(mesh, in_tiles(style, 8), case.mask_case.mask)
            assert_equals_one_device(case, mixer, mixer, mesh, layout)


@spmd(ranks=2)
def test_balanced_row_of_one_token_a_rank_equals_one_device(mesh):
    """Of one kv head: all that a rank holds of keys and values is one row."""
    case = Case(CAUSAL, packings.one_document, heads=2, kv_heads=1, seq_len=2)
    hybrid = HybridAttention(outer=AllGatherAttention(), inner_ranks=1)
    for style in (RingAttention(), AllGatherAttention(), hybrid):
        mixer = mixer_on(mesh, style, CAUSAL.mask)
        assert_equals_one_device(case, mixer, mixer, mesh, DocumentBalanced)


@spmd(ranks=(2, 3))
def test_row_of_padding_alone_comes_to_nothing_on_balanced_documents(mesh, ranks):
    case = Case(WINDOW, all_padding, **heads(ranks))
    for style in styles(ranks):
        mixer = mixer_on(mesh, style, WINDOW.mask)
        sharded = shard_case(case, mixer, mesh, DocumentBalanced)
        out, grads = run(case, mixer, sharded, local_inputs(case, sharded))
        assert all(not x.any() for x in (out, *grads))


@spmd(ranks=2)
def test_graph_of_balanced_documents_serves_every_batch(mesh):
    """Pieces differ in number and length, shapes of metadata do not: of one row and of several,
    each balanced by itself."""
    for index, style in enumerate(styles(2)):
        assert_one_graph(mesh, style, DocumentBalanced, (ROWS, DOCUMENTS)[index % 2])
    for layout in (PerDocument, BlockBalanced):
        assert_one_graph(mesh, RingAttention(), layout, ROWS)


def assert_one_graph(mesh, style, layout, batches):
    torch._dynamo.reset()
    mixer = mixer_on(mesh, in_tiles(style, 8), WINDOW.mask)
    attend = torch.compile(Block(mixer), backend="aot_eager", fullgraph=True)
    with count_graphs() as graphs:
        for packing in batches:
            assert_equals_one_device(Case(WINDOW, packing), attend, mixer, mesh, layout)
    assert (graphs.breaks, graphs.graphs) == (0, 1), f"{graphs} with {style}, {layout}"


@dataclass
class Careless(RingAttention):
    """A style of somebody else, which names a layout and never asks for it."""

    layouts: ClassVar = (Contiguous,)

    def make_metadata(self, mixer, coords, layout, rank):
        return RingAttention().make_metadata(mixer, coords, layout, rank)


@spmd(ranks=2)
def test_balanced_documents_are_refused_where_a_third_party_style_does_not_name_them(mesh):
    case = Case(CAUSAL, one_long)
    mixer = mixer_on(mesh, Careless(), case.mask_case.mask)
    assert_equals_one_device(case, mixer, mixer, mesh, Contiguous)
    message = "works on the layouts Contiguous, got layout=DocumentBalanced"
    refused(message, lambda: shard_case(case, mixer, mesh, DocumentBalanced))

"""Layouts are permutations, cut into equal shards."""

import random
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.mask_work import MaskWork
from dtcp.sequence.masks import Causal
from dtcp.sequence.per_document import PerDocument
from dtcp.sequence.row_layouts import layout_of_batch

DOCUMENTS = Documents(((5, 17, 1, 40, 9),), 96)
LAYOUTS = [
    kind.for_batch(DOCUMENTS, num_shards)
    for kind in (Contiguous, HeadTail, PerDocument, BlockBalanced)
    for num_shards in (1, 2, 3, 4)
]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=repr)


@layouts
def test_permutation_is_a_bijection_and_inverse_inverts_it(layout):
    permutation = layout.permutation()
    assert permutation.sort().values.tolist() == list(range(layout.seq_len))
    assert permutation[layout.inverse()].tolist() == list(range(layout.seq_len))


@layouts
def test_rank_owns_the_slots_of_its_shard(layout):
    for rank in range(layout.num_shards):
        slots = slice(rank * layout.shard_len, (rank + 1) * layout.shard_len)
        assert_close(layout.permutation()[slots], layout.token_indices(rank))


@layouts
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_restore_inverts_shard_and_permutes_nothing_else(layout, dim):
    x = torch.arange(2 * 3 * layout.seq_len).view(2, 3, -1).movedim(-1, dim)
    shards = [layout.shard(x, rank, dim=dim) for rank in range(layout.num_shards)]
    assert {shard.shape[dim] for shard in shards} == {layout.shard_len}
    assert_close(shards[-1], x.index_select(dim, layout.token_indices(layout.num_shards - 1)))
    assert_close(layout.restore(torch.cat(shards, dim=dim), dim=dim), x)


@layouts
def test_runs_are_the_longest_in_slot_order(layout):
    for rank in range(layout.num_shards):
        runs = layout.runs(rank)
        assert [p for a, b in runs for p in range(a, b)] == layout.token_indices(rank).tolist()
        assert all(a < b for a, b in runs)
        assert all(before[1] != after[0] for before, after in pairwise(runs))


@layouts
def test_positions_ascend_on_every_rank(layout):
    for rank in range(layout.num_shards):
        assert (layout.token_indices(rank).diff() > 0).all()


@layouts
def test_segments_are_equal_on_all_ranks_and_cover_the_shard(layout):
    for rank in range(layout.num_shards):
        segments = layout.segments(rank)
        assert len(segments) == layout.shard_len // layout.segment_len
        assert {b - a for a, b in segments} == {layout.segment_len}
        assert [p for a, b in segments for p in range(a, b)] == layout.token_indices(rank).tolist()


@layouts
def test_runs_are_those_of_the_partition(layout):
    pieces = layout.partition
    for rank in range(layout.num_shards):
        assert layout.runs(rank) == pieces.runs(rank)


KINDS = (Contiguous, HeadTail, PerDocument, BlockBalanced, DocumentBalanced)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_graph_shards_and_restores(kind, rows):
    """Rows of different documents, too, each laid out by itself."""
    documents = Documents(((5, 17, 1, 40, 9), (96,))[:rows], 96)
    work = MaskWork(((Causal(), 1),), Coords.of(documents))
    layout = layout_of_batch(kind, documents, 3, work)
    x = torch.arange(rows * 96).view(rows, 96)

    def both(x):
        return layout.shard(x, 1), layout.restore(x)

    torch._dynamo.reset()
    assert_close(torch.compile(both, backend="eager", fullgraph=True)(x), both(x))


@layouts
def test_layout_is_a_value(layout):
    again = type(layout).for_batch(DOCUMENTS, layout.num_shards)
    assert again == layout and hash(again) == hash(layout)


@pytest.mark.parametrize("kind", [Contiguous, HeadTail, PerDocument, BlockBalanced])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_sequence_of_the_multiple_can_be_laid_out(kind, num_shards):
    for factor in (1, 2, 5, 7, 160):
        seq_len = factor * kind.multiple(num_shards)
        layout = kind.for_batch(Documents.single(2, seq_len), num_shards)
        assert layout.shard_len == seq_len // num_shards


def test_head_tail_gives_every_rank_the_same_causal_work():
    layout = HeadTail(48, 4)
    work = {int((layout.token_indices(rank) + 1).sum()) for rank in range(4)}
    assert len(work) == 1


def test_layouts_are_as_drawn():
    assert HeadTail(8, 2).permutation().tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert Contiguous(8, 2).permutation().tolist() == list(range(8))
    drawn = PerDocument(12, 2, (4, 5)).permutation().tolist()
    assert drawn == [0, 3, 4, 5, 8, 9, 1, 2, 6, 7, 10, 11]
    # A rank's second odd token lengthens its tail chunk.
    assert PerDocument(6, 2, (3, 3)).permutation().tolist() == [0, 2, 3, 1, 4, 5]
    drawn = BlockBalanced(8, 2, 2, (0, 1, 1, 0)).permutation().tolist()
    assert drawn == [0, 1, 6, 7, 2, 3, 4, 5]


def test_per_document_cuts_any_documents_evenly():
    draw = random.Random(0)
    for _ in range(200):
        num_shards, shard_len = draw.randint(1, 6), draw.randint(1, 20)
        seq_len, lengths = num_shards * shard_len, []
        while (length := draw.randint(1, seq_len)) + sum(lengths) <= seq_len:
            lengths.append(length)
        layout = PerDocument(seq_len, num_shards, tuple(lengths))
        assert layout.permutation().sort().values.tolist() == list(range(seq_len))
        assert {layout.token_indices(rank).numel() for rank in range(num_shards)} == {shard_len}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            traced = [layout.runs(rank) for rank in range(num_shards)]
        assert traced == [layout.runs(rank) for rank in range(num_shards)]


def test_per_document_balances_each_document_to_two_tokens():
    layout = PerDocument(96, 4, DOCUMENTS.lengths[0])
    document = DOCUMENTS.document()[0]
    for index in range(len(DOCUMENTS.lengths[0])):
        held = [int((document[layout.token_indices(rank)] == index).sum()) for rank in range(4)]
        assert max(held) - min(held) <= 2


def test_block_balanced_balances_packed_documents_better_than_head_tail():
    documents = Documents(((2000, 30, 1000, 18),), 4096)
    work = documents.position_ids()[0] + 1

    def busiest_over_mean(layout):
        loads = [work[layout.token_indices(rank)].sum() for rank in range(4)]
        return max(loads) * 4 / sum(loads)

    assert busiest_over_mean(BlockBalanced.for_batch(documents, 4)) < 1.05
    assert busiest_over_mean(HeadTail(4096, 4)) > 1.2


def test_block_balanced_reads_the_work_it_is_given():
    work = torch.zeros(64, dtype=torch.int64)
    work[:2] = 100
    layout = BlockBalanced.for_batch(Documents.single(1, 64), 2, work=lambda: work)
    assert layout.block == 4
    assert layout.owners[0] != layout.owners[1]


def test_lengths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"HeadTail .* seq_len=12, .*multiple of 8"):
        HeadTail(12, 4)
    with pytest.raises(ValueError, match=r"Contiguous .* seq_len=0, .*multiple of 2"):
        Contiguous(0, 2)
    with pytest.raises(ValueError, match="num_shards=0"):
        Contiguous(8, 0)
    for seq_len in (2, 6):
        with pytest.raises(
            ValueError, match=rf"BlockBalanced .* seq_len={seq_len}, .*multiple of 4"
        ):
            BlockBalanced.for_batch(Documents.single(1, seq_len), 4)
    with pytest.raises(ValueError, match=r"that fit the sequence, got lengths=\(9,\)"):
        PerDocument(8, 2, (9,))
    with pytest.raises(ValueError, match="whole blocks, got block=3, shard_len=4"):
        BlockBalanced(8, 2, 3, (0, 1))
    with pytest.raises(ValueError, match=r"every rank 2 blocks, got counts=\[3, 1\]"):
        BlockBalanced(8, 2, 2, (0, 0, 0, 1))


def test_wrong_rank_or_dim_is_refused():
    with pytest.raises(ValueError, match="got rank=2, num_shards=2"):
        Contiguous(8, 2).runs(2)
    with pytest.raises(ValueError, match=r"x.shape=\(2, 8\), dim=0, seq_len=8"):
        Contiguous(8, 2).shard(torch.zeros(2, 8), 0, dim=0)


@pytest.mark.parametrize("kind", [PerDocument, BlockBalanced])
def test_rows_of_differing_documents_are_refused(kind):
    with pytest.raises(
        ValueError, match=r"differing documents.*use HeadTail, or one row per batch"
    ):
        kind.for_batch(Documents(((16,), (8, 8)), 16), 2)

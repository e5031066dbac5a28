"""Planning reads documents and pieces, not tokens: counted, and held against plain loops."""

import random
import tracemalloc
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtcp._torch.fakes import fake_ranks
from dtcp.batch import shard_batch
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.distributed.same_rows import RowHashes
from dtcp.mixer_plan import apply_plan
from dtcp.row_parts import MOST_SLICES, part_of_rows, real_tokens
from dtcp.sequence.batch_documents import documents_of_ids
from dtcp.sequence.block_balanced import BlockBalanced, block_work
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.mask_work import MaskWork
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.sequence.neighbours import BLOCK, where_neighbours
from dtcp.sequence.partition import along_runs, intersections, merged_cuts
from dtcp.sequence.per_document import PerDocument
from dtcp.sequence.row_layouts import RowLayouts, in_line
from dtcp.softmax import AllGatherAttention, HaloAttention, RingAttention
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.softmax.required_keys import PeerRuns
from tests.sequence.test_document_balanced import MASKS, a_row, coords_of

WINDOW = Causal() & SlidingWindow(512)


@dataclass(frozen=True)
class Shuffled(SequenceLayout):
    """One of somebody else: short pieces, on each rank in any order."""

    def runs(self, rank):
        draw = random.Random(7)
        pieces = [(start, start + 2) for start in range(0, self.seq_len, 2)]
        draw.shuffle(pieces)
        mine = pieces[rank :: self.num_shards]
        # Neighbours that happen to follow each other would be one run.
        joined = any(a[1] == b[0] for a, b in pairwise(mine))
        return sorted(mine, reverse=True) if joined else mine


class Long(TorchDispatchMode):
    """What torch makes that is as long as a row: by name. Rooms that nobody fills are none."""

    def __init__(self, length):
        super().__init__()
        self.length, self.found = length, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and func is not torch.ops.aten.empty.memory_format:
            held = out.untyped_storage().nbytes() // out.element_size()
            given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            if held >= self.length and out.untyped_storage().data_ptr() not in given:
                self.found.append(func.name())
        return out


@contextmanager
def nothing_as_long_as(seq_len):
    """Neither torch nor numpy makes anything of a byte for each token."""
    tracemalloc.start()
    try:
        with Long(seq_len) as long:
            yield
        assert not long.found
        assert tracemalloc.get_traced_memory()[1] < seq_len
    finally:
        tracemalloc.stop()


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.whole, self.window = SoftmaxAttention(Causal()), SoftmaxAttention(WINDOW)


@pytest.mark.parametrize("layout", [DocumentBalanced, HeadTail, Contiguous])
def test_planning_documents_given_as_lengths_makes_nothing_as_long_as_the_row(layout):
    seq_len, ranks = 2**22, 512
    lengths = [seq_len // 64] * 60 + [seq_len // 256] * 16
    ids = torch.zeros(1, seq_len, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids + 1, "cu_seqlens": np.cumsum([0, *lengths]).tolist()}
    with fake_ranks(ranks, 100):
        mesh = ParallelMesh.from_degrees(Degrees(cp=ranks), "cpu")
        plan = {"whole": AllGatherAttention(), "window": HaloAttention(512)}
        model = apply_plan(Layers(), mesh.cp, plan)
        shard_batch(batch, mesh, layout, model=model)  # weights of hashes, kept for all batches
        with nothing_as_long_as(seq_len):
            local, _ = shard_batch(batch, mesh, layout, model=model)
    assert local["input_ids"].shape == (1, seq_len // ranks)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_document_ids_are_read_with_nothing_as_long_as_the_row(dtype):
    documents = Documents(((5, 3 * BLOCK, 1, 8 * BLOCK),), 16 * BLOCK)
    ids = documents.document().to(dtype)
    with nothing_as_long_as(documents.seq_len):
        assert documents_of_ids(ids) == documents


def test_block_balanced_weighs_blocks_with_nothing_as_long_as_the_row():
    documents = Documents(((2**20, 2**19, 77),), 2**21)
    work = MaskWork.under({Causal(): 1, WINDOW: 5}, Coords.of(documents))
    with nothing_as_long_as(documents.seq_len):
        weights = work.of_blocks(4096)
    assert len(weights) == 512 and sum(weights) == work.runs(0).total


@pytest.mark.parametrize("length", [0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 2, 2 * BLOCK + 3])
def test_no_change_between_neighbours_is_missed(length):
    places = {1, 2, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 2, 2 * BLOCK, 2 * BLOCK + 1, length - 1}
    places = sorted(place for place in places if 0 < place < length)
    numbers = np.zeros(length, dtype=np.int32)
    for place in places:
        numbers[place:] += 1
    assert where_neighbours(np.not_equal, numbers).tolist() == places
    assert where_neighbours(np.less, -numbers).tolist() == places
    equal = set(range(1, length)) - set(places)
    assert set(where_neighbours(np.equal, numbers).tolist()) == equal


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_work_of_blocks_is_that_of_their_tokens(mask):
    draw = random.Random(3)
    for _ in range(10):
        block = draw.choice([1, 3, 8])
        documents = Documents(
            tuple(a_row(draw, 24 * block) for _ in range(draw.choice([1, 2]))), 24 * block
        )
        work = MaskWork.under({mask: 2, Causal(): 1}, coords_of(draw, documents))
        assert work.of_blocks(block) == block_work(work(), block)


@pytest.mark.parametrize("kind", [BlockBalanced, DocumentBalanced])
def test_layouts_ask_a_mask_that_counts_work_in_its_own_way(kind):
    class Dear(Causal):
        def work(self, coords):
            return torch.where(torch.arange(coords.seq_len) < 8, 100, 1)

    documents = Documents(((32,),), 32)
    work = MaskWork.under(Dear(), Coords.of(documents))
    assert not work.in_runs
    layout = kind.for_batch(documents, 2, work=work)
    assert layout == kind.for_batch(documents, 2, work=work.__call__)
    assert layout != kind.for_batch(documents, 2)


def test_cuts_of_two_lists_are_those_of_plain_loops():
    draw = random.Random(5)
    for _ in range(200):
        one, other = (
            np.array(sorted({0, *(draw.randrange(40) for _ in range(draw.randrange(12)))}))
            for _ in range(2)
        )
        cuts, of_one, of_other = merged_cuts(one, other)
        assert cuts.tolist() == sorted({*one.tolist(), *other.tolist()})
        assert of_one.tolist() == [sum(one <= cut) - 1 for cut in cuts]
        assert of_other.tolist() == [sum(other <= cut) - 1 for cut in cuts]


@pytest.mark.parametrize("room", [None, 300])
def test_numbers_along_runs_are_those_of_plain_loops(room):
    draw = random.Random(8)
    for _ in range(100):
        runs = [(draw.randrange(99), draw.randrange(2), draw.randrange(9)) for _ in range(20)]
        first, step, length = np.array(runs[: draw.randrange(21)], dtype=np.int64).reshape(-1, 3).T
        found = along_runs(first, step, length, room=room)
        lists = zip(first, step, length, strict=True)
        each = [a + by * place for a, by, count in lists for place in range(count)]
        assert found.dtype == np.int32 and found[: len(each)].tolist() == each
        assert len(found) == (len(each) if room is None else room)
        counted = along_runs(first, 1, length, room=room)
        assert np.array_equal(counted, along_runs(first, 0 * step + 1, length, room=room))


def test_runs_stand_where_they_are_sorted_to():
    draw = random.Random(9)
    for ascending in (False, True):
        for _ in range(100):
            stretches = [draw.sample(range(50), 2) for _ in range(draw.randrange(9))]
            pairs = sorted(map(sorted, stretches)) if ascending else [*map(sorted, stretches)]
            start, stop = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
            peer = np.array([draw.randrange(6) for _ in pairs], dtype=np.int64)
            runs, key = PeerRuns(peer, start, stop), np.array(draw.sample(range(6), 6))
            by_key = sorted(range(len(pairs)), key=lambda i: (key[peer[i]], start[i]))
            assert [x.tolist() for x in runs.sorted_by(key)] == [x[by_key].tolist() for x in runs]
            length = (stop - start)[by_key].tolist()
            assert runs.places(key)[by_key].tolist() == [
                sum(length[:i]) for i in range(len(length))
            ]


def test_what_runs_and_pieces_share_is_that_of_plain_loops():
    draw = random.Random(6)
    for _ in range(200):
        ends = np.array(sorted(draw.sample(range(40), 2 * draw.randrange(8))))
        pieces = ends[::2], ends[1::2]
        runs = [sorted(draw.sample(range(40), 2)) for _ in range(draw.randrange(6))]
        start, stop = np.array(runs, dtype=np.int64).reshape(-1, 2).T
        found = np.stack(intersections(start, stop, *pieces), axis=1).tolist()
        each = [
            [run, piece, max(a, low), min(b, high)]
            for run, (a, b) in enumerate(runs)
            for piece, (low, high) in enumerate(zip(*pieces, strict=True))
            if max(a, low) < min(b, high)
        ]
        assert found == each


LAYOUTS = (
    PerDocument(48 * 4, 4, (1, 2, 3, 4, 5, 6, 7, 8, 20, 40, 60)),
    BlockBalanced.for_batch(Documents(((40, 7, 100),), 192), 4),
    HeadTail(192, 4),
    Shuffled(192, 4),
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("shape", [(1, 192), (3, 192), (0, 192), (1, 192, 5), (2, 3, 192)], ids=str)
def test_parts_of_many_pieces_are_those_of_the_layout(layout, shape):
    x, dim = torch.randn(shape), shape.index(192)
    pieces = {len(layout.partition.of_owner(rank)) for rank in range(4)}
    assert type(layout) is HeadTail or max(pieces) > 4
    for rank in range(4):
        part = part_of_rows(x, layout, rank, dim=dim, pad=0)
        assert torch.equal(part, layout.shard(x, rank, dim=dim))
        assert layout.partition.runs(rank) == layout.runs(rank)
        assert layout.partition.tokens(rank).tolist() == layout.token_indices(rank).tolist()
        real = real_tokens(Documents(((100,), (192,), ()), 192), layout, rank)
        used = torch.tensor([100, 192, 0])[:, None]
        assert torch.equal(real, layout.token_indices(rank) < used)


def test_some_layouts_have_more_pieces_than_are_sliced():
    assert len(Shuffled(192, 4).partition.of_owner(0)) > MOST_SLICES


@pytest.mark.parametrize("nodes", [0, 2])
def test_rows_of_a_layout_in_any_order_are_lined_up_by_slot(nodes):
    """On two tiers, the tokens of a rank's queries stood in another order than its slots."""
    coords = Coords.of(Documents(((50, 60), (96,)), 128))
    rows = RowLayouts(128, 4, (Shuffled(128, 4), Contiguous(128, 4)))
    line, intervals = in_line(rows, KeyIntervals.of(Causal(), coords))
    for rank in range(4):
        metadata = RingAttention(ranks_per_node=nodes).rank_metadata(line, rank, intervals)
        tokens = [row.token_indices(rank) + 128 * index for index, row in enumerate(rows.rows)]
        assert metadata.query_token_index.tolist() == torch.cat(tokens).tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("shape", [(1, 8192), (2, 5000), (3, 7)], ids=str)
def test_narrow_numbers_have_the_hashes_of_wide_ones(dtype, shape):
    ids = torch.randint(100, shape)
    narrow, wide = (RowHashes.of({"input_ids": x}, None).of_rows for x in (ids.to(dtype), ids))
    assert torch.equal(narrow, wide)
    ids[-1, -1] += 1
    assert not torch.equal(RowHashes.of({"input_ids": ids.to(dtype)}, None).of_rows, wide)

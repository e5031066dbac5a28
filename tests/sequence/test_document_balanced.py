"""DocumentBalanced: equal tokens and equal work, from documents of any lengths."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from dtcp.sequence.block_runs import TokenTypes, vision_blocks
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.document_pieces import RowOfDocuments
from dtcp.sequence.documents import Documents
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import HeadTail
from dtcp.sequence.mask_runs import interval_runs
from dtcp.sequence.mask_work import MaskWork, WorkRuns
from dtcp.sequence.masks import (
    AttentionChunks,
    Bidirectional,
    BlockBidirectional,
    Causal,
    Coords,
    SlidingWindow,
)
from dtcp.sequence.prefix_masks import FirstTokens, Prefix, PrefixLM

WINDOW = Causal() & SlidingWindow(7)
IMAGES = (Causal() | BlockBidirectional()) & SlidingWindow(7)
MASKS = (
    Causal(),
    Bidirectional(),
    WINDOW,
    SlidingWindow(5, right=2),
    SlidingWindow(50, right=1),
    Causal() | SlidingWindow(1, right=5),
    PrefixLM(),
    PrefixLM() & SlidingWindow(4),
    (Causal() & SlidingWindow(3)) | (SlidingWindow(6) & PrefixLM()),
    Causal() & AttentionChunks(5),
    AttentionChunks(4) & SlidingWindow(3, right=1),
    (Causal() & AttentionChunks(6)) | (AttentionChunks(4) & PrefixLM()),
    IMAGES,
    BlockBidirectional(),
    SlidingWindow(3) | BlockBidirectional(),
    SlidingWindow(4, right=2) & BlockBidirectional(),
    (Causal() | BlockBidirectional()) & AttentionChunks(4),
    (PrefixLM() | BlockBidirectional()) & SlidingWindow(6, right=3),
    FirstTokens(4),
    Prefix(),
    Prefix() & SlidingWindow(5),
    Causal() & (SlidingWindow(5) | FirstTokens(3)),
    FirstTokens(3) | (SlidingWindow(5, right=2) & PrefixLM()),
    Causal() & (Prefix() | BlockBidirectional()),
    SlidingWindow(9) & (Prefix() | BlockBidirectional() | FirstTokens(2)),
    (Prefix() | SlidingWindow(2)) & (FirstTokens(4) | AttentionChunks(6)),
)
MIXTURE = {Causal(): 1, WINDOW: 5}


def a_row(draw: random.Random, seq_len: int) -> tuple[int, ...]:
    """Documents of a row: from one that nearly fills it to many short ones; at times none."""
    longest, lengths = max(1, seq_len // draw.choice([1, 2, 4, 20])), []
    while draw.random() < 0.95:
        length = draw.randint(1, longest)
        if sum(lengths) + length > seq_len:
            break
        lengths.append(length)
    return tuple(lengths)


def coords_of(draw: random.Random, documents: Documents) -> Coords:
    """With a prefix for each document, and blocks that heed none."""
    prefix = torch.zeros(documents.batch, documents.seq_len, dtype=torch.int64)
    for row, lengths in enumerate(documents.lengths):
        start = 0
        for length in lengths:
            prefix[row, start : start + length] = draw.randint(0, length)
            start += length
    token = torch.arange(documents.seq_len)
    block = torch.where((token // 5) % 2 == 0, token // 10, -1).expand_as(prefix)
    return Coords.of(documents, prefix=prefix, block=block)


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_runs_are_the_intervals_of_all_tokens(mask):
    draw = random.Random(0)
    for _ in range(60):
        seq_len = draw.randint(1, 60)
        documents = Documents((a_row(draw, seq_len), a_row(draw, seq_len)), seq_len)
        coords, token = coords_of(draw, documents), np.arange(seq_len)
        first, last = mask.intervals(coords)
        pairs = zip(first.view(-1, 2, seq_len), last.view(-1, 2, seq_len), strict=True)
        for index, (first, last) in enumerate(pairs):
            for row in range(2):
                runs = interval_runs(mask, coords, row)[index]
                found = runs.at(token)
                assert (found[0] == first[row].numpy()).all()
                assert (found[1] == last[row].numpy()).all()
                assert set(runs.first_step) | set(runs.last_step) <= {0, 1}
                assert [*runs.start[1:], seq_len] == [*runs.stop] and runs.start[0] == 0


def test_blocks_of_images_are_runs_of_their_token_types():
    """Rows of types that end before the padding does; images that documents cut, and neighbours."""
    draw = random.Random(4)
    for _ in range(60):
        seq_len, missing = draw.randint(1, 40), draw.randint(0, 5)
        documents = Documents((a_row(draw, seq_len), a_row(draw, seq_len)), seq_len + missing)
        types = torch.tensor(
            [[draw.choice([0, 0, 0, 1, 1, 2, 3]) for _ in range(seq_len)] for _ in range(2)]
        ).repeat_interleave(draw.choice([1, 3]), dim=1)[:, :seq_len]
        coords = Coords.of(documents, image_types=TokenTypes(types))
        token = np.arange(seq_len + missing)
        block = torch.nn.functional.pad(vision_blocks(types), (0, missing), value=-1)
        expected = IMAGES.intervals(Coords.of(documents, block=block))
        for row in range(2):
            for each, index in ((coords, row), (coords.of_row(row), 0)):
                found = np.stack(interval_runs(IMAGES, each, index)[0].at(token))
                assert (found == torch.stack(expected)[:, row].numpy()).all()
        assert "block" not in vars(coords)  # nothing as long as the row was made
        assert torch.equal(coords.block, block)


def test_a_block_in_two_places_of_a_document_is_refused():
    coords = Coords.of(Documents(((3, 5),), 8), block=torch.tensor([[0, 0, -1, 0, 1, -1, 1, -1]]))
    with pytest.raises(ValueError, match="blocks of consecutive tokens, got a block id in several"):
        interval_runs(IMAGES, coords)


def test_runs_are_a_few_for_each_document_however_long():
    for scale in (1, 1000):
        documents = Documents(((40 * scale, 9 * scale, 30 * scale),), 100 * scale)
        coords = Coords.of(documents)
        assert len(interval_runs(Causal(), coords)[0].start) == 4
        assert len(interval_runs(Causal() & SlidingWindow(7 * scale), coords)[0].start) == 7


def test_mask_of_ones_own_is_read_off_its_intervals():
    """A subclass may see other tokens than the mask it is made from."""

    class EveryOther(Causal):
        def _interval(self, coords):
            return coords.token_index - coords.token_index % 2, coords.token_index

    coords = Coords.of(Documents(((9, 4),), 14))
    found = interval_runs(EveryOther(), coords)[0].at(np.arange(14))
    assert [x.tolist() for x in found] == [x[0].tolist() for x in EveryOther().intervals(coords)]
    uneven = Coords.of(coords.documents, prefix=torch.arange(14)[None] % 3)
    with pytest.raises(ValueError, match="one prefix >= 0 for all tokens"):
        interval_runs(PrefixLM(), uneven)


def test_mask_of_ones_own_is_asked_once_for_all_rows():
    """By its mixer and by a layout; it was asked for all of them by each row."""
    asked = []

    class Asked(Causal):
        def _interval(self, coords):
            asked.append(coords)
            return super()._interval(coords)

    coords = Coords.of(Documents(((9, 4), (14,), ()), 14))
    for mask in (Asked(), Asked() & SlidingWindow(3)):
        KeyIntervals.of(mask, coords)
        MaskWork.under(mask, coords).of_blocks(7)
        assert len(asked) == 1
        asked.clear()


@pytest.mark.parametrize("masks", [*({mask: 1} for mask in MASKS), MIXTURE], ids=repr)
def test_document_balanced_gives_every_rank_equal_tokens_and_the_mean_of_the_work(masks):
    draw = random.Random(1)
    for _ in range(40):
        num_shards = draw.randint(1, 9)
        seq_len = num_shards * draw.randint(1, 40)
        documents = Documents((a_row(draw, seq_len),), seq_len)
        work = MaskWork.under(masks, coords_of(draw, documents))
        layout = DocumentBalanced.for_batch(documents, num_shards, work=work)
        held = [layout.token_indices(rank) for rank in range(num_shards)]
        assert sorted(torch.cat(held).tolist()) == list(range(seq_len))
        assert {len(tokens) for tokens in held} == {seq_len // num_shards}
        runs = [layout.runs(rank) for rank in range(num_shards)]
        assert all(a[1] < b[0] for mine in runs for a, b in pairwise(mine))
        loads = [int(work()[tokens].sum()) for tokens in held]
        assert max(abs(load - sum(loads) / num_shards) for load in loads) < max(1, work().max())
        # Work that is known token by token comes to the same.
        assert layout == DocumentBalanced.for_batch(documents, num_shards, work=work.__call__)


def test_document_balanced_holds_one_stretch_of_each_line():
    """By brute force: of the tokens by their line's order, each rank has neighbours alone."""
    draw = random.Random(2)
    for _ in range(40):
        num_shards = draw.randint(2, 6)
        seq_len = num_shards * draw.randint(1, 40)
        documents = Documents((a_row(draw, seq_len),), seq_len)
        runs = WorkRuns.of([(Causal(), 1)], Coords.of(documents))
        row = RowOfDocuments.of(runs, documents.lengths[0], num_shards)
        starts, owners = (tuple(x.tolist()) for x in row.best_pieces([0]))
        layout = DocumentBalanced(seq_len, num_shards, starts, owners)
        work, mean = [], 0.0
        for length in documents.lengths[0]:
            work += [(length, index + 1) for index in range(length)]
        work += [(0, 0)] * (seq_len - len(work))
        mean = sum(each for _, each in work) / seq_len
        owner = torch.empty(seq_len, dtype=torch.int64)
        owner[layout.permutation()] = torch.arange(seq_len) // layout.shard_len
        heavy = [t for t in range(seq_len) if work[t][1] > mean]
        light = [t for t in range(seq_len) if work[t][1] <= mean]
        heavy.sort(key=lambda t: (-work[t][0], t - work[t][1], -t))
        light.sort(key=lambda t: (work[t][0], t))
        for line in (heavy, light):
            assert owner[line].tolist() == sorted(owner[line].tolist())


def test_document_balanced_of_one_document_is_head_tail():
    for num_shards in (1, 2, 3, 5, 8):
        layout = DocumentBalanced.for_batch(Documents.single(1, 240), num_shards)
        assert layout.permutation().tolist() == HeadTail(240, num_shards).permutation().tolist()


def test_document_balanced_keeps_equal_documents_whole():
    layout = DocumentBalanced.for_batch(Documents(((16,) * 12,), 192), 4)
    assert [layout.runs(rank) for rank in (0, 3)] == [[(0, 48)], [(144, 192)]]


def keys_to_bring(layout, documents):
    """Of all ranks, by brute force: what lies before their tokens, held by others."""
    start, document = documents.starts()[0], documents.document()[0]
    count = 0
    for rank in range(layout.num_shards):
        mine = set(layout.token_indices(rank).tolist())
        seen = {key for t in mine if document[t] >= 0 for key in range(int(start[t]), t)}
        count += len(seen - mine)
    return count


def test_document_balanced_leaves_short_documents_whole_where_that_saves_keys():
    draw = random.Random(3)
    saved = 0
    for _ in range(30):
        num_shards, longest = draw.randint(2, 5), draw.choice([4, 9, 20])
        seq_len, lengths = num_shards * 40, []
        while (left := seq_len - sum(lengths)) > 0:
            lengths.append(min(left, draw.randint(longest // 2, longest)))
        documents = Documents((tuple(lengths),), seq_len)
        runs = WorkRuns.of([(Causal(), 1)], Coords.of(documents))
        pieces = RowOfDocuments.of(runs, documents.lengths[0], num_shards).best_pieces([0])
        cut = DocumentBalanced(seq_len, num_shards, *(tuple(x.tolist()) for x in pieces))
        layout = DocumentBalanced.for_batch(documents, num_shards)
        fewer, more = keys_to_bring(layout, documents), keys_to_bring(cut, documents)
        assert fewer <= more
        saved += more - fewer
    assert saved > 0


def test_document_balanced_takes_rows_of_padding_and_fewer_documents_than_ranks():
    padding = DocumentBalanced.for_batch(Documents(((),), 12), 3)
    assert [padding.runs(rank) for rank in range(3)] == [[(0, 4)], [(4, 8)], [(8, 12)]]
    few = DocumentBalanced.for_batch(Documents(((1, 2),), 21), 7)
    assert {few.token_indices(rank).numel() for rank in range(7)} == {3}


def test_document_balanced_in_numbers_of_a_long_row():
    """512K tokens on 64 ranks: balanced to a token, in under 6 pieces a rank."""
    drawn, lengths = np.random.default_rng(0), []
    while sum(lengths) < 2**19:
        lengths.append(int(min(max(1, drawn.lognormal(np.log(2048), 1.5)), 2**17)))
    lengths[-1] -= sum(lengths) - 2**19
    documents = Documents((tuple(lengths),), 2**19)
    layout = DocumentBalanced.for_batch(documents, 64)
    assert len(layout.starts) < 6 * 64
    work = documents.position_ids()[0] + 1
    loads = [int(work[layout.token_indices(rank)].sum()) for rank in range(64)]
    assert max(loads) * 64 < sum(loads) * 1.0001 + 64 * int(work.max())


def test_pieces_that_do_not_fill_the_row_are_refused():
    for pieces in (
        ((0, 6), (0, 1)),
        ((0, 4), (0,)),
        ((1, 4), (0, 1)),
        ((0, 4, 4), (0, 1, 0)),
        ((), ()),
    ):
        with pytest.raises(ValueError, match="every rank 4 tokens, in pieces that follow each"):
            DocumentBalanced(8, 2, *pieces)
    with pytest.raises(ValueError, match="every rank 4 tokens"):
        DocumentBalanced(8, 2, (0, 4), (0, 2))
    with pytest.raises(ValueError, match=r"DocumentBalanced .*seq_len=9.*multiple of 2"):
        DocumentBalanced.for_batch(Documents.single(1, 9), 2)
    for masks in ({}, {Causal(): 0}):
        with pytest.raises(ValueError, match="applied once or more"):
            MaskWork.under(masks, Coords.of(Documents.single(1, 8)))
    row = Documents.single(1, 8)
    for error, ranks, work, match in (
        (ValueError, 0, None, "DocumentBalanced takes num_shards >= 1"),
        (TypeError, 2.0, None, "num_shards=2.0 of type float"),
        (ValueError, 2, -torch.arange(8), "0 or more for each token, got work=-7 for token 7"),
        (TypeError, 2, torch.rand(8), "got work.dtype=torch.float32"),
    ):
        with pytest.raises(error, match=match):
            DocumentBalanced.for_batch(row, ranks, work=None if work is None else lambda x=work: x)


def test_work_that_grows_unevenly_is_read_off():
    work = torch.tensor([5, 1, 2, 3, 3, 3, 0, 9, 7, 5])
    runs = WorkRuns.of_tokens(work)
    assert runs.total == int(work.sum())

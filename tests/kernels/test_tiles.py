"""Tiles of queries are cut where pieces meet that see other keys."""

import numpy as np
import pytest

from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import AllGatherAttention, RingAttention
from dtcp.softmax.metadata import local_metadata
from dtcp.softmax.mixer import SoftmaxAttention

SEQ_LEN, RANKS, TILE = 1024, 4, 32


def packed(seed):
    draw, lengths = np.random.default_rng(seed), []
    while (left := SEQ_LEN - sum(lengths)) > 0:
        lengths.append(min(left, 256, int(draw.lognormal(3.5, 1.2)) + 1))
    return Documents((tuple(lengths),), SEQ_LEN)


def tables(documents, layout, style, mask=None):
    """Of all ranks, with what each of them attends to."""
    coords, mixer = Coords.of(documents), SoftmaxAttention(mask or Causal())
    made = layout.for_batch(documents, RANKS)
    return [style.make_metadata(mixer, coords, made, rank) for rank in range(RANKS)]


@pytest.mark.parametrize("mask", [Causal(), Causal() & SlidingWindow(40)], ids=repr)
@pytest.mark.parametrize("style", [AllGatherAttention(tile=TILE), RingAttention(tile=TILE)])
def test_tiles_of_balanced_pieces_hold_every_key_that_is_seen(style, mask):
    shapes = set()
    for seed, layout in ((0, DocumentBalanced), (1, PerDocument), (2, BlockBalanced)):
        for metadata in tables(packed(seed), layout, style, mask):
            shapes.add(metadata.block_ranges.shape)
            first, last = metadata.first_key[0].numpy(), metadata.last_key[0].numpy()
            seen = np.zeros(len(first), dtype=int)
            for part, count in enumerate(metadata.key_counts):
                keys = metadata.key_token_index[part, :count].numpy()
                ends = [0]
                for q_start, q_stop, start, full_start, full_stop, stop in metadata.block_ranges[
                    part, 0
                ].tolist():
                    assert q_start == ends[-1] and q_stop - q_start <= TILE
                    ends.append(q_stop)
                    own = slice(q_start, q_stop)
                    visible = (keys >= first[own, None]) & (keys <= last[own, None])
                    assert not visible[:, :start].any() and not visible[:, stop:].any()
                    assert visible[:, full_start:full_stop].all()
                    seen[own] += visible.sum(1)
                assert ends[-1] == len(first)
            assert (seen == last - first + 1).all()
    assert len(shapes) == 1, "the table of every batch and layout has one shape"


def read(metadata):
    """Pairs of a query and a key that the tiles of all ranks read."""
    ranges = np.stack([x.block_ranges.numpy() for x in metadata])
    return int(((ranges[..., 1] - ranges[..., 0]) * (ranges[..., 5] - ranges[..., 2])).sum())


def test_balanced_pieces_read_hardly_more_keys_than_contiguous_ones():
    """As tiles of equal length they read up to a fifth more than these, and not evenly."""
    style = AllGatherAttention(tile=TILE)
    for seed in range(8):
        of_layouts = [tables(packed(seed), x, style) for x in (DocumentBalanced, Contiguous)]
        balanced, contiguous = (read(x) for x in of_layouts)
        assert balanced <= 1.03 * contiguous


@pytest.mark.parametrize("layout", [HeadTail, Contiguous])
def test_a_rank_cuts_whole_tiles_as_one_device_does(layout):
    """However many borders are worth it, or results would depend on the number of ranks."""
    documents, tile = Documents(((33,) * 31,), SEQ_LEN), 16
    style, made = AllGatherAttention(tile=tile), layout.for_batch(documents, RANKS)
    for mask in (Causal(), Causal() & SlidingWindow(30)):
        whole = local_metadata(KeyIntervals.of(mask, Coords.of(documents)), tile=tile)
        expected, of_ranks = tokens_of_tiles(whole, np.arange(SEQ_LEN)), set()
        for rank, metadata in enumerate(tables(documents, layout, style, mask)):
            of_ranks |= tokens_of_tiles(metadata, made.token_indices(rank).numpy())
        assert of_ranks == expected
        assert len(expected) > 12 + SEQ_LEN // tile, "hardly a tile was worth cutting"


def tokens_of_tiles(metadata, tokens):
    """The first and last query of each tile, and of its keys and of those that all see."""
    keys = metadata.key_token_index.flatten().numpy()
    return {
        (tokens[q_start], tokens[q_stop - 1], *keys[[start, stop - 1]], full_start - start, full)
        for q_start, q_stop, start, full_start, full_stop, stop in (
            metadata.block_ranges.reshape(-1, 6).tolist()
        )
        if q_start < q_stop
        for full in [full_stop - full_start]
    }

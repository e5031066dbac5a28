"""Which keys stand in the tables of every strategy on balanced documents: no ranks run."""

import random
from itertools import product

import pytest
import torch

from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import HeadTail
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.softmax import AllGatherAttention, HaloAttention, RingAttention, SharedKVAttention
from dtcp.softmax.positions import TokenPositions
from tests.sequence.test_document_balanced import a_row

STYLES = (
    AllGatherAttention(),
    RingAttention(),
    HaloAttention(6),
    AllGatherAttention(ranks_per_node=2),
    RingAttention(ranks_per_node=2),
    HaloAttention(6, ranks_per_node=2),
)


@pytest.mark.parametrize("layout", [DocumentBalanced, HeadTail])
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_tables_of_balanced_documents_hold_own_and_required_keys_and_their_positions(style, layout):
    draw = random.Random(0)
    for _ in range(12):
        num_shards, seq_len = 4, 8 * draw.randint(2, 9)
        documents = Documents((a_row(draw, seq_len),), seq_len)
        padding = [left] if (left := seq_len - sum(documents.lengths[0])) else []
        mask = Causal() & SlidingWindow(6) if isinstance(style, HaloAttention) else Causal()
        coords = Coords.of(documents)
        made = layout.for_batch(documents, num_shards)
        given = 7 + torch.arange(seq_len)[None]
        for rank, counted in product(range(num_shards), (False, True)):
            # In padding, behind the last document, those that documents count count on.
            position_ids = Documents(((*documents.lengths[0], *padding),), seq_len).position_ids()
            position_ids = position_ids if counted else given
            metadata = style.rank_metadata(made, rank, KeyIntervals.of(mask, coords))
            positions = TokenPositions(documents, None if counted else given)
            metadata = metadata.with_position_ids(positions, made, rank)
            indices = made.token_indices(rank)
            assert torch.equal(metadata.position_ids.long(), position_ids[:, indices])
            tables = zip(metadata.key_token_index, metadata.key_position_ids, strict=True)
            found = []
            for count, (tokens, positions) in zip(metadata.key_counts, tables, strict=True):
                found += tokens[:count].tolist()
                assert found[-count:] == sorted(found[-count:]) if count else True
                assert torch.equal(positions[0, :count].long(), position_ids[0, tokens[:count]])
            own = set(made.token_indices(rank).tolist())
            ends = zip(*(x[0].tolist() for x in mask.intervals(coords)), strict=True)
            seen = [set(range(first, last + 1)) for first, last in ends]
            assert sorted(found) == sorted(own.union(*(seen[token] for token in own)))


def test_keys_that_are_shared_are_unused_behind_those_that_are_there():
    """Kernels are called with as many keys as there is room for."""
    documents = Documents(((20, 28),), 48)
    made = DocumentBalanced.for_batch(documents, 4)
    intervals = KeyIntervals.of(Causal(), Coords.of(documents))
    for rank in range(4):
        metadata = SharedKVAttention().rank_metadata(made, rank, intervals)
        (count,) = metadata.key_counts
        assert (metadata.key_token_index[0, :count] >= 0).all()
        assert (metadata.key_token_index[0, count:] == -1).all() and count < 48
    styles = [SharedKVAttention(tile=tile) for tile in (48, 4)]
    whole, fine = (x.rank_metadata(made, 0, intervals).block_ranges for x in styles)
    assert whole.shape[2] < fine.shape[2]

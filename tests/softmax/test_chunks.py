"""Chunked attention, as in Llama 4: one interval a query, cut where documents start."""

from itertools import product

import pytest

from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.softmax import AllGatherAttention, HaloAttention, RingAttention, UlyssesAttention
from tests.harness import packings
from tests.harness.attention_parity import (
    CHUNKS,
    LAYOUTS,
    Case,
    assert_equals_one_device,
    mixer_on,
    shard_case,
)
from tests.harness.spmd import spmd


@pytest.mark.slow_where(lambda ranks: ranks in (1, 4))
@spmd(ranks=(1, 2, 3, 4))
def test_chunked_attention_equals_one_device(mesh, ranks):
    """Every packing and layout, with chunks that no border of a document or a shard heeds."""
    heads = {"heads": 6, "kv_heads": 3} if ranks == 3 else {}
    layouts = LAYOUTS if ranks == 2 else (HeadTail,)
    for style in (RingAttention(), AllGatherAttention(), HaloAttention(7), UlyssesAttention()):
        mixer = mixer_on(mesh, style, CHUNKS.mask)
        rows = (packings.across_borders, packings.last_shard_padding, packings.equal_rows)
        for layout, packing in product(layouts, rows):
            assert_equals_one_device(Case(CHUNKS, packing, **heads), mixer, mixer, mesh, layout)


@spmd(ranks=2)
def test_chunks_on_a_shards_border_need_no_other_rank(mesh):
    mixer = mixer_on(mesh, RingAttention(), CHUNKS.mask)
    case = Case(CHUNKS, packings.one_document, seq_len=4 * 7)
    metadata = shard_case(case, mixer, mesh, Contiguous).attn_metadata
    assert not metadata[mixer.metadata_key].counts.any()

"""What a mask comes to for plain kernels: pieces, calls, lists of blocks, against dense masks."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dtcp.kernels.softmax.calls import Call, CallKind, Span, calls_of
from dtcp.kernels.softmax.demand import demand_of
from dtcp.kernels.softmax.libraries.flash4 import block_size
from dtcp.kernels.softmax.pieces import (
    EVERY_ROW,
    MOST_PIECES,
    find_pieces,
    read_pieces,
    without_room,
)
from dtcp.kernels.softmax.sparsity import block_states, key_blocks, query_blocks
from dtcp.kernels.softmax.types import Keys, Queries, SoftmaxParams
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Bidirectional, Causal, SlidingWindow
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import (
    AllGatherAttention,
    HaloAttention,
    HybridAttention,
    RingAttention,
    UlyssesAttention,
)
from tests.harness import packings, work
from tests.harness.attention_parity import IMAGES_IN_WINDOW, MASK_CASES, PREFIX
from tests.harness.dense_attention import seen_under

ROOM = 512
WINDOW = Causal() & SlidingWindow(9)


def random_intervals(kind, generator):
    """(first, last, token index) of some rows: noise, ends that move on by one, a window."""

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    rows, length, tokens = int(draw(1, 3, 1)), int(draw(1, 40, 1)), int(draw(1, 50, 1))
    index = torch.randperm(tokens, generator=generator)[: int(draw(1, tokens + 1, 1))]
    index = index.sort().values
    if kind == "noise":
        first = draw(0, tokens, rows, length)
        last = first + draw(-2, 10, rows, length)
    elif kind == "steps":
        first = draw(0, 2, rows, length).cumsum(1)
        last = first + draw(0, 4, rows, length)
    else:
        last = draw(0, 3, rows, length).clamp(max=1).cumsum(1)
        first, index = (last - 4).clamp(min=0), torch.arange(tokens)
    return first.int(), last.int(), index.int()


def dense(first, last, index):
    return (index >= first[..., None]) & (index <= last[..., None])


@pytest.mark.parametrize("kind", ["noise", "steps", "window"])
def test_pieces_under_any_window_they_allow_are_the_mask(kind):
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        first, last, index = random_intervals(kind, generator)
        with_unused = torch.nn.functional.pad(index, (0, 3), value=-1)
        pieces = read_pieces(find_pieces(first, last, with_unused, tiles=ROOM))
        assert pieces is not None
        for bounds in ((5, 7), (6, 8)):
            seen = torch.zeros(*first.shape, len(index), dtype=torch.bool)
            visited = torch.zeros(first.shape, dtype=torch.int64)
            for piece in pieces:
                rows = slice(None) if piece.row == EVERY_ROW else slice(piece.row, piece.row + 1)
                at = (rows, slice(piece.q_start, piece.q_stop))
                sizes = (piece.q_stop - piece.q_start, piece.k_stop - piece.k_start)
                window = seen_under(*sizes, *(piece[bound] for bound in bounds))
                seen[(*at, slice(piece.k_start, piece.k_stop))] |= window
                visited[at] += 1
            assert torch.equal(seen, dense(first, last, index))
            assert int(visited.max()) <= 1


def seen_by(calls, rows, length, num_keys):
    """What calls compute, as a dense mask; and that no query is in two of them."""
    seen = torch.zeros(rows, length, num_keys, dtype=torch.bool)
    for call in calls:
        if call.every_row:
            (span,) = call.spans
            window = seen_under(
                span.q_stop - span.q_start, span.k_stop - span.k_start, call.left, call.right
            )
            assert not seen[:, call.queries].any()
            seen[:, call.queries, call.keys] = window
            continue
        lengths = call.lengths(torch.device("cpu"))
        q, k = (call.queries.start + lengths.q).tolist(), (call.keys.start + lengths.k).tolist()
        assert (q[-1], k[-1]) == (call.queries.stop, call.keys.stop)
        for a, b, c, d in zip(q[:-1], q[1:], k[:-1], k[1:], strict=True):
            assert b - a <= lengths.longest_q and d - c <= lengths.longest_k
            if a < b and c < d:
                row = a // length
                assert row == (b - 1) // length == c // num_keys == (d - 1) // num_keys
                part = seen[row, a - row * length : b - row * length]
                assert not part.any()
                window = seen_under(b - a, d - c, call.left, call.right)[0]
                part[:, c - row * num_keys : d - row * num_keys] = window
    return seen


@pytest.mark.parametrize("kind", ["noise", "steps", "window"])
def test_calls_of_a_backend_compute_the_mask(kind):
    generator, plain = torch.Generator().manual_seed(1), 0
    for _ in range(200):
        first, last, index = random_intervals(kind, generator)
        rows, length = first.shape
        table = find_pieces(first, last, index, tiles=ROOM)
        calls = calls_of(table, batch=rows, length=length, num_keys=len(index))
        if calls is not None:
            plain += 1
            seen = seen_by(calls, rows, length, len(index))
            assert torch.equal(seen, dense(first, last, index))
    assert plain >= (20 if kind == "noise" else 100)


def steps_of(style, layout, rank, mask, documents):
    """(calls, intervals of local queries, token index) of every attention a rank computes."""
    block = packings.blocks_of_tokens(documents)
    coords = Coords.of(documents, block=block, prefix=packings.prefix_of_tokens(documents))
    metadata = style.rank_metadata(layout, rank, KeyIntervals.of(mask, coords))
    metadata = getattr(metadata, "outer", metadata)
    rows, length = metadata.first_key.shape[-2:]
    intervals = [x.view(-1, rows, length) for x in (metadata.first_key, metadata.last_key)]
    indices = metadata.key_token_index
    tables = metadata.pieces if indices.ndim == 2 else metadata.pieces[None]
    counts = getattr(metadata, "key_counts", [indices.numel()])
    for part, index, count in zip(tables, indices.view(len(tables), -1), counts, strict=True):
        real = index[:count]
        for table, *interval in zip(part.view(-1, *part.shape[-2:]), *intervals, strict=True):
            calls = calls_of(table, batch=rows, length=length, num_keys=len(real))
            yield calls, interval, real


STYLES = [
    (RingAttention(), (Contiguous, HeadTail, PerDocument, BlockBalanced, DocumentBalanced)),
    (AllGatherAttention(), (Contiguous, HeadTail, PerDocument, BlockBalanced)),
    (UlyssesAttention(), (Contiguous, HeadTail, PerDocument)),
    (HybridAttention(inner_ranks=2), (Contiguous, HeadTail)),
    (HybridAttention(outer=AllGatherAttention(), inner_ranks=2), (HeadTail,)),
    (HaloAttention(64, right=64), (Contiguous, HeadTail)),
]


@pytest.mark.parametrize(("style", "layouts"), STYLES, ids=lambda x: f"{x}"[:28])
def test_calls_of_every_strategy_compute_its_mask_for_a_backend(style, layouts):
    plain = 0
    for mask_case, packing, layout_type in itertools.product(MASK_CASES, PACKINGS, layouts):
        documents = packing(64, 4)
        if (
            layout_type in (PerDocument, BlockBalanced, DocumentBalanced)
            and len(set(documents.lengths)) > 1
        ):
            continue
        layout = layout_type.for_batch(documents, 4)
        for rank in range(4):
            for calls, interval, index in steps_of(style, layout, rank, mask_case.mask, documents):
                if calls is not None:
                    plain += 1
                    sizes = (*interval[0].shape, len(index))
                    assert torch.equal(seen_by(calls, *sizes), dense(*interval, index))
    assert plain > 50


PACKINGS = (packings.one_document, packings.two_rows, packings.across_borders)


def calls_on(style, layout, rank, mask, documents):
    return [calls for calls, _, _ in steps_of(style, layout, rank, mask, documents)]


def described(calls):
    return [(call.kind.value, len(call.spans), call.queries, call.keys) for call in calls]


@pytest.mark.parametrize("rank", range(4))
def test_a_ring_over_one_document_in_head_tail_gives_a_backend_two_plain_calls_at_most(rank):
    """One, in fact: the own keys are causal across both chunks, the others' a rectangle."""
    documents, layout = Documents.single(2, 64), HeadTail(64, 4)
    own, *others = calls_on(RingAttention(), layout, rank, Causal(), documents)
    head, tail, whole = slice(0, 8), slice(8, 16), slice(0, 16)
    assert described(own) == [("causal", 1, whole, whole)]
    for step, calls in enumerate(others, 1):
        # What came from a rank below is its head, which all see; from one above, both chunks.
        expected = ("rectangle", 1, whole, head) if step <= rank else ("rectangle", 1, tail, whole)
        assert described(calls) == [expected]
        assert calls[0].every_row
    (at_once,) = calls_on(AllGatherAttention(), layout, rank, Causal(), documents)
    assert len(at_once) == (1 if rank == 3 else 2)
    assert all(call.kind is CallKind.CAUSAL and call.every_row for call in at_once)


def test_calls_are_skewed_where_a_diagonal_has_fewer_queries_than_keys():
    more, same = Span(0, 4, 0, 8), Span(4, 8, 8, 12)
    assert Call((more,), None, 0).skewed and Call((same, more), 3, 0).skewed
    assert not Call((more,), None, None).skewed
    assert not Call((same,), None, 0).skewed


def test_packed_documents_are_one_packed_call_of_a_backend():
    documents = Documents(((20, 1, 1, 12, 30), (5, 40, 10)), 64)
    for mask, kind in ((Causal(), "causal"), (Bidirectional(), "rectangle"), (WINDOW, "window")):
        for rank in range(4):
            for style in (AllGatherAttention(), UlyssesAttention()):
                ((call,),) = calls_on(style, Contiguous(64, 4), rank, mask, documents)
                assert (call.kind.value, call.every_row) == (kind, False)
            for calls in calls_on(RingAttention(), Contiguous(64, 4), rank, mask, documents):
                assert len(calls) <= 1 or mask is WINDOW
    (calls,) = calls_on(AllGatherAttention(), HeadTail(64, 4), 1, Causal(), documents)
    assert len(calls) <= 2 and {call.kind for call in calls} == {CallKind.CAUSAL}


def test_a_table_is_remembered_without_its_room_for_more():
    """Each attention hashes one, and a thousand are kept: of a long row, 0.15 MB were zeros."""
    index = torch.arange(8 * MOST_PIECES)
    for length, count in ((8, MOST_PIECES), (64, MOST_PIECES // 8), (4, 1)):
        table = find_pieces((index // length * length)[None], index[None], index, tiles=1)
        for whole in (table, torch.cat((table, torch.zeros(ROOM, 9, dtype=torch.int64)))):
            used = without_room(whole)
            assert len(used) == count
            assert read_pieces(used) == read_pieces(whole)
    assert read_pieces(used) is None  # more than there is room for


def test_a_further_layer_does_no_work_for_each_document_of_a_packed_call():
    works = []
    for documents in (4, 40):
        index = torch.arange(8 * documents)
        pieces = find_pieces((index // 8 * 8)[None], index[None], index, tiles=1)
        calls = calls_of(pieces, batch=1, length=len(index), num_keys=len(index))
        x = torch.empty(1, len(index), 2, 8)
        queries, keys = Queries(x, index[None], index[None]), Keys(x, x, index)

        def layer(calls=calls, queries=queries, keys=keys):
            demand_of(queries, keys, calls, SoftmaxParams(1.0))
            for call in calls:
                call.lengths(queries.q.device)

        layer()
        works.append(work.calls_of(layer))
        assert [len(call.spans) for call in calls] == [documents]
    assert works[0] == works[1]


def test_documents_cut_head_tail_each_are_two_packed_calls_of_a_backend():
    documents = Documents(((24, 16, 24),), 64)
    layout = PerDocument.for_batch(documents, 4)
    for rank in range(4):
        own, *others = calls_on(RingAttention(), layout, rank, Causal(), documents)
        assert len(own) <= 2 and all(call.packed for call in own)
        assert all(len(calls) <= 2 for calls in others)


def test_a_window_with_its_halo_is_one_call_of_a_backend():
    documents = Documents.single(1, 64)
    ((call,),) = calls_on(HaloAttention(9), Contiguous(64, 4), 2, WINDOW, documents)
    assert (call.left, call.right, call.queries, call.keys) == (8, 0, slice(0, 16), slice(0, 24))
    (calls,) = calls_on(HaloAttention(9), HeadTail(64, 4), 1, WINDOW, documents)
    assert [(c.left, c.right) for c in calls] in ([(8, 0)], [(8, 0), (8, 0)])


def test_more_pieces_than_there_is_room_for_are_no_plain_mask_for_a_backend():
    length = 3 * MOST_PIECES
    first = torch.zeros(1, length, dtype=torch.int32)
    first[0, 1::2] = torch.arange(length // 2)
    last = torch.maximum(first, torch.full_like(first, 5))
    table = find_pieces(first, last, torch.arange(length, dtype=torch.int32), tiles=1)
    assert len(table) == MOST_PIECES and read_pieces(table) is None
    assert calls_of(table, batch=1, length=length, num_keys=length) is None


@pytest.mark.parametrize("blocks", [(16, 8), (8, 16), (64, 64), (1, 1)])
@pytest.mark.parametrize("mask_case", [IMAGES_IN_WINDOW, PREFIX])
def test_blocks_are_full_where_all_is_seen_and_listed_where_anything_is(mask_case, blocks):
    """Both ways, with slots behind the keys that hold none."""
    documents = packings.two_rows(44, 4)
    block = packings.blocks_of_tokens(documents)
    coords = Coords.of(documents, block=block, prefix=packings.prefix_of_tokens(documents))
    first, last = mask_case.mask.intervals(coords)
    index = torch.nn.functional.pad(torch.arange(0, 44, 2), (0, 5), value=-1).int()
    rows, num_keys = len(first), len(index)
    noise = torch.zeros(rows, 44, 1, 1)
    queries, keys = Queries(noise, first, last), Keys(*(noise[:, :num_keys],) * 2, index)
    partial, full = block_states(queries, keys, *blocks)
    seen = dense(first, last, index)
    assert not (partial & full).any()
    for row, at_q, at_k in itertools.product(*map(range, partial.shape)):
        cut = seen[
            row,
            at_q * blocks[0] : (at_q + 1) * blocks[0],
            at_k * blocks[1] : (at_k + 1) * blocks[1],
        ]
        whole = cut.shape[1] == blocks[1]
        assert full[row, at_q, at_k] == (bool(cut.all()) and whole)
        # Listed, then, are those from the first key to the last one that a block of queries sees.
        mine = seen[row, at_q * blocks[0] : (at_q + 1) * blocks[0]].any(0).nonzero().flatten()
        listed = bool((mine >= at_k * blocks[1]).any() and (mine < (at_k + 1) * blocks[1]).any())
        assert (partial | full)[row, at_q, at_k] == listed
    for lists, states in (
        (query_blocks(queries, keys, *blocks), (partial, full)),
        (key_blocks(queries, keys, *blocks), (partial.mT, full.mT)),
    ):
        for count, indices, state in zip(lists[::2], lists[1::2], states, strict=True):
            assert count.dtype == indices.dtype == torch.int32 and indices.shape == state.shape
            for row, own in itertools.product(*map(range, count.shape)):
                listed = indices[row, own, : count[row, own]].tolist()
                assert listed == state[row, own].nonzero().flatten().tolist()


class Launches(TorchDispatchMode):
    """Counts ops that are no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_lists_of_blocks_take_few_launches():
    """Each layer makes them, forward and backward."""
    index = torch.arange(64, dtype=torch.int32)
    x = torch.zeros(1, 64, 1, 1)
    queries, keys = Queries(x, 0 * index[None], index[None]), Keys(x, x, index)
    for lists in (query_blocks, key_blocks):
        with Launches() as launches:
            lists(queries, keys, 16, 16)
        assert launches.count <= 40


@pytest.mark.parametrize("arch", [90, 100])
def test_blocks_divide_as_the_backend_demands(arch):
    """Multiples of the tiles that flash-attn-4 4.0.0b36 takes, forward and backward."""
    for width in (64, 128, 192, 256) if arch == 90 else (64, 128):
        queries, keys = block_size(width, arch)
        tiles = {64: (128, 128), 128: (128, 128), 192: (128, 96), 256: (128, 64)}[width]
        assert (queries % tiles[0], keys % tiles[1]) == (0, 0)

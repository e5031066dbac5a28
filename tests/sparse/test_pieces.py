"""Tables of compressed sparse attention on pieces, held against their meaning, token by token."""

import random

import pytest

from dtcp.kernels.sparse.types import NOWHERE
from dtcp.recurrent.metadata import conv_metadata, delta_metadata
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from dtcp.sequence.mask_work import MaskWork
from dtcp.sequence.masks import Causal
from dtcp.sequence.row_layouts import layout_of_batch, line_of
from dtcp.sparse.metadata import Compression, sparse_metadata
from dtcp.sparse.pieces import pieces_metadata

NOTHING = -2
"""In a place to which nothing was brought."""


def exchange(routes, onward, held, length):
    """Move numbers as `bring_left` moves tokens: to every rank `length` places."""
    out = [[NOTHING] * length for _ in routes]
    hop(routes, held, out)
    if onward[0][0]:
        hop(onward, [row.copy() for row in out], out)
    return out


def hop(routes, held, out):
    for to, (_, receive) in enumerate(routes):
        for peer in range(len(routes)):
            sent = [hop for hop in routes[peer][0] if hop[0] == to and hop[1] < hop[2]]
            taken = [hop for hop in receive if hop[0] == peer and hop[1] < hop[2]]
            assert [b - a for _, a, b in sent] == [b - a for _, a, b in taken]
            for (_, first, stop), (_, start, _) in zip(sent, taken, strict=True):
                out[to][start : start + stop - first] = held[peer][first:stop]


def ends_of(documents):
    """For each token of the line of all rows: where its document starts; None for padding."""
    starts = []
    for row, lengths in enumerate(documents.lengths):
        for length in lengths:
            starts += [len(starts)] * length
        starts += [None] * ((row + 1) * documents.seq_len - len(starts))
    return starts


def check_tables(documents, ranks, window, compression, tile, nodes=0):
    coords = Coords.of(documents)
    work = MaskWork.under(Causal(), coords)
    layout = layout_of_batch(DocumentBalanced, documents, ranks, work)
    line = line_of(layout, documents.batch)
    start, ratio = ends_of(documents), 1 if compression is None else compression.ratio
    parts = [
        pieces_metadata(coords, layout, rank, window, compression, tile=tile, ranks_per_node=nodes)
        for rank in range(ranks)
    ]
    assert len({tuple(x.shape for x in part.tensors()) for part in parts}) == 1
    held = [line.token_indices(rank).tolist() for rank in range(ranks)]
    reaches = [window - 1, *([] if compression is None else [compression.reach])]
    lined_up = []
    for number, order in enumerate(("key_order", "pooled_order")[: len(reaches)]):
        orders = [getattr(part, order).tolist() for part in parts]
        routes = [part.routes[number].tolist() for part in parts]
        onward = [part.onward[number].tolist() for part in parts]
        halos = exchange(routes, onward, held, len(orders[0]) - len(held[0]))
        both = [own + halo for own, halo in zip(held, halos, strict=True)]
        lined_up.append([[x[i] for i in each] for x, each in zip(both, orders, strict=True)])
    closed = [
        [t for t in own if start[t] is not None and (t - start[t] + 1) % ratio == 0] for own in held
    ]
    entries = [[NOWHERE]] * ranks
    if compression is not None:
        room = parts[0].closing.shape[1]
        own_entries = [x + [NOTHING] * (parts[0].end.shape[1] - len(x)) for x in closed]
        tables = ([x[0].tolist() for x in p.of_entries] for p in parts)
        entries = exchange(*zip(*tables, strict=True), own_entries, room)
    for rank, part in enumerate(parts):
        _check_keys(part, held[rank], lined_up[0][rank], start, window)
        if compression is not None:
            _check_entries(part, held[rank], entries[rank], start, ratio)
            _check_windows(part, closed[rank], lined_up[1][rank], start, compression)


def _check_keys(part, held, lined_up, start, window):
    key_token = part.key_token_index.tolist()
    first, last = part.window_first[0].tolist(), part.last[0].tolist()
    done, readers = [], [set() for _ in key_token]
    for begin, stop, key_start, key_stop, _, _ in part.tiles[0].tolist():
        for slot in range(begin, stop):
            token = held[slot]
            seen = [
                k for k in range(key_start, key_stop) if first[slot] <= key_token[k] <= last[slot]
            ]
            expected = []
            if start[token] is not None:
                expected = list(range(max(start[token], token - window + 1), token + 1))
            assert [key_token[k] for k in seen] == [lined_up[k] for k in seen] == expected
            run = part.key_run[0, slot].tolist()
            assert list(range(*run)) == seen
            for k in seen:
                readers[k].add(slot)
            done.append(slot)
    assert done == list(range(len(held)))
    assert [set(range(*run)) for run in part.key_readers[0].tolist()] == readers


def _check_entries(part, held, entries, start, ratio):
    closing = part.closing[0].tolist()
    assert closing == [NOWHERE if x == NOTHING else x for x in entries]
    first, last = part.first[0].tolist(), part.last[0].tolist()
    readers = [set() for _ in closing]
    for begin, stop, _, _, low, high in part.tiles[0].tolist():
        for slot in range(begin, stop):
            token = held[slot]
            seen = [e for e in range(low, high) if first[slot] <= closing[e] <= last[slot]]
            expected = []
            if start[token] is not None:
                expected = list(range(start[token] + ratio - 1, token + 1, ratio))
            assert [closing[e] for e in seen] == expected
            assert list(range(*part.entry_run[0, slot].tolist())) == seen
            for e in seen:
                readers[e].add(slot)
    assert [set(range(*run)) for run in part.entry_readers[0].tolist()] == readers


def _check_windows(part, closed, lined_up, start, compression):
    ends, before = part.end[0].tolist(), part.has_previous[0].tolist()
    ratio = compression.ratio
    for number, token in enumerate(closed):
        within, end = token - start[token] + 1, ends[number]
        assert before[number] == (within >= 2 * ratio)
        assert part.entry_position_ids[0, number] == within - ratio
        length = 2 * ratio if compression.overlap and before[number] else ratio
        assert lined_up[end - length + 1 : end + 1] == list(range(token - length + 1, token + 1))


def random_case(draw):
    ranks, rows = draw.choice((1, 2, 3, 4, 5, 8)), draw.choice((1, 1, 2, 3))
    seq_len = ranks * draw.randint(1, 24)
    packed = []
    for _ in range(rows):
        lengths, left = [], draw.choice((0, seq_len, seq_len, draw.randint(0, seq_len)))
        while left:
            lengths.append(min(left, draw.choice((1, 2, draw.randint(1, 9), draw.randint(1, 99)))))
            left -= lengths[-1]
        packed.append(tuple(lengths))
    kind = draw.choice((None, Compression(draw.randint(1, 9), overlap=draw.random() < 0.5)))
    of = (draw.randint(1, 20), kind, draw.randint(1, 9))
    nodes = draw.choice([x for x in range(ranks + 1) if x == 0 or ranks % x == 0])
    return Documents(tuple(packed), seq_len), ranks, *of, nodes


@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_tables_of_pieces_say_what_each_query_reads_and_where_it_comes_from(count):
    for seed in range(count):
        case = random_case(random.Random(seed))
        try:
            check_tables(*case)
        except (AssertionError, IndexError, ValueError) as error:
            raise AssertionError(f"seed {seed}: {case}") from error


@pytest.mark.parametrize("ranks", [3, 4, 8])
@pytest.mark.parametrize("rows", [1, 3])
def test_tables_of_balanced_batches_have_one_shape_however_rows_are_cut(rows, ranks):
    """Of one document, of many, of none; rows of all kinds in one batch: so they share a graph."""
    length = 16 * ranks
    kinds = [(1,) * length, (length,), (), (16,) * ranks, (length // 2, 3, 1), (length - 1, 1)]
    shapes = set()
    for first in range(len(kinds)):
        packed = [kinds[(first + 2 * row + row // 2) % len(kinds)] for row in range(rows)]
        documents = Documents(tuple(packed), length)
        coords = Coords.of(documents)
        layout = layout_of_batch(
            DocumentBalanced, documents, ranks, MaskWork.under(Causal(), coords)
        )
        of = coords, layout, 0
        made = (
            pieces_metadata(*of, 5, Compression(3, overlap=True)),
            delta_metadata(*of),
            conv_metadata(coords, 4, layout),
        )
        shapes.add(tuple(x.shape for each in made for x in each.tensors()))
    assert len(shapes) == 1


@pytest.mark.parametrize("rank", range(3))
def test_tables_of_segments_are_those_of_the_rule(rank):
    """Runs of keys and entries, and of the queries that read each; keys follow their halo."""
    window, halo, each = 5, 4, 6
    documents, layout = Documents(((11, 2, 14), (30,)), 36), HeadTail(36, 3)
    segments, tokens = [layout.segments(r) for r in range(3)], layout.token_indices(rank).tolist()
    made = sparse_metadata(Coords.of(documents), segments, rank, window, Compression(3), halo=True)
    keys = made.key_token_index.tolist()
    for row, document in enumerate(documents.document().tolist()):
        closing = made.closing[row].tolist()
        key_readers, entry_readers = ([set() for _ in x] for x in (keys, closing))
        for slot, token in enumerate(tokens):
            own, mine = slot // each * (halo + each), document[token]
            reads, sees = set(), set()
            if mine >= 0:
                places = range(own, own + halo + each)
                inside = (k for k in places if token - window < keys[k] <= token and keys[k] >= 0)
                reads = {k for k in inside if document[keys[k]] == mine}
                sees = {e for e, c in enumerate(closing) if c <= token and document[c] == mine}
            assert set(range(*made.key_run[row, slot].tolist())) == reads
            run = set(range(*made.entry_run[row, slot].tolist()))
            assert sees <= run and all(closing[e] == NOWHERE for e in run - sees)
            for readers, read in ((key_readers, reads), (entry_readers, sees)):
                for place in read:
                    readers[place].add(slot)
        assert [set(range(*run)) for run in made.key_readers[row].tolist()] == key_readers
        assert [set(range(*run)) for run in made.entry_readers[row].tolist()] == entry_readers

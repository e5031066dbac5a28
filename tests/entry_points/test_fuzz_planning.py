"""What is planned on the host, on random arguments: documents, layouts, masks, routes, balance.

The truth of each is a loop over tokens in plain Python. 2,000 cases together with those of
batches and of ranks; the slow test runs the same on many more.
"""

from itertools import accumulate, pairwise

import pytest
import torch

from dtcp.kernels.softmax.block_ranges import block_ranges
from dtcp.labels import IGNORED, look_ahead, shift_labels
from dtcp.recurrent.metadata import chain_of, halo_route
from dtcp.sequence.block_balanced import BlockBalanced, assign_blocks, block_work
from dtcp.sequence.block_runs import vision_blocks
from dtcp.sequence.documents import PADDING, Documents
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import (
    Bidirectional,
    BlockBidirectional,
    Causal,
    Coords,
    SlidingWindow,
)
from dtcp.sequence.per_document import PerDocument
from dtcp.sequence.prefix_masks import FirstTokens, Prefix, PrefixLM
from dtcp.sequence.routes import Route, halo_runs, halo_token_indices, rolled
from dtcp.sequence.row_layouts import RowLayouts
from dtcp.softmax.required_keys import required_keys
from tests.harness import reference
from tests.harness.fuzz import run_cases

CASES = 1240
MANY = 31_000
NO_TENSORS = (None, [[0, 1]], 3)


def spelled_out(lengths, seq_len):
    """(document, position id, start, end) of every token of one row, by counting."""
    row, start = [], 0
    for index, length in enumerate(lengths):
        row += [(index, i, start, start + length - 1) for i in range(length)]
        start += length
    return row + [(PADDING, 0, i, i) for i in range(start, seq_len)]


def assert_documents(documents, rows, seq_len):
    """The documents of a batch are these, and all that tokens know of theirs."""
    assert documents.lengths == tuple(map(tuple, rows)) and documents.seq_len == seq_len
    known = (documents.document(), documents.position_ids(), documents.starts(), documents.ends())
    expected = [spelled_out(row, seq_len) for row in rows]
    for index, field in enumerate(known):
        assert field.tolist() == [[token[index] for token in row] for row in expected]


def a_row(draw, most=24):
    seq_len = draw.integer(1, most)
    return seq_len, draw.lengths(seq_len)


def documents_of_lengths(draw):
    seq_len = draw.integer(1, 24)
    rows = draw.rows(draw.integer(1, 3), seq_len)
    wrong = [(*rows[:-1], (*rows[-1], x)) for x in (0, -1, seq_len + 1, 1.0, 1.5, None, "1", True)]
    given = draw.bad("lengths", rows, *wrong, (3,), 3, None, ((1, 2), None))
    length = draw.bad("seq_len", seq_len, float(seq_len), None, -1, "8", torch.tensor(1.5))
    if draw.chance(0.1) and given is rows:
        given = tuple(torch.tensor(row) for row in rows) if draw.chance() else list(map(list, rows))
        draw.may_be_refused("lengths in other containers")
    documents = Documents(given, length)
    assert_documents(documents, rows, seq_len)
    hash(documents)
    longer = draw.bad(
        "padded", seq_len + draw.integer(0, 5), max(0, sum(max(rows, key=sum)) - 1), 2.5
    )
    if longer == 0:
        draw.may_be_refused("a row of nothing")
    assert_documents(documents.padded(longer), rows, longer)


def documents_that_fill_rows(draw):
    rows, seq_len = draw.integer(1, 3), draw.integer(1, 9)
    count = draw.bad("batch", rows, -1, 1.0, None)
    length = draw.bad("seq_len", seq_len, 0, -1, 2.0, None)
    assert_documents(Documents.single(count, length), [(seq_len,)] * rows, seq_len)


def documents_of_position_ids(draw):
    rows = draw.integer(1, 3)
    seq_len = draw.integer(1, 16)
    filled = [draw.lengths(seq_len) for _ in range(rows)]
    # Position ids do not show what is padding: each such token is a document.
    filled = [(*row, *[1] * (seq_len - sum(row))) for row in filled]
    ids = torch.tensor([[x[1] for x in spelled_out(row, seq_len)] for row in filled])
    wrong = [ids + 1, ids - 1, ids[0], ids[None], ids[:, :0], ids.bool(), ids.double() + 0.5]
    given = draw.odd("dtype", ids, ids.int(), ids.double(), ids.short(), ids.to(torch.uint8))
    given = draw.odd("rows", given, ids[:0])
    given = draw.bad("position_ids", given, *wrong, *NO_TENSORS)
    documents = Documents.from_position_ids(given)
    assert_documents(documents, filled[: len(given)], seq_len)


def documents_of_padded_rows(draw):
    rows, seq_len = draw.integer(1, 3), draw.integer(1, 16)
    lengths = [draw.lengths(seq_len) for _ in range(rows)]
    padding = torch.tensor([[x[0] < 0 for x in spelled_out(row, seq_len)] for row in lengths])
    ids = torch.tensor([[x[1] for x in spelled_out(row, seq_len)] for row in lengths])
    wrong = [padding[0], padding[None], padding.double(), padding.int(), *NO_TENSORS]
    wrong += [padding.to(torch.uint8)]
    early = torch.cat((~padding[:, :1], padding[:, 1:]), dim=1)
    if seq_len > 1 and bool((early[:, :-1] & ~early[:, 1:]).any()):
        wrong.append(early)
    mask = draw.bad("padding", padding, *wrong)
    counted = [(sum(row),) if row else () for row in lengths]
    if draw.chance(0.2):
        assert_documents(Documents.from_padded(None, mask), counted, seq_len)
        return
    shapes = [ids[:, :-1], torch.cat((ids, ids), 1), ids[0], ids[None], ids.double() + 0.5]
    shapes += [torch.cat((ids, ids)), [[0]]]
    if any(map(len, lengths)):
        ids = draw.bad("position_ids", ids, *shapes)
    else:
        ids = draw.odd("position_ids", ids, *shapes)
    assert_documents(Documents.from_padded(ids, mask), lengths, seq_len)


def documents_of_boundaries(draw):
    seq_len, lengths = a_row(draw)
    bounds = list(accumulate(lengths, initial=0))
    wrong = [
        [1, *(x + 1 for x in bounds[1:])],
        [-1, *bounds[1:]],
        [*bounds, bounds[-1] - 1],
        [*bounds, bounds[-1]],
        [*bounds, seq_len + 1],
        [*bounds, -1],
        [*bounds, -1, -1],
        [float(x) for x in bounds],
        torch.tensor(bounds).bool(),
        torch.tensor(bounds).double(),
        torch.tensor([bounds]),
        torch.tensor(bounds[-1]),
        [],
        [bounds],
        None,
        5,
        [*bounds, None],
        [*bounds, True],
    ]
    others = tuple(bounds), torch.tensor(bounds), torch.tensor(bounds).int()
    given = draw.odd("container", bounds, *others)
    given = draw.bad("cu_seqlens", given, *wrong)
    length = draw.bad("seq_len", seq_len, float(seq_len), None, bounds[-1] - 1)
    assert_documents(Documents.from_cu_seqlens(given, length), [lengths], seq_len)


def documents_of_batches(draw):
    rows, seq_len = draw.integer(1, 3), draw.integer(2, 16)
    lengths = [draw.lengths(seq_len) for _ in range(rows)]
    padding = torch.tensor([[x[0] < 0 for x in spelled_out(row, seq_len)] for row in lengths])
    ids = torch.tensor([[x[1] for x in spelled_out(row, seq_len)] for row in lengths])
    arguments = {}
    expected = [(seq_len,)] * rows
    if draw.chance():
        documents = Documents(tuple(lengths), seq_len)
        other = (
            Documents(tuple(lengths), seq_len + 1),
            Documents((*lengths, (), ()), seq_len),
            lengths,
        )
        arguments["documents"] = draw.bad("documents", documents, *other)
        expected = lengths
    elif draw.chance():
        wrong = [ids[:, :-1], ids[0], ids[None, None], "0123", [ids]]
        arguments["position_ids"] = draw.bad("position_ids", ids, *wrong)
        arguments["padding_mask"] = padding
        expected = lengths
        if not bool((ids.diff(dim=1)[~padding[:, 1:]] < 1).any()):
            expected = [(sum(row),) if row else () for row in lengths]
    if "documents" in arguments or draw.chance(0.3):
        mask = padding if "documents" in arguments or "position_ids" in arguments else None
        if mask is not None:
            wrong = [padding[0], padding[:, :-1], torch.cat((padding, padding)), [[True]], 3]
            mask = draw.odd("padding dtype", mask, padding.int(), padding.double())
            mask = draw.bad("padding_mask", mask, *wrong)
        arguments["padding_mask"] = mask
    sizes = (draw.odd("rows", rows, rows + 1), draw.odd("seq_len", seq_len, seq_len - 1))
    if sizes != (rows, seq_len):
        expected = [(sizes[1],)] * sizes[0]
        if arguments:
            draw.is_bad = draw.is_bad or any(x is not None for x in arguments.values())
    assert_documents(Documents.of_batch(*sizes, **arguments), expected, sizes[1])


def a_layout(draw, num_shards=None, most=6):
    """A sound layout, for functions of one; with the documents it may cut by."""
    n = num_shards or draw.integer(1, 4)
    kind = draw.choice((Contiguous, HeadTail, PerDocument, BlockBalanced))
    blocks = draw.integer(1, most)
    if kind is BlockBalanced:
        block = draw.integer(1, 3)
        owners = [rank for rank in range(n) for _ in range(blocks)]
        draw.random.shuffle(owners)
        return BlockBalanced(blocks * n * block, n, block, tuple(owners))
    seq_len = blocks * kind.multiple(n)
    if kind is PerDocument:
        return PerDocument(seq_len, n, draw.lengths(seq_len))
    return kind(seq_len, n)


def head_tail_tokens(start, length, n, rank, lengths):
    ends = list(accumulate(lengths, initial=start))
    chunks = [list(range(a, b)) for a, b in pairwise(ends)]
    return chunks[rank] + chunks[2 * n - 1 - rank]


def tokens_of(layout):
    """Token indices of every rank, from the definition of each layout; of the first row's."""
    n, S = layout.num_shards, layout.seq_len
    if isinstance(layout, RowLayouts):
        return tokens_of(layout.rows[0])
    if isinstance(layout, Contiguous):
        return [list(range(r * S // n, (r + 1) * S // n)) for r in range(n)]
    if isinstance(layout, HeadTail):
        chunk = S // (2 * n)
        return [head_tail_tokens(0, S, n, r, [chunk] * 2 * n) for r in range(n)]
    if isinstance(layout, BlockBalanced):
        size = layout.block
        blocks = [list(range(i * size, (i + 1) * size)) for i in range(S // size)]
        pairs = list(zip(blocks, layout.owners, strict=True))
        return [[t for block, owner in pairs if owner == r for t in block] for r in range(n)]
    tokens, start, turn = [[] for _ in range(n)], 0, 0
    for length in (*layout.lengths, S - sum(layout.lengths)):
        sizes = [length // (2 * n)] * (2 * n)
        for extra in range(length % (2 * n)):
            rank = (turn + extra) % n
            sizes[rank if extra < n else 2 * n - 1 - rank] += 1
        for rank in range(n):
            tokens[rank] += head_tail_tokens(start, length, n, rank, sizes)
        turn, start = turn + length % (2 * n), start + length
    return tokens


def a_rank(draw, n):
    return draw.bad("rank", draw.integer(0, n - 1), n, -1, 1.0 if n > 1 else 0.0, None, "0")


def layouts_by_definition(draw):
    n = draw.integer(1, 4)
    num_shards = draw.bad("num_shards", n, 0, -1, float(n), None, "2")
    kind = draw.choice((Contiguous, HeadTail, PerDocument, BlockBalanced))
    parts = draw.integer(1, 5)
    block = draw.integer(1, 3)
    seq_len = parts * (block * n if kind is BlockBalanced else kind.multiple(n))
    wrong = [0, -kind.multiple(n), float(seq_len), None]
    wrong += [seq_len + 1] if n > 1 or kind is not Contiguous else []
    length = draw.bad("seq_len", seq_len, *wrong) if kind is not PerDocument else seq_len
    extra = ()
    if kind is PerDocument:
        lengths = draw.lengths(seq_len)
        wrong = [(*lengths, x) for x in (0, -1, seq_len + 1, 1.5, None)]
        extra = (draw.bad("lengths", lengths, *wrong, 3, None),)
    if kind is BlockBalanced:
        owners = [rank for rank in range(n) for _ in range(parts)]
        draw.random.shuffle(owners)
        wrong = [(*owners, 0), (n, *owners[1:]), (-1, *owners[1:]), (*owners[:-1], 1.5), None, 3]
        extra = (
            draw.bad("block", block, 0, -1, seq_len + 1, float(block), None),
            draw.bad("owners", tuple(owners), *wrong),
        )
    layout = kind(length, num_shards, *extra)
    hash(layout)
    expected = tokens_of(layout)
    assert layout.permutation().tolist() == [t for row in expected for t in row]
    assert sorted(layout.permutation().tolist()) == list(range(seq_len))
    assert layout.permutation()[layout.inverse()].tolist() == list(range(seq_len))
    rank = a_rank(draw, n)
    assert [t for run in layout.runs(rank) for t in range(*run)] == expected[rank]
    assert layout.token_indices(rank).tolist() == expected[rank]
    segments = layout.segments(rank)
    assert [t for run in segments for t in range(*run)] == expected[rank]
    assert {b - a for a, b in segments} == {layout.segment_len}


def shards_of_tensors(draw):
    layout = a_layout(draw)
    n, S, expected = layout.num_shards, layout.seq_len, tokens_of(layout)
    dims = draw.integer(1, 4)
    dim = draw.integer(0, dims - 1)
    x = draw.ids(*[S if d == dim else draw.integer(0, 3) for d in range(dims)])
    at = draw.choice((dim, dim - dims))
    wrong = [dims, -dims - 1, 1.0, None, "1", 7]
    at = draw.bad("dim", at, *wrong)
    wrong = [torch.cat((x, x), dim), x.narrow(dim, 0, S - 1), x.sum(), *NO_TENSORS]
    given = draw.bad("x", x, *wrong)
    rank = a_rank(draw, n)
    ours = layout.shard(given, rank, dim=at)
    assert torch.equal(ours, x.index_select(dim, torch.tensor(expected[rank])))
    shards = torch.cat([layout.shard(x, r, dim=at) for r in range(n)], dim=dim)
    shards = draw.bad("shards", shards, shards.narrow(dim, 0, S - 1), None)
    assert torch.equal(layout.restore(shards, dim=at), x)


def layouts_of_batches(draw):
    n = draw.integer(1, 4)
    kind = draw.choice((Contiguous, HeadTail, PerDocument, BlockBalanced))
    seq_len = draw.integer(1, 3) * kind.multiple(n)
    by_document = kind in (PerDocument, BlockBalanced)
    rows = draw.rows(draw.integer(1, 2), seq_len, alike=by_document)
    documents = Documents(rows, seq_len)
    others = [Documents((), seq_len), Documents(((1,), ()), seq_len)] if by_document else [None]
    given = draw.bad("documents", documents, *others, None)
    count = draw.bad("num_shards", n, 0, -1, float(n), None, seq_len + 1)
    work = None
    if kind is BlockBalanced and draw.chance():
        keys = draw.ids(seq_len)
        wrong = [keys[:-1], keys[None], None, keys.tolist()]
        keys = draw.bad("work", keys, *wrong)
        work = lambda: keys  # noqa: E731
    layout = kind.for_batch(given, count, work=work)
    assert sorted(t for row in tokens_of(layout) for t in row) == list(range(seq_len))
    assert (layout.num_shards, layout.seq_len) == (n, seq_len)
    if kind is PerDocument:
        assert layout.lengths == rows[0]


def a_mask(draw, documents, depth=2):
    """A mask, and the reference's rule of the same meaning."""
    kind = draw.integer(0, 7 if depth else 6)
    if kind == 0:
        return Causal(), reference.causal
    if kind == 1:
        return Bidirectional(), reference.bidirectional
    if kind == 2:
        size, right = draw.integer(1, 9), draw.choice((None, 0, draw.integer(0, 6)))
        mask = SlidingWindow(
            draw.bad("size", size, 0, -1, 1.5, None, "3"), draw.bad("right", right, -1, 0.5, "1")
        )
        return mask, reference.Window(size, right)
    if kind == 3:
        return PrefixLM(), "prefix"
    if kind == 4:
        return BlockBidirectional(), "block"
    if kind == 5:
        return Prefix(), "own prefix"
    if kind == 6:
        size = draw.integer(1, 5)
        return FirstTokens(draw.bad("size", size, 0, -1, 1.5)), reference.Beginning(size)
    left, right = a_mask(draw, documents, depth - 1), a_mask(draw, documents, depth - 1)
    if draw.chance():
        other = draw.odd("other", right[0], None, 3)
        return left[0] & other, ("both", left[1], right[1])
    return left[0] | right[0], ("either", left[1], right[1])


def the_rule(rule, prefix, block):
    if rule == "prefix":
        return lambda p: p.key <= p.query or p.key - p.start < int(prefix[p.row, p.key])
    if rule == "own prefix":
        return lambda p: p.key - p.start < int(prefix[p.row, p.key])
    if rule == "block":
        return lambda p: p.row >= 0 and 0 <= block[p.row, p.query] == block[p.row, p.key]
    if isinstance(rule, tuple):
        left, right = (the_rule(x, prefix, block) for x in rule[1:])
        return {"both": reference.Both, "either": reference.Either}[rule[0]](left, right)
    return rule


def prefix_of(draw, documents):
    """One number for each document, given to all of its tokens."""
    prefix = torch.zeros(documents.batch, documents.seq_len, dtype=torch.int64)
    for row, lengths in enumerate(documents.lengths):
        start = 0
        for length in lengths:
            prefix[row, start : start + length] = draw.integer(0, length + 1)
            start += length
    return prefix


def block_of(draw, documents):
    """Runs of tokens with ids of their own, text between them."""
    rows = []
    for _ in range(documents.batch):
        row, block = [], 0
        while len(row) < documents.seq_len:
            row += [draw.choice((-1, block))] * draw.integer(1, 5)
            block += 1
        rows.append(row[: documents.seq_len])
    return torch.tensor(rows)


def intervals_of_masks(draw):
    seq_len = draw.integer(1, 14)
    documents = Documents(draw.rows(draw.integer(1, 2), seq_len), seq_len)
    prefix, block = prefix_of(draw, documents), block_of(draw, documents)
    mask, rule = a_mask(draw, documents)
    random = torch.randint(0, 4, prefix.shape, generator=draw.generator)
    wrong = [random, -prefix - 1, prefix.double(), prefix.bool(), prefix[0], prefix[:, 1:]]
    prefix_given = draw.odd("prefix", prefix, *wrong, None, [1])
    block_given = draw.odd("block", block, random, block.double(), block[0], block[:, 1:], None)
    coords = Coords.of(documents, prefix=prefix_given, block=block_given)
    first, last = mask.intervals(coords)
    prefix = prefix if prefix_given is None else prefix_given
    block = block if block_given is None else block_given
    expected = reference.visible(documents.lengths, seq_len, the_rule(rule, prefix, block))
    key = torch.arange(seq_len)
    seen = (key >= first[..., None]) & (key <= last[..., None])
    seen = seen.view(-1, *expected.shape).sum(0)
    assert torch.equal(seen, expected.long()), f"{mask}"
    assert torch.equal(mask.visible(coords, coords), expected)
    assert mask.work(coords).tolist() == expected.sum((0, 2)).tolist()


def coordinates(draw):
    seq_len = draw.integer(1, 10)
    documents = Documents(draw.rows(draw.integer(1, 2), seq_len), seq_len)
    shape = (documents.batch, seq_len)
    x = draw.ids(*shape)
    wrong = [x[0], x[:, 1:], x.double(), x[None], 3, [1]]
    name = draw.choice(("prefix", "block"))
    fields = {name: draw.bad(name, x, *wrong)}
    coords = Coords.of(draw.bad("documents", documents, None, 3), **fields)
    index = torch.randint(0, seq_len, (3,), generator=draw.generator)
    wrong = [index + seq_len, index - seq_len - 5, index.double(), None]
    chosen = coords.select(draw.bad("token_index", index, *wrong))
    assert torch.equal(chosen.document, documents.document()[:, index])
    assert torch.equal(getattr(chosen, name), x[:, index])


def blocks_of_images(draw):
    rows, seq_len = draw.integer(1, 2), draw.integer(1, 12)
    kinds = torch.randint(0, 4, (rows, seq_len), generator=draw.generator)
    wrong = [kinds[0], kinds[None], *NO_TENSORS]
    blocks = vision_blocks(draw.bad("mm_token_type_ids", kinds, *wrong))
    expected = []
    for row in kinds.tolist():
        number, out, before = -1, [], False
        for kind in row:
            image = kind in (1, 2)
            number += image and not before
            out.append(number if image else -1)
            before = image
        expected.append(out)
    assert blocks.tolist() == expected


def random_intervals(draw, rows, seq_len):
    """The first and last key of each query, some of them none."""
    low = torch.randint(0, seq_len, (rows, seq_len), generator=draw.generator)
    high = torch.randint(-1, seq_len, (rows, seq_len), generator=draw.generator)
    none = high < low
    return low.masked_fill(none, 0).int(), high.masked_fill(none, -1).int()


def ranges_of_blocks(draw):
    rows, length, keys = draw.integer(1, 2), draw.integer(1, 12), draw.integer(0, 12)
    first, last = random_intervals(draw, rows, length)
    index = torch.randperm(length, generator=draw.generator)[:keys].sort().values
    unused = torch.full((draw.integer(0, 3),), -1)
    index = torch.cat((index, unused))
    tile = draw.integer(1, 5)
    wrong = [index.flip(0) - 0, index[None], index.double(), None]
    wrong = wrong if index.numel() > 1 and keys > 1 else wrong[1:]
    given = draw.bad("key_token_index", index, *wrong)
    size = draw.bad("tile", tile, 0, -1, 1.5, None)
    shapes = [torch.cat((first, first), 1), first[0], first.double(), None]
    low = draw.bad("first_key", first, *shapes)
    high = draw.bad("last_key", last, last[:, 1:], last[0], None)
    ranges = block_ranges(low, high, given, tile=size)
    held = [x for x in index.tolist() if x >= 0]
    assert len(ranges) == rows
    for row in range(rows):
        done = 0
        for q0, q1, k0, f0, f1, k1 in ranges[row].tolist():
            assert q0 == done <= q1 <= q0 + tile
            done = q1
            for query in range(q0, q1):
                a, b = int(first[row, query]), int(last[row, query])
                seen = {i for i, x in enumerate(held) if a <= x <= b}
                assert seen <= set(range(k0, k1)) and set(range(f0, f1)) <= seen
        assert done == length


def keys_that_are_required(draw):
    layout = a_layout(draw, most=3)
    n, S, tokens = layout.num_shards, layout.seq_len, tokens_of(layout)
    rows = draw.integer(1, 2)
    first, last = random_intervals(draw, rows, S)
    rank = draw.integer(0, n - 1)
    wrong = [first[:, 1:], first[0], torch.cat((first, first), 1), first.double(), None]
    low = draw.bad("first_key", first, *wrong)
    high = draw.bad("last_key", last, last[:, 1:], last[0], last.clamp(min=0) + S, None)
    mine = draw.bad("rank", rank, n, -1, 0.5, None)
    required = required_keys(layout, mine, KeyIntervals.read_off(low, high))

    def needs(reader):
        return {
            key
            for row in range(rows)
            for query in tokens[reader]
            for key in range(int(first[row, query]), int(last[row, query]) + 1)
        }

    def of_peer(runs, peer):
        of = zip(runs.peer.tolist(), runs.start.tolist(), runs.stop.tolist(), strict=True)
        return sorted(t for other, a, b in of if other == peer for t in range(a, b))

    for peer in {*range(n)} - {rank}:
        received = sorted(t for t in tokens[peer] if t in needs(rank))
        assert of_peer(required.receive_tokens, peer) == received
        slots = [slot for slot, t in enumerate(tokens[rank]) if t in needs(peer)]
        assert of_peer(required.send_slots, peer) == slots
    assert of_peer(required.own_tokens, rank) == sorted(tokens[rank])


def routes_between_ranks(draw):
    layout = a_layout(draw, most=3)
    n, held = layout.num_shards, [layout.runs(r) for r in range(layout.num_shards)]
    tokens = tokens_of(layout)
    rank = draw.integer(0, n - 1)
    mine = draw.bad("rank", rank, n, -1, 0.5, None)
    if draw.chance():
        shift = draw.integer(-layout.seq_len - 2, layout.seq_len + 2)
        length = draw.bad("seq_len", layout.seq_len, 0, -1, 2.5, None)
        by = draw.bad("shift", shift, 1.5, None)
        wanted = [rolled(runs, by, length) for runs in held]
        expected = [(t - shift) % layout.seq_len for t in tokens[rank]]
    else:
        left, right = draw.integer(0, 5), draw.integer(0, 3)
        sides = {
            "left": draw.bad("left", left, -1, 0.5, None),
            "right": draw.bad("right", right, -2, 0.5, None),
        }
        wanted = [halo_runs(layout, r, **sides) for r in range(n)]
        expected = []
        for start, stop in layout.segments(rank):
            expected += [*range(start - left, start), *range(stop, stop + right)]
        inside = [t if 0 <= t < layout.seq_len else -1 for t in expected]
        assert halo_token_indices(layout, mine, **sides).tolist() == inside
    fewer = draw.bad("wanted", wanted, wanted[:-1], None)
    routes = [Route.between(held, fewer, r) for r in range(n)]
    Route.between(held, wanted, mine)
    arrived = [None] * routes[rank].wanted_len
    for peer in range(n):
        sent = [
            tokens[peer][i] for to, a, b in routes[peer].send if to == rank for i in range(a, b)
        ]
        slots = [i for who, a, b in routes[rank].receive if who == peer for i in range(a, b)]
        for slot, token in zip(slots, sent, strict=True):
            arrived[slot] = token
    assert arrived == [t if 0 <= t < layout.seq_len else None for t in expected]


def metadata_of_segments(draw):
    n = draw.integer(1, 4)
    kind = draw.choice((Contiguous, HeadTail))
    layout = kind(draw.integer(1, 4) * kind.multiple(n), n)
    firsts = [[a for a, _ in layout.segments(r)] for r in range(n)]
    order = sorted(x for row in firsts for x in row)
    assert chain_of(layout).tolist() == [[order.index(x) for x in row] for row in firsts]
    width = draw.integer(1, layout.segment_len + 1)
    wide = draw.bad("width", width, layout.segment_len + 2, 0, -1, 1.5, None)
    rank = a_rank(draw, n)
    send, receive = halo_route(layout, wide, rank).tolist()
    tokens = tokens_of(layout)
    count = sum(b - a for _, a, b in receive)
    assert count == sum(min(width - 1, start) for start in firsts[rank])
    assert all(0 <= a <= b <= len(tokens[rank]) for _, a, b in send)


def balance_of_blocks(draw):
    n, per_rank, block = draw.integer(1, 4), draw.integer(0, 4), draw.integer(1, 4)
    tokens = draw.ids(n * per_rank * block)
    wrong = [tokens[None], torch.cat((tokens, tokens[:1])), None, tokens.tolist()]
    wrong = [x for x in wrong if block > 1 or not isinstance(x, torch.Tensor) or x.ndim > 1]
    if not per_rank:
        wrong = [None]
    size = draw.bad("block", block, 0, -1, 0.5, None)
    sums = block_work(draw.bad("work", tokens, *wrong), size)
    values = tokens.tolist()
    assert sums == [sum(values[i : i + block]) for i in range(0, len(values), block)]
    shards = draw.bad("num_shards", n, 0, -1, 1.5, None)
    wrong = [[*sums, "x"], None, 3]
    owners = assign_blocks(draw.bad("work", sums, *wrong), shards)
    loads = [[w for w, owner in zip(sums, owners, strict=True) if owner == r] for r in range(n)]
    assert {len(load) for load in loads} == {per_rank}
    if sums:
        # The bound of the rule: no rank has more than the fair share and one block.
        assert max(map(sum, loads)) <= sum(sums) / n + max(sums)


def labels_of_next_tokens(draw):
    rows, seq_len = draw.integer(1, 2), draw.integer(1, 10)
    documents = Documents(draw.rows(rows, seq_len), seq_len)
    ids = draw.ids(rows, seq_len)
    wrong = [ids[:, 1:], ids[0], ids.to(torch.uint8), ids.double(), ids.bool(), *NO_TENSORS]
    given = draw.bad("input_ids", ids, *wrong)
    known = draw.bad("documents", documents, None, documents.padded(seq_len + 1))
    depth = draw.integer(1, seq_len + 2)
    by = draw.bad("by", depth, 0, -1, 1.5, None)
    document = documents.document().tolist()

    def shifted(x, step):
        return [
            [
                x[r][t + step]
                if t + step < seq_len and document[r][t + step] == document[r][t] >= 0
                else IGNORED
                for t in range(seq_len)
            ]
            for r in range(rows)
        ]

    assert shift_labels(given, known, by=by).tolist() == shifted(ids.tolist(), depth)
    labels = shift_labels(ids, documents)
    depths = draw.integer(1, 3)
    wrong = [labels[:, 1:], labels[0], labels.double(), None]
    named = draw.bad("labels", labels, *wrong)
    ahead = look_ahead(given, named, known, depths=draw.bad("depths", depths, 0, -1, 1.5, None))
    for k in range(depths):
        expected = torch.tensor(shifted(ids.tolist(), k + 1))
        assert torch.equal(ahead["mtp_input_ids"][:, k], expected.masked_fill(expected < 0, 0))
        assert ahead["mtp_labels"][:, k].tolist() == shifted(labels.tolist(), k + 1)


SUBJECTS = (
    documents_of_lengths,
    documents_that_fill_rows,
    documents_of_position_ids,
    documents_of_padded_rows,
    documents_of_boundaries,
    documents_of_batches,
    layouts_by_definition,
    shards_of_tensors,
    layouts_of_batches,
    intervals_of_masks,
    coordinates,
    blocks_of_images,
    ranges_of_blocks,
    keys_that_are_required,
    routes_between_ranks,
    metadata_of_segments,
    balance_of_blocks,
    labels_of_next_tokens,
)


@pytest.mark.parametrize(
    "cases", [range(CASES), pytest.param(range(CASES, MANY), marks=pytest.mark.slow)], ids=len
)
def test_fuzzed_plans_are_exact_or_refused(cases, capsys):
    tally = run_cases(SUBJECTS, cases)
    with capsys.disabled():
        tally.check()

"""A mask's two forms, the predicate and the intervals, mean what the reference's rule means."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch.testing import assert_close

from dtcp.mixer_metadata import batch_metadata
from dtcp.sequence.coords import documents_of
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import (
    AttentionChunks,
    Bidirectional,
    BlockBidirectional,
    Causal,
    Coords,
    Mask,
    SlidingWindow,
)
from dtcp.sequence.prefix_masks import FirstTokens, Prefix, PrefixLM
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness import packings
from tests.harness.attention_parity import CHUNKS, MASK_CASES

SEQ_LEN = 24
CASES = (*MASK_CASES, CHUNKS)


def coords_of(documents: Documents) -> Coords:
    return Coords.of(
        documents,
        prefix=packings.prefix_of_tokens(documents),
        block=packings.blocks_of_tokens(documents),
    )


def keys_of(first, last, seq_len):
    """Intervals as a table of who sees whom: [B, S, S]; of several no key may be in two."""
    key = torch.arange(seq_len)
    seen = (key >= first[..., None]) & (key <= last[..., None])
    if seen.ndim == 3:
        return seen
    assert (seen.sum(0) < 2).all()
    return seen.any(0)


@pytest.mark.parametrize("packing", packings.PACKINGS)
@pytest.mark.parametrize("mask_case", CASES, ids=lambda mask_case: f"{mask_case.mask}")
def test_predicate_and_intervals_mean_the_rule(mask_case, packing):
    documents = packing(SEQ_LEN, 4)
    coords, expected = coords_of(documents), mask_case.visible(documents)
    first, last = mask_case.mask.intervals(coords)
    assert_close(mask_case.mask.visible(coords, coords), expected)
    assert_close(keys_of(first, last, SEQ_LEN), expected)
    assert first.dtype == last.dtype == torch.int32


@pytest.mark.parametrize("mask_case", CASES, ids=lambda mask_case: f"{mask_case.mask}")
def test_predicate_of_some_tokens_is_a_part_of_the_whole(mask_case):
    coords = coords_of(packings.two_rows(SEQ_LEN, 4))
    queries, keys = torch.tensor([3, 17, 4]), torch.tensor([23, 0, 5, 16])
    whole = mask_case.mask.visible(coords, coords)
    part = mask_case.mask.visible(coords.select(queries), coords.select(keys))
    assert_close(part, whole[:, queries][:, :, keys])


@pytest.mark.parametrize("mask_case", CASES, ids=lambda mask_case: f"{mask_case.mask}")
def test_padding_sees_nothing_and_is_not_seen(mask_case):
    documents = packings.last_shard_padding(SEQ_LEN, 4)
    coords, padding = coords_of(documents), documents.document() < 0
    first, last = mask_case.mask.intervals(coords)
    assert padding.any() and (last[..., padding] < first[..., padding]).all()
    assert not mask_case.mask.visible(coords, coords)[:, :, padding[0]].any()


def test_masks_are_values():
    assert Causal() & SlidingWindow(4) == Causal() & SlidingWindow(4)
    assert Causal() & SlidingWindow(4) != Causal() & SlidingWindow(5)
    assert hash(Causal() | PrefixLM()) == hash(Causal() | PrefixLM())
    assert Causal() != Bidirectional()


def test_block_cut_by_a_document_border_is_two_blocks():
    block = torch.tensor([[0, 0, 0, 0, -1, -1]])
    coords = Coords.of(Documents(((2, 4),), 6), block=block)
    first, last = BlockBidirectional().intervals(coords)
    assert list(zip(first[0].tolist(), last[0].tolist(), strict=True)) == [
        (0, 1),
        (0, 1),
        (2, 3),
        (2, 3),
        (0, -1),
        (0, -1),
    ]


def test_block_id_in_two_runs_of_a_document_is_refused():
    block = torch.tensor([[0, 0, -1, 0, 0, -1]])
    with pytest.raises(ValueError, match=r"blocks of consecutive tokens.*runs of row 0"):
        BlockBidirectional().intervals(Coords.of(Documents.single(1, 6), block=block))
    # In two documents the same id is two blocks, which never see each other anyway.
    BlockBidirectional().intervals(Coords.of(Documents(((3, 3),), 6), block=block))


class FirstToken(Causal):
    """Sees the first token of its document alone."""

    def _interval(self, coords):
        return coords.start, coords.start


def test_union_that_leaves_a_gap_is_refused():
    coords = Coords.of(Documents.single(1, 8))
    with pytest.raises(ValueError, match=r"one interval of the row.*leave a gap"):
        (FirstToken() | SlidingWindow(2)).intervals(coords)
    # Two tokens from the start, or within documents of two, there is none.
    (FirstToken() | SlidingWindow(7)).intervals(coords)
    (FirstToken() | SlidingWindow(2)).intervals(Coords.of(Documents(((2, 2, 3, 1),), 8)))


@dataclass(frozen=True)
class Given(Mask):
    """A mask of a user's."""

    interval: Callable[[Coords], object]

    def _interval(self, coords):
        return self.interval(coords)


class Unclipped(Given):
    """One that answers in the place of `Mask.intervals`."""

    def intervals(self, coords):
        return self.interval(coords)


@pytest.mark.parametrize(
    ("interval", "match"),
    [
        (lambda x: (x.start, x.token_index + 0.5), "last.dtype=torch.float32"),
        (lambda x: (x.start * torch.nan, x.token_index), "first.dtype=torch.float32"),
        (lambda x: (x.start > 0, x.token_index), "first.dtype=torch.bool"),
        (lambda x: (0, x.token_index), "first of type int"),
        (lambda x: (x.start[:, :1], x.token_index), r"first.shape=\(2, 1\), last.shape=\(2, 4\)"),
        (lambda x: (x.start, x.token_index[0]), r"last.shape=\(4,\).*return two of \(2, 4\)"),
        # Of two rows it would be unpacked into them.
        (lambda x: x.token_index, "got Tensor: return two tensors"),
        (lambda x: (x.start, x.token_index, x.end), "got tuple: return two tensors"),
    ],
)
def test_what_is_no_interval_for_every_token_is_refused(interval, match):
    """torch broadcast it, cut it to whole numbers, or took NaN for one."""
    given, documents = Given(interval), Documents(((3, 1), (4,)), 4)
    for mask in (given, Unclipped(interval), given & SlidingWindow(3), Causal() | given):
        with pytest.raises((TypeError, ValueError), match=match):
            batch_metadata(SoftmaxAttention(mask), documents)


@dataclass(frozen=True)
class Twice(Given):
    """A mask of a user's, of two intervals."""

    num_intervals = 2


@pytest.mark.parametrize(
    ("interval", "match"),
    [
        (lambda x: (x.start, x.token_index), r"return two of \(2, 2, 4\)"),
        (lambda x: torch.stack((x.start, x.end))[None], "return two tensors"),
        (
            lambda x: (torch.stack((x.start, x.token_index)), x.token_index.expand(2, 2, 4)),
            r"gives token 0 of row 0 the keys \[\(0, 0\), \(0, 0\)\]: count each key once",
        ),
    ],
)
def test_what_is_not_two_intervals_for_every_token_is_refused(interval, match):
    given, documents = Twice(interval), Documents(((3, 1), (4,)), 4)
    for mask in (given, given & SlidingWindow(3), Causal() | given):
        with pytest.raises((TypeError, ValueError), match=match):
            batch_metadata(SoftmaxAttention(mask), documents)


def test_two_intervals_of_a_users_mask_are_those_of_its_rule():
    """The first token of a document and the token itself, which for the first is the same one."""
    own = Twice(
        lambda x: (
            torch.stack((x.start, torch.maximum(x.token_index, x.start + 1))),
            torch.stack((x.start, x.token_index)),
        )
    )
    documents = Documents(((5, 2),), 8)
    q, k, v = torch.randn(3, 1, 8, 1, 4, dtype=torch.float64, requires_grad=True).unbind(0)
    mixer = SoftmaxAttention(own)
    out = mixer(q, k, v, batch_metadata(mixer, documents))[0, :, 0]
    for token, keys in enumerate([[0], [0, 1], [0, 2], [0, 3], [0, 4], [5], [5, 6]]):
        weight = (k[0, keys, 0] @ q[0, token, 0] / 2).softmax(0)
        assert_close(out[token], weight @ v[0, keys, 0])
    assert not out[7].any()


@pytest.mark.parametrize("count", [0, 2.0, True, None])
def test_a_mask_of_no_number_of_intervals_is_refused(count):
    class Miscounted(Causal):
        num_intervals = count

    given, documents = Miscounted(), Documents(((3, 1),), 4)
    for mask in (given, given & SlidingWindow(3)):
        with pytest.raises((TypeError, ValueError), match=f"got num_intervals={count}"):
            batch_metadata(SoftmaxAttention(mask), documents)


def test_how_many_intervals_a_mask_has_depends_on_no_batch():
    window, sinks = Causal() & SlidingWindow(4), FirstTokens(2)
    assert (window | PrefixLM()).num_intervals == 1
    assert (Causal() | BlockBidirectional()).num_intervals == 1
    assert (window | sinks).num_intervals == (sinks | window).num_intervals == 2
    assert ((window | sinks) & (Prefix() | BlockBidirectional())).num_intervals == 4
    assert (sinks | Prefix() | window).num_intervals == 3
    for lengths in ((8,), (1, 1, 6)):  # of the first tokens a window sees all, or not
        first, last = (window | sinks).intervals(Coords.of(Documents((lengths,), 8)))
        assert first.shape == last.shape == (2, 1, 8)


def test_keys_of_other_documents_are_refused_of_a_mask_with_intervals_of_its_own():
    mask = Unclipped(lambda x: (x.token_index - 1, x.token_index))
    with pytest.raises(ValueError, match=r"token 0 of row 0 the keys -1 to 0 in one from 0 to 2"):
        batch_metadata(SoftmaxAttention(mask), Documents(((3, 1), (4,)), 4))


def test_mask_with_intervals_of_its_own_is_not_combined():
    """What it was combined to read `_interval`, and so it saw something else."""
    mask = Unclipped(lambda x: (x.token_index, x.token_index))
    for combine in (lambda: mask & SlidingWindow(3), lambda: Causal() | mask):
        with pytest.raises(TypeError, match=r"got Unclipped\(.*define `_interval`"):
            combine()


@pytest.mark.parametrize(
    ("mask", "field"),
    [
        (PrefixLM(), "prefix"),
        (Causal() & (Prefix() | SlidingWindow(2)), "prefix"),
        (Causal() | BlockBidirectional(), "block"),
    ],
)
def test_mask_without_the_coordinate_it_reads_is_refused(mask, field):
    coords = Coords.of(Documents.single(1, 8))
    for read in (lambda: mask.intervals(coords), lambda: mask.visible(coords, coords)):
        with pytest.raises(ValueError, match=rf"coords.{field}=None: pass {field}=\[B, S\]"):
            read()


@pytest.mark.parametrize("sides", [{"size": 0}, {"size": -3}, {"size": 2, "right": -1}])
def test_window_without_the_token_itself_is_refused(sides):
    with pytest.raises(ValueError, match="size >= 1 and right >= 0"):
        SlidingWindow(**sides)


def test_chunk_without_a_token_is_refused():
    with pytest.raises(ValueError, match=r"AttentionChunks.*size=0"):
        AttentionChunks(0)


@pytest.mark.parametrize("name", ["prefix", "block"])
def test_coordinate_of_another_shape_is_refused(name):
    extra = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"one {name} per token.*\(1, 4\).*\(1, 8\)"):
        Coords.of(Documents.single(1, 8), **{name: extra})


def test_coordinates_are_of_a_row_at_least_and_documents_of_whole_rows():
    with pytest.raises(ValueError, match=r"at least one row, got Documents\(lengths=\(\)"):
        Coords.of(Documents((), 8))
    some = Coords.of(Documents(((3, 5),), 8)).select(torch.arange(4))
    with pytest.raises(ValueError, match="got coords without documents: take"):
        documents_of(some)


def test_coords_at_slots_take_every_field():
    coords = coords_of(packings.two_rows(SEQ_LEN, 4))
    ends = torch.stack((coords.token_index, coords.start))
    coords = replace(coords, position_ids=ends, block_ends=ends.flip(0))
    slots = torch.tensor([7, 0, 20])
    of_rows = ("documents", "memory")
    for field in (each for each in fields(Coords) if each.name not in of_rows):
        taken = getattr(coords.select(slots), field.name)
        assert_close(taken, getattr(coords, field.name)[..., slots])


@pytest.mark.parametrize("name", ["token_index", "document", "start", "end"])
def test_coords_that_contradict_their_documents_are_refused(name):
    """Masks are worked out from the documents alone, and would not see the change."""
    coords = Coords.of(Documents(((3, 5),), 8))
    with pytest.raises(ValueError, match=f"got another {name} beside"):
        replace(coords, **{name: getattr(coords, name) + 1})
    assert replace(coords, **{name: getattr(coords, name).clone()}).documents == coords.documents

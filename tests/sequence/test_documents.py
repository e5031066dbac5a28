"""Documents are lengths; all that tokens know of their document follows."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from dtcp.sequence.documents import PADDING, Documents
from tests.harness import packings


def spelt_out(documents):
    """(document, position id, start, end) of every token, by counting: [B, S, 4]."""
    rows = []
    for lengths in documents.lengths:
        row, start = [], 0
        for index, length in enumerate(lengths):
            row += [(index, i, start, start + length - 1) for i in range(length)]
            start += length
        row += [(PADDING, 0, i, i) for i in range(start, documents.seq_len)]
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("packing", packings.PACKINGS)
def test_tokens_know_their_document(packing):
    documents = packing(24, 4)
    expected = spelt_out(documents).unbind(-1)
    assert_close(documents.document(), expected[0])
    assert_close(documents.position_ids(), expected[1])
    assert_close(documents.starts(), expected[2])
    assert_close(documents.ends(), expected[3])


@pytest.mark.parametrize(
    "packing", [packings.one_document, packings.across_borders, packings.on_borders]
)
def test_documents_are_read_off_position_ids(packing):
    documents = packing(24, 4)
    assert Documents.from_position_ids(documents.position_ids()) == documents


@pytest.mark.parametrize("packing", packings.PACKINGS)
def test_batch_says_its_documents_in_one_of_three_ways(packing):
    """Explicitly, by position ids that restart beside a padding mask, or by neither: whole rows."""
    documents = packing(24, 4)
    position_ids, padding = documents.position_ids(), documents.document() < 0
    rows = documents.batch
    assert Documents.of_batch(rows, 24, documents=documents) == documents
    assert (
        Documents.of_batch(rows, 24, position_ids=position_ids, padding_mask=padding) == documents
    )
    assert Documents.of_batch(rows, 24) == Documents.single(rows, 24)
    counted = torch.arange(24)[None]
    ends = Documents(tuple((int(n),) if n else () for n in (~padding).sum(1)), 24)
    assert Documents.of_batch(rows, 24, position_ids=counted, padding_mask=padding) == ends


def test_position_ids_of_one_row_are_those_of_all():
    """[1, S], as transformers makes them, with and without padding."""
    position_ids, padding = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])
    assert Documents.of_batch(2, 4, position_ids=position_ids).lengths == ((2, 2),) * 2
    both = {"position_ids": position_ids, "padding_mask": padding}
    assert Documents.of_batch(2, 4, **both).lengths == ((2, 2), (2, 1))
    assert Documents.from_padded(position_ids, padding.bool()).lengths == ((2, 2), (2, 1))


def test_padding_read_off_position_ids_is_documents_of_one_token():
    """Position ids do not show what is padding: each such token sees itself alone."""
    read = Documents.from_position_ids(Documents(((3, 2),), 7).position_ids())
    assert read.lengths == ((3, 2, 1, 1),)


def test_documents_are_read_off_their_boundaries():
    documents = Documents.from_cu_seqlens([0, 3, 4, 9], 12)
    assert documents == Documents(((3, 1, 5),), 12)


def test_single_fills_every_row():
    assert Documents.single(3, 5) == Documents(((5,), (5,), (5,)), 5)
    assert Documents.single(3, 5).batch == 3


def test_padding_a_row_adds_tokens_of_no_document():
    documents = packings.two_rows(24, 4)
    longer = documents.padded(30)
    assert_close(longer.document()[:, :24], documents.document())
    assert (longer.document()[:, 24:] == PADDING).all()


def test_position_ids_count_up_inside_documents_of_any_length():
    position_ids = Documents(((7, 1, 6),), 14).position_ids()[0].tolist()
    assert position_ids == [*range(7), 0, *range(6)]
    assert all(b in (a + 1, 0) for a, b in pairwise(position_ids))


@pytest.mark.parametrize("length", [0, -2])
def test_empty_document_is_refused(length):
    with pytest.raises(ValueError, match=f"got length={length} for document 1 of row 1"):
        Documents(((4,), (4, length)), 8)


def test_documents_longer_than_their_row_are_refused():
    with pytest.raises(ValueError, match="got 9 tokens in row 1 with seq_len=8: cut"):
        Documents(((8,), (4, 5)), 8)
    with pytest.raises(ValueError, match="got 8 tokens in row 0 with seq_len=7"):
        Documents.single(1, 8).padded(7)


@pytest.mark.parametrize(
    "position_ids",
    [
        [1, 2, 3, 4],
        [0, 1, 3, 4],
        [0, 0, 2, 3],
        [0, 1, 1, 2],
        [-1, -1, 0, 1],
        [1, 1, 0, 1],
        [3, 2, 1, 0],
        [-1, 1, 2, 3],
    ],
    ids=[
        "late start",
        "gap",
        "jump",
        "repeat",
        "left padding",
        "left padding by ones",
        "down",
        "early start",
    ],
)
def test_position_ids_that_are_no_documents_are_refused(position_ids):
    with pytest.raises(ValueError, match=r"restart at 0 with each document.*left padding"):
        Documents.from_position_ids(torch.tensor([[0, 1, 2, 3], position_ids]))


def test_position_ids_on_a_device_are_refused():
    with pytest.raises(ValueError, match=r"read on the host, got position_ids\.device=meta"):
        Documents.from_position_ids(torch.empty(1, 4, dtype=torch.int64, device="meta"))

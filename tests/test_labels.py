"""Labels are the tokens further on in the same document, shifted in whole rows."""

import pytest
import torch

from dtcp.labels import IGNORED, look_ahead, shift_labels
from dtcp.sequence.documents import Documents
from tests.harness import packings


def test_labels_are_the_next_token_of_the_same_document():
    """None at the end of a document, and none in padding."""
    documents = Documents(((3, 1, 4), (8,)), 10)
    token = torch.arange(20).view(2, 10)
    labels = shift_labels(token, documents)
    assert labels.tolist() == [
        [1, 2, IGNORED, IGNORED, 5, 6, 7, IGNORED, IGNORED, IGNORED],
        [11, 12, 13, 14, 15, 16, 17, IGNORED, IGNORED, IGNORED],
    ]


@pytest.mark.parametrize("by", [1, 2, 3])
@pytest.mark.parametrize("packing", packings.PACKINGS)
def test_labels_some_tokens_on_stay_in_their_document(packing, by):
    documents = packing(24, 4)
    token = torch.arange(documents.batch * 24).view(documents.batch, 24)
    labels, document = shift_labels(token, documents, by=by), documents.document()
    for row in range(documents.batch):
        for i in range(24):
            inside = i + by < 24 and document[row, i] == document[row, i + by] >= 0
            assert labels[row, i] == (token[row, i + by] if inside else IGNORED)


def test_labels_need_a_place_to_look_at_and_a_sign():
    ids, one = torch.zeros(1, 4, dtype=torch.int64), Documents.single(1, 4)
    for by, tokens in ((0, ids), (-1, ids), (1, ids.to(torch.uint8))):
        with pytest.raises(ValueError, match=f"got by={by}, ids of {tokens.dtype}"):
            shift_labels(tokens, one, by=by)
    with pytest.raises(ValueError, match="got depths=0"):
        look_ahead(ids, ids, one, depths=0)


def test_labels_of_a_shard_are_refused():
    """A shard does not hold its neighbour's next token."""
    with pytest.raises(ValueError, match=r"shifted in whole rows, got ids or labels of \(1, 4\)"):
        shift_labels(torch.zeros(1, 4, dtype=torch.int64), Documents.single(1, 8))

"""Position ids held against documents, and what ranks compare of them."""

import random

import pytest
import torch

from dtcp.distributed.same_rows import RowHashes
from dtcp.rows import DEFAULT_FIELDS, Rows
from dtcp.sequence.documents import Documents, restarts
from dtcp.sequence.restarts import check_restarts
from tests.sequence.test_document_balanced import a_row


def test_position_ids_are_known_to_count_documents_if_and_only_if_they_do():
    """By brute force, of ids that are right, shifted, stretched, or wrong in one place."""
    draw, counts = random.Random(0), {True: 0, False: 0}
    for _ in range(400):
        seq_len, rows = draw.randint(1, 12), draw.randint(1, 3)
        shared = draw.random() < 0.3
        lengths = (
            [a_row(draw, seq_len)] * rows if shared else [a_row(draw, seq_len) for _ in range(rows)]
        )
        documents = Documents(tuple(lengths), seq_len)
        ids = documents.position_ids()
        for row, used in enumerate(map(sum, lengths)):
            ids[row, used:] = torch.randint(9, (seq_len - used,))
        if draw.random() < 0.6:
            row, token = draw.randrange(rows), draw.randrange(seq_len)
            ids[row, token:] += draw.choice([-1, 1, 2])
            ids[row, : draw.choice([0, token])] += draw.choice([1, 2])
        given = ids[:1] if shared else ids
        inside = documents.document() >= 0
        counted = tuple((~inside | (given == documents.position_ids())).all(1).tolist())
        try:
            found = check_restarts(documents, given, None)
        except ValueError as error:
            refused = str(error)
            assert not all(counted)
            continue
        assert found == counted
        counts[all(counted)] += 1
    assert "Position ids restart where documents start" in refused
    assert min(counts.values()) > 40
    documents = Documents(((3,),), 3)
    for other in (torch.tensor([[0.0, 1.0, 2.0]]), torch.arange(3).expand(3, 1, 3)):
        assert check_restarts(documents, other, None) == (False,)


def test_position_ids_may_go_back_where_blocks_share_a_start():
    """Of answers that share a prompt; inside of one, and without blocks, they may not."""
    documents = Documents(((9, 3),), 12)
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 5, 0, 1, 2]])
    block = torch.tensor([[-1, -1, -1, 0, 0, 0, 1, 1, 1, -1, -1, -1]])
    assert check_restarts(documents, ids, None, block=block) == (False,)
    assert check_restarts(documents, ids.expand(2, 1, -1), None, block=block) == (False,)
    for other in (None, block.clamp(max=0)):
        with pytest.raises(ValueError, match="got position_ids 5 and then 3 at token 6 of row 0"):
            check_restarts(documents, ids, None, block=other)


@pytest.mark.parametrize(
    ("ids", "block"),
    [
        ([0, 1, 2, 3, 0, 1, 2, 3], [-1, -1, -1, -1, 0, 0, -1, -1]),  # starts with an image
        ([0, 1, 2, 3, 0, 1, 2, 3], [-1, -1, 0, 0, -1, -1, -1, -1]),  # ends with one
        ([0, 1, 2, 3, 0, 1, 2, 3], [-1, -1, 0, 0, 1, 1, -1, -1]),  # both
        ([0, 1, 2, 3, 1, 2, 3, 4], [-1, -1, 0, 0, 1, 1, 1, 1]),  # an answer too far back
    ],
)
def test_documents_that_nobody_named_are_refused_where_blocks_lie(ids, block):
    """Of images the one, and of a batch whose documents are others than it says."""
    ids, block = torch.tensor([ids]), torch.tensor([block])
    match = r"and then \d at token 4 of row 0, inside a document"
    with pytest.raises(ValueError, match=match):
        check_restarts(Documents.single(1, 8), ids, None, block=block)


def test_a_block_is_another_one_in_another_document():
    documents = Documents(((4, 4),), 8)
    ids = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1]])
    block = torch.tensor([[-1, -1, 0, 0, 0, 0, 1, 1]])
    assert check_restarts(documents, ids, None, block=block) == (False,)


def a_batch():
    """Documents that leave padding, an image, and all that follows from neither."""
    documents = Documents(((3, 4), (6,)), 8)
    types = torch.tensor([[0, 1, 1, 0, 0, 2, 2, 0], [0] * 8])
    ids = torch.arange(16).view(2, 8)
    batch = {"input_ids": ids, "position_ids": documents.position_ids(), "mm_token_type_ids": types}
    return batch, documents


def hashes(batch, documents, given):
    rows = Rows.of(batch, DEFAULT_FIELDS, documents if given else None)
    return RowHashes.of(*rows.contents())


@pytest.mark.parametrize("given", [True, False])
def test_ranks_hear_of_any_place_where_position_ids_or_token_types_differ(given):
    """In its row, though of position ids in documents they compare these, and of types the runs."""
    batch, documents = a_batch()
    if not given:
        batch["padding_mask"] = documents.document() < 0
    own = hashes(batch, documents, given)
    assert torch.equal(own.of_rows, hashes(batch, documents, given).of_rows)
    for row in range(2):
        for token in range(8):
            for key in ("position_ids", "mm_token_type_ids"):
                other = {**batch, key: batch[key].clone()}
                other[key][row, token] += 1
                try:
                    differs = hashes(other, documents, given).of_rows != own.of_rows
                except ValueError:
                    assert key == "position_ids" and documents.document()[row, token] >= 0
                    continue
                assert differs[row].any() and not differs[1 - row].any()
    without = {key: x for key, x in batch.items() if key != "position_ids"}
    if given:
        assert hashes(without, documents, given).keys != own.keys


def test_position_ids_that_follow_from_documents_are_not_compared_again():
    batch, documents = a_batch()
    rows = Rows.of(batch, DEFAULT_FIELDS, documents)
    assert rows.counted == (True, True) and rows.contents()[0]["position_ids"].shape == (2, 1)
    through = {**batch, "position_ids": torch.arange(8)[None]}
    rows = Rows.of(through, DEFAULT_FIELDS, documents)
    assert rows.counted == (False, True)


def test_a_restart_counts_unless_it_or_the_token_before_it_is_padding_in_every_row():
    """Of one row of position ids, which stands for all."""
    ids, none, before = torch.tensor([[0, 1, 2, 0, 1]]), [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]
    for padding, expected in (
        ([before, before], False),
        ([before, [0, 0, 0, 1, 0]], False),
        ([before, [0, 0, 0, 0, 1]], True),
        ([before, none], True),
    ):
        assert restarts(ids, torch.tensor(padding)) is expected
        assert restarts(ids.expand(2, -1), torch.tensor(padding)) is expected

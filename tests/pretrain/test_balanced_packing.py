"""Rows of equal work: the same documents, dealt out; the same rows on every mesh."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from dtcp.pretrain.balanced_packing import balanced_in_windows, balanced_rows, share, work_of
from dtcp.pretrain.packing import Cursor, pack
from dtcp.pretrain.progress import largest_work
from tests.pretrain.test_data import TOKENIZER, Texts, batches, loader

SEQ_LEN = 256


def texts(seed: int = 0, count: int = 300) -> Texts:
    """Documents of log-normal lengths, each of letters of its own."""
    draw = np.random.default_rng(seed)
    lengths = np.clip(draw.lognormal(2.2, 1.0, count), 1, 40).astype(int)
    return Texts(tuple("".join(map(chr, draw.integers(97, 123, n))) for n in lengths))


def dealt_loader(window, *, ranks=4, rank=0, rows=1, seq_len=SEQ_LEN):
    data = loader(ranks=ranks, rank=rank, rows=rows, balance_rows=window)
    data.source, data.seq_len = texts(), seq_len
    return data


def stream(count, **options):
    rows = pack(texts(), TOKENIZER, SEQ_LEN, Cursor(), infinite=True, name="texts", **options)
    return list(islice(rows, count))


def imbalance(rows):
    work = [work_of(row.lengths) for row in rows]
    return max(work) * len(work) / sum(work)


def test_dealt_rows_hold_the_same_tokens_with_the_same_labels():
    before = stream(16)
    after = balanced_rows(before)
    assert len(after) == 16

    def pairs(rows):
        both = (np.stack((row.tokens, row.labels), 1) for row in rows)
        return sorted(map(tuple, np.concatenate(list(both)).tolist()))

    assert pairs(after) == pairs(before)
    for row in after:
        assert sum(row.lengths) == SEQ_LEN and len(row.names) == len(row.lengths)
        start = 0
        for length in row.lengths:
            stop = start + length
            assert (row.labels[start : stop - 1] == row.tokens[start + 1 : stop]).all()
            start = stop
    # Documents that a border had cut are joined before: no more of them are cut than by borders.
    assert sum(len(row.lengths) for row in after) <= sum(len(row.lengths) for row in before)


def test_dealt_rows_have_about_the_same_work():
    before = [imbalance(rows) for rows in zip(*[iter(stream(64))] * 8, strict=True)]
    after = [imbalance(balanced_rows(rows)) for rows in zip(*[iter(stream(64))] * 8, strict=True)]
    assert np.mean(after) < 1.05 < 1.25 < np.mean(before)


def test_a_document_longer_than_a_row_fills_rows():
    long = Texts(("a" * 150, "b", "c" * 20, "d" * 40, "e" * 9, "f" * 30))
    rows = islice(pack(long, TOKENIZER, 64, Cursor(), infinite=True, name="texts"), 4)
    lengths = [row.lengths for row in balanced_rows(list(rows))]
    assert lengths[:2] == [[64], [64]]


@pytest.mark.parametrize(("ranks", "rows"), [(1, 4), (2, 2), (4, 1)])
def test_every_mesh_reads_the_same_dealt_rows(ranks, rows):
    steps = [batches(dealt_loader(8, ranks=ranks, rank=r, rows=rows), 5) for r in range(ranks)]
    one = batches(dealt_loader(8, ranks=1, rows=4), 5)
    for step, (tokens, _) in enumerate(one):
        mine = torch.cat([part[step][0] for part in steps])
        assert sorted(mine.tolist()) == sorted(tokens.tolist())


@pytest.mark.parametrize("stop", range(1, 6))
def test_dealt_rows_go_on_where_they_stopped_on_another_mesh(stop):
    """In the middle of a window of 12 rows, and at its end."""
    expected = batches(dealt_loader(12, ranks=1, rows=4), stop + 3)[stop:]
    data = dealt_loader(12)
    batches(data, stop)
    state = json.loads(json.dumps(data.state_dict()))
    resumed = [dealt_loader(12, ranks=2, rank=rank, rows=2) for rank in range(2)]
    for each in resumed:
        each.load_state_dict(state)
    parts = [batches(each, 3) for each in resumed]
    for step, (tokens, _) in enumerate(expected):
        mine = torch.cat([part[step][0] for part in parts])
        assert sorted(mine.tolist()) == sorted(tokens.tolist())


def test_ranks_share_rows_of_about_the_same_work_and_as_many_each():
    rows = stream(12)
    shares = share(rows, 3)
    assert [len(part) for part in shares] == [4, 4, 4]
    assert {id(row) for part in shares for row in part} == {id(row) for row in rows}
    work = [sum(work_of(row.lengths) for row in part) for part in shares]
    assert max(work) * 3 / sum(work) < 1.1


def test_a_loader_gives_two_ranks_the_pairs_of_rows_whose_work_is_most_even():
    ranks = [iter(dealt_loader(4, ranks=2, rank=rank, rows=2)) for rank in range(2)]
    for _ in range(6):
        pairs = [next(rank)[0]["documents"].lengths for rank in ranks]
        work = [[sum(n * (n + 1) // 2 for n in row) for row in pair] for pair in pairs]
        a, b, c, d = sorted(work[0] + work[1])
        assert a + b < c + d
        assert sorted(map(sum, work)) == sorted((a + d, b + c))


def test_the_imbalance_of_a_step_is_that_of_its_micro_batches():
    assert largest_work([]) is largest_work([(5,)]) is None
    assert largest_work([(1, 3), (6, 2)]) == pytest.approx((3 + 6) * 2 / 12)
    data = dealt_loader(8)
    batches(data, 1)
    assert len(data.last_work) == 4 and largest_work([data.last_work]) < 1.1


def test_rows_dealt_out_in_another_way_are_other_data():
    data = dealt_loader(8)
    state = data.state_dict()
    with pytest.raises(ValueError, match="rows dealt out together was 8 and is 16"):
        dealt_loader(16).load_state_dict(state)
    with pytest.raises(ValueError, match="rows dealt out together was 8 and is None"):
        dealt_loader(0).load_state_dict(state)


@pytest.mark.parametrize("window", [-1, 3])
def test_a_window_smaller_than_a_micro_batch_is_refused(window):
    with pytest.raises(ValueError, match=rf"got --dataloader.balance_rows={window} for 4 rows"):
        dealt_loader(window)


@pytest.mark.parametrize("window", [True, 4.5, "8"])
def test_a_window_is_a_whole_number_of_rows(window):
    with pytest.raises(TypeError, match=r"takes whole numbers, got balance_rows="):
        dealt_loader(window)


@pytest.mark.parametrize(("window", "uneven"), [(0, False), (4, False), (8, False), (9, True)])
def test_a_window_that_is_no_multiple_of_a_micro_batch_is_said_to_be_less_even(
    window, uneven, capsys
):
    dealt_loader(window)
    said = f"dealt out among {window} rows, no multiple of the 4 of a micro-batch"
    assert (said in capsys.readouterr().out) == uneven
    if window:
        # And drops none: an epoch's rows are those of documents in their order.
        rows = stream(30)
        dealt = list(balanced_in_windows(iter(rows), Cursor(), window))
        before, after = (np.sort(np.concatenate([row.tokens for row in x])) for x in (rows, dealt))
        assert len(dealt) == len(rows) and (before == after).all()

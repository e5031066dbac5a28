"""Streams of rows on several batch ranks: all end together, and no row is learned from twice."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.state import GradientState
from datasets import IterableDataset
from torch.utils.data import DataLoader

from dtcp.trainers.repeated_rows import ignore_repeated
from dtcp.trainers.streams import note_remainder, read_whole

IGNORED = -100


def rows_of_parts(parts):
    for part in parts:
        yield from ({"row": row} for row in range(*part))


def loader_of(rank, *, workers=0):
    """Of two batch ranks, by two rows, of a stream in parts of 8 and of 3 rows."""
    stream = IterableDataset.from_generator(rows_of_parts, gen_kwargs={"parts": [(0, 8), (8, 11)]})
    rows = DataLoader(read_whole(stream), batch_size=2, num_workers=workers, collate_fn=list)
    return prepare_data_loader(rows, num_processes=2, process_index=rank, put_on_device=False)


def test_batch_ranks_of_a_stream_in_unequal_parts_end_together():
    """Each with a part of its own, one would have two batches of the other's four."""
    GradientState()
    batches = [list(loader_of(rank)) for rank in range(2)]
    steps = [
        [each["row"] for part in parts for each in part] for parts in zip(*batches, strict=True)
    ]
    assert steps == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 0]]


@pytest.mark.parametrize(("workers", "remainder"), [(0, 3), (1, -1)])
def test_rows_that_are_left_at_the_end_of_a_stream_are_counted(workers, remainder):
    """But for one that a worker reads, which accelerate says of all of them."""
    GradientState()
    loader = loader_of(0, workers=workers)
    assert len(list(loader)) == 3
    note_remainder(loader)
    assert loader.remainder == remainder


@pytest.mark.parametrize(("rank", "kept"), [(0, 2), (1, 1), (2, 0)])
def test_rows_that_are_repeated_in_one_flattened_row_have_no_loss(rank, kept):
    """Each is one document; where rows are packed of several, nothing shows them."""
    mesh = SimpleNamespace(size=lambda axis: 3, rank=lambda axis: rank)
    loader = SimpleNamespace(total_batch_size=6)
    state = SimpleNamespace(in_dataloader=True, remainder=3, active_dataloader=loader)
    state.end_of_dataloader = True
    labels = torch.arange(1, 9)[None]
    for positions, shown in (([0, 1, 2, 0, 1, 2, 3, 4], True), ([0, 1, 0, 1, 0, 1, 2, 3], False)):
        position_ids = torch.tensor([positions])
        batch = {"input_ids": labels, "labels": labels, "position_ids": position_ids}
        assert ignore_repeated(batch, state, mesh) == (shown and kept < 2)
        repeated = (position_ids == 0).cumsum(1) > kept
        expected = labels.masked_fill(repeated, IGNORED) if shown else labels
        assert batch["labels"].equal(expected)

"""Blocks to ranks: equal counts, about equal work."""

import pytest
import torch

from dtcp.sequence.block_balanced import assign_blocks, block_work


def busiest_over_mean(work, owners):
    """Work of the busiest rank divided by the mean: 1 is perfect, n is one rank doing it all."""
    loads = [0] * (max(owners) + 1)
    for load, rank in zip(work, owners, strict=True):
        loads[rank] += load
    return max(loads) * len(loads) / sum(loads)


def test_block_work_adds_up_the_tokens_of_each_block():
    assert block_work(torch.tensor([1, 2, 3, 4, 0, 5]), 2) == [3, 7, 5]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_every_rank_gets_the_same_number_of_blocks(num_shards):
    work = torch.randint(0, 100, (num_shards * 7,)).tolist()
    owners = assign_blocks(work, num_shards)
    assert [owners.count(rank) for rank in range(num_shards)] == [7] * num_shards


@pytest.mark.parametrize("num_shards", [2, 3, 4, 8])
def test_causal_work_is_balanced_within_one_percent(num_shards):
    work = list(range(1, num_shards * 16 + 1))
    assert busiest_over_mean(work, assign_blocks(work, num_shards)) < 1.01


def test_no_rank_exceeds_the_mean_by_more_than_the_heaviest_block():
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        work = torch.randint(0, 1000, (32,), generator=generator).tolist()
        owners = assign_blocks(work, 4)
        mean = sum(work) / 4
        assert busiest_over_mean(work, owners) * mean <= mean + max(work)


def test_ties_go_to_the_earlier_block_and_the_lower_rank():
    assert assign_blocks([1, 1, 1, 1], 2) == (0, 1, 0, 1)


def test_unequal_blocks_are_refused():
    with pytest.raises(ValueError, match=r"equal blocks, got work.shape=\(5,\), block=2"):
        block_work(torch.ones(5), 2)
    with pytest.raises(ValueError, match="got 5 blocks, num_shards=2"):
        assign_blocks([1] * 5, 2)

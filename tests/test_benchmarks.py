"""Benchmarks import what is there, which nothing else runs; their bounds are bounds."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from benchmarks.balance_bounds import fewest_keys
from dtcp.sequence.documents import Documents

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))
NAMES = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES]


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("__init__")])
def test_benchmark_can_be_imported(name):
    importlib.import_module(name)


def _deals(tokens, num_shards):
    """All ways to give each of some ranks as many tokens, by token."""
    deals = [()]
    for _ in range(tokens):
        deals = [(*deal, rank) for deal in deals for rank in range(num_shards)]
        deals = [deal for deal in deals if deal.count(deal[-1]) <= tokens // num_shards]
    return deals


@pytest.mark.parametrize(
    ("lengths", "num_shards"),
    [((8,), 2), ((3, 5), 2), ((1, 7), 2), ((1, 1, 6), 2), ((4, 4), 2), ((8,), 4), ((2, 6), 4)],
)
def test_no_layout_of_equal_tokens_and_work_brings_fewer_keys_than_the_bound(lengths, num_shards):
    """All ways to deal 8 tokens out evenly, at every imbalance that one of them has."""
    depth = np.concatenate([np.arange(1, length + 1) for length in lengths])
    document = np.repeat(np.arange(len(lengths)), lengths)
    found = {}
    for owners in _deals(8, num_shards):
        owner = np.array(owners)
        work = np.bincount(owner, depth, num_shards)
        read = sum(
            depth[(owner == rank) & (document == each)].max(initial=0)
            for rank in range(num_shards)
            for each in range(len(lengths))
        )
        imbalance = int(work.max()) * num_shards / int(depth.sum())
        found[imbalance] = min(read - 8, found.get(imbalance, 99))
    for imbalance in found:
        fewest = min(brought for other, brought in found.items() if other <= imbalance)
        bound = fewest_keys(Documents((lengths,), 8), num_shards, imbalance=imbalance, stride=1)
        assert bound <= fewest / num_shards / 8 + 1e-9

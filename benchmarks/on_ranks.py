"""Measurements on real gloo ranks, processes that are started for one."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing as mp


def measured_on_ranks(ranks: int, measure: Callable[..., None], *options: Any) -> dict[Any, Any]:
    """What every rank puts into results: measure(rank, *options, results)."""
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        results = manager.dict()
        mp.spawn(in_group, (f"{folder}/meeting", ranks, measure, *options, results), nprocs=ranks)
        return dict(results)


def in_group(rank: int, meeting: str, ranks: int, measure: Callable[..., None], *args: Any) -> None:
    """Call measure(rank, *args) on one thread of a rank that meets the others in a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    measure(rank, *args)
    dist.destroy_process_group()

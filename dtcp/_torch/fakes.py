"""Runs without ranks or memory."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily


@contextmanager
def fake_ranks(world_size: int, rank: int) -> Iterator[None]:
    """So many ranks, of which this process plays one: nobody answers (private in 2.11-2.15)."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # DTensor remembers results by equal meshes, and with them the groups of one that is gone.
    _clear_sharding_prop_cache()
    # It would put the rank before each line of every traceback, once more each time.
    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()
        sys.excepthook = hook


def fake_tensors() -> FakeTensorMode:
    """Tensors with sizes and no memory; real ones are taken beside them (2.11-2.15)."""
    return FakeTensorMode(allow_non_fake_inputs=True)


real_tensors = unset_fake_temporarily
"""Inside fake tensors' mode, a stretch in which the host reads tables (2.11-2.15)."""


class SizingTrials:
    """True while DTensor runs an op on whole tensors, to know the sizes of its result."""

    def __init__(self) -> None:
        self._running = 0

    def __bool__(self) -> bool:
        return self._running > 0

    def __enter__(self) -> None:
        self._running += 1

    def __exit__(self, *_: object) -> None:
        self._running -= 1


@contextmanager
def noted_trials(trials: SizingTrials) -> Iterator[None]:
    """Inside, DTensor's trials are noted, where it makes them (2.11-2.13)."""
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    propagator: Any = ShardingPropagator
    before = propagator._propagate_tensor_meta_non_cached

    def noted(*args: Any, **kwargs: Any) -> Any:
        with trials:
            return before(*args, **kwargs)

    propagator._propagate_tensor_meta_non_cached = noted
    try:
        yield
    finally:
        propagator._propagate_tensor_meta_non_cached = before

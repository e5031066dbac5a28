"""What one rank refuses, all ranks refuse: others would wait for it in their next exchange."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@contextmanager
def refused_alike(subject: str, mesh: DeviceMesh | None) -> Iterator[None]:
    """Inside, a rank that raises lets the others raise, too, and say which rank has the reason.

    Traffic per rank: one number, over each axis.

    Args:
        subject: what is refused, as the sentence of the other ranks begins.
        mesh: all axes of the ranks that go on together; None for a process by itself.
    Raises:
        ValueError: another rank raised.
    """
    if mesh is None:
        yield
        return
    error = None
    try:
        yield
    # Held back, never swallowed: whatever its class, the other ranks hear of it first.
    except Exception as raised:  # noqa: BLE001
        error = raised
    refusing = torch.tensor([-1 if error is None else dist.get_rank()], device=mesh.device_type)
    for group in mesh.get_all_groups():
        dist.all_reduce(refusing, dist.ReduceOp.MAX, group=group)
    if error is not None:
        raise error
    rank = int(refusing)
    if rank >= 0:
        raise ValueError(
            f"{subject} on all ranks or on none, got a refusal on rank {rank}: see its error."
        )

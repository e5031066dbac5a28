"""Process groups, and collectives that are still on their way."""

from typing import cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group, _set_pg_timeout


def group_of(name: str) -> dist.ProcessGroup:
    """The group of that name: no public way from one to the other (2.11-2.15)."""
    return _resolve_process_group(cast("dist.GroupName", name))


SET_PROCESS_GROUP_TIMEOUT = _set_pg_timeout
"""What torch.distributed.set_timeout is called before 2.14."""


def start_all_to_all(x: Tensor, receive: list[int], send: list[int], group: str) -> Tensor:
    """An all_to_all of rows that is on its way when this returns; `arrived` waits for it.

    torch keeps rows and result alive until then; its public collectives hand out a Work, which
    no op can return (2.11-2.15).
    """
    return torch.ops._c10d_functional.all_to_all_single(x, receive, send, group)


def arrived(flying: Tensor) -> Tensor:
    """Wait for a tensor of start_all_to_all; one that is there already is handed on (2.11-2.15)."""
    return torch.ops._c10d_functional.wait_tensor(flying)

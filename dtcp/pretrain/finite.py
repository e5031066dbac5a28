"""Whether every number of a state is finite, on all ranks alike."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor


@torch.no_grad()
def not_finite(state: Mapping[str, Any]) -> list[str]:
    """Names of the tensors and numbers of a state that hold NaN or infinity on any rank.

    Args:
        state: nested dicts, whose names are others on the ranks of another pipeline stage;
            DTensors are looked at shard by shard.
    Returns:
        dotted names, the same on every rank. One all-reduce of a byte, and their names if there
        are some.
    """
    entries = list(_entries(state, ""))
    if not entries:
        return []
    device = next((x.device for _, x in entries if isinstance(x, Tensor)), torch.device("cpu"))
    # A sum is a fifth of the price of a look at each element, and never finite where one is not.
    totals = torch.stack([_total(value).to(device) for _, value in entries])
    suspects = zip((~totals.isfinite()).tolist(), entries, strict=True)
    bad = [name for suspect, (name, value) in suspects if suspect and _has_bad(value)]
    if not dist.is_initialized():
        return bad
    found = torch.tensor(len(bad) > 0, dtype=torch.uint8, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if not found:
        return []
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, bad)
    return list(dict.fromkeys(name for names in of_ranks for name in names))


def _entries(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor | float]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            yield f"{prefix}{key}", value
        elif isinstance(value, Tensor) and value.is_floating_point():
            local = value.to_local() if isinstance(value, DTensor) else value
            # Eight bits have no arithmetic of their own.
            yield f"{prefix}{key}", local.float() if local.itemsize == 1 else local


def _total(value: Tensor | float) -> Tensor:
    if isinstance(value, float):
        return torch.tensor(value)
    return value.sum(dtype=torch.float32)


def _has_bad(value: Tensor | float) -> bool:
    # The sum of finite numbers may be too large.
    return not (math.isfinite(value) if isinstance(value, float) else bool(value.isfinite().all()))

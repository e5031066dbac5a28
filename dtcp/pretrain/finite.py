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
        state: nested dicts of the same names on every rank; DTensors are looked at shard by shard.
    Returns:
        dotted names, the same on every rank. One all-reduce of a byte an entry.
    """
    entries = list(_entries(state, ""))
    if not entries:
        return []
    device = next((x.device for _, x in entries if isinstance(x, Tensor)), torch.device("cpu"))
    # A sum is a fifth of the price of a look at each element, and never finite where one is not.
    totals = torch.stack([_total(value).to(device) for _, value in entries])
    suspects = (~totals.isfinite()).tolist()
    bad = [suspect and _has_bad(x) for suspect, (_, x) in zip(suspects, entries, strict=True)]
    flags = torch.tensor(bad, dtype=torch.uint8, device=device)
    if dist.is_initialized():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [name for flag, (name, _) in zip(flags.tolist(), entries, strict=True) if flag]


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

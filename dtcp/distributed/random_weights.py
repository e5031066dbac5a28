"""Random weights of sharded parameters, the same on every mesh.

DTensor keeps one stream of random numbers for all shards of a tensor on GPUs only. On CPUs (torch
2.13) each rank fills its own shard from its own generator, and generators start alike: every shard
holds the same numbers. Rows of an embedding or of a router then repeat, and experts that should
differ are equal.

torch's trunc_normal_ draws again until a tensor lies within its bounds, and asks each rank for its
own part of that (`bool` of a partial DTensor is the rank's): ranks that draw more often than others
no longer agree on what comes after.
"""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from dtcp._torch.ops import TorchDispatchMode


class WholeDraws(TorchDispatchMode):
    """Within it, a random fill of a DTensor on CPUs is drawn whole, and each rank keeps its part.

    Every rank draws the same numbers, those of one device, if generators start alike and each rank
    fills the same tensors in the same order. A number that is read of a DTensor is that of all
    ranks, on any device. Memory: one whole tensor at a time.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else None
        if not isinstance(x, DTensor):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return x.full_tensor().item()
        if x.device.type != "cpu" or not _fills_at_random(func):
            return func(*args, **kwargs)
        whole = torch.empty(x.shape, dtype=x.dtype)
        func(whole, *args[1:], **kwargs)
        part = distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None)
        x.to_local().copy_(part.to_local())
        return x


def _fills_at_random(func: Any) -> bool:
    seeded = torch.Tag.nondeterministic_seeded in func.tags
    return seeded and func.name().partition(".")[0].endswith("_")

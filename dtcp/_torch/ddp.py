"""What DistributedDataParallel knows of itself (2.11-2.15)."""

from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


def running_ddp() -> DistributedDataParallel | None:
    """The one in whose forward pass this is; None outside of any."""
    return DistributedDataParallel._get_active_ddp_module()


def averaging_ranks_of_ddp(ddp: DistributedDataParallel) -> int:
    """Over how many ranks it averages gradients: 1 where a hook of its own reduces them."""
    return 1 if ddp._comm_hooks else dist.get_world_size(ddp.process_group)

"""Where plain tensors enter and leave code that each rank of tp runs on its own part.

Megatron's f and g (Shoeybi et al. 2019, section 3, https://arxiv.org/abs/1909.08053): one is the
identity forward and an all-reduce backward, the other the reverse.
"""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate


def copy_to_region(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return x as it is; backward, sum the gradients that the ranks have for it.

    Args:
        x: the same on every rank, read on each by a part of the module.

    Traffic per rank: backward, an all-reduce of x.
    """
    replicated = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return replicated.to_local(grad_placements=[Partial()])


def reduce_from_region(part: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sum the parts that the ranks computed; backward, hand the gradient on as it is.

    Traffic per rank: forward, an all-reduce of the part.
    """
    partial = DTensor.from_local(part, mesh, [Partial()], run_check=False)
    # Waited for here: a tensor still on its way that enters a compiled block loses its gradient
    # without a word (torch 2.13, 2.15). torch's RowwiseParallel hands such tensors out.
    total = partial.redistribute(placements=[Replicate()], async_op=False)
    return total.to_local(grad_placements=[Replicate()])

"""Weights that FSDP has gathered."""

from torch import nn
from torch.distributed.fsdp import FSDPModule


def free_gathered(model: nn.Module) -> None:
    """Free what FSDP keeps gathered for a backward pass: the weights of the root and the last unit.

    An optimizer that is made of a model after a forward pass without a backward pass would step
    these gathered weights, which FSDP throws away.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

"""Weights that FSDP has gathered."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
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


@contextmanager
def no_inference_tensors() -> Iterator[None]:
    """Inside torch.inference_mode, be without gradients in the plain way instead.

    FSDP (torch 2.13) gathers for ever into the tensors that its first forward pass made. Made in
    inference mode, they end the first training step with an error of torch's.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield

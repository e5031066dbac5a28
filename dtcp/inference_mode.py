"""torch.inference_mode and what outlives it: its tensors can never be kept for a backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_inference_tensors() -> Iterator[None]:
    """Inside torch.inference_mode, be without gradients in the plain way instead.

    For what is made once and serves training later: the tables of a batch, and what FSDP (torch
    2.13) gathers into, which its first forward pass makes for good.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    # By itself the first would switch gradients on.
    with torch.inference_mode(mode=False), torch.no_grad():
        yield

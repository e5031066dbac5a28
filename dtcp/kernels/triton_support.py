"""Where this project's Triton kernels run.

Triton is optional: the modules that hold kernels import it, and are themselves imported where
`usable` said yes, and nowhere else.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor

OLDEST_GPU = (8, 0)
"""Compute capability from which tensor cores take bf16."""


def usable(x: Tensor) -> bool:
    """Whether Triton's kernels run on tensors like x: up to 32 bits wide, on a GPU.

    Where Triton interprets its kernels (TRITON_INTERPRET=1) they run on CPU tensors too: that is
    how they are tested without a GPU. bf16 is left out there, which the interpreter gets wrong.
    """
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not _has_triton():
        return False
    if x.is_cuda:
        return torch.cuda.get_device_capability(x.device) >= OLDEST_GPU
    return x.device.type == "cpu" and x.dtype != torch.bfloat16 and interprets()


@cache
def interprets() -> bool:
    """Whether this process runs kernels in Triton's interpreter; Triton reads that once, too."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None

"""Where Triton kernels can run, and how a tensor is passed to one.

Nothing here imports Triton at the top. The modules that hold kernels do, and are themselves
imported only after `triton_runs_on` returned True.
"""

import importlib.util
import sys
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

OLDEST_GPU = (8, 0)
"""Compute capability from which tensor cores take bf16."""
ATTENTION_SHARED_MEMORY = 160 * 1024
"""Bytes that a thread block of softmax attention uses at most: an A100 has that, an RTX 99 KiB."""


class StridedTensor(NamedTuple):
    """A tensor with its strides, as one argument of a kernel."""

    pointer: Any  # the tensor itself on the host, a pointer inside the kernel
    strides: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> "StridedTensor":
        return cls(x, x.stride())


def triton_runs_on(x: Tensor) -> bool:
    """Whether Triton's kernels run on tensors like x: at most 32 bits wide, on a GPU.

    Where Triton interprets its kernels (TRITON_INTERPRET=1) they run on CPU tensors too, which is
    how they are tested without a GPU; except in bf16, which the interpreter gets wrong.
    """
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not _has_triton():
        return False
    if x.is_cuda:
        return torch.cuda.get_device_capability(x.device) >= OLDEST_GPU
    return x.device.type == "cpu" and x.dtype != torch.bfloat16 and _interprets()


def tile_width(x: Tensor, width: int) -> int:
    """The head width that tiles are sized for: twice `width` on a GPU with less shared memory.

    Args:
        x: a tensor on the device in question.
    """
    return width if shared_memory(x) >= ATTENTION_SHARED_MEMORY else 2 * width


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that a thread block may use; without a GPU there is no limit."""
    if not x.is_cuda:
        return sys.maxsize
    # Torch 2.13 has the attribute, but its stubs do not.
    properties = torch.cuda.get_device_properties(x.device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


def capability_major(x: Tensor) -> int:
    """The GPU's generation: 8 for Ampere, 9 for Hopper, 10 for Blackwell; 0 without a GPU."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0


@cache
def _interprets() -> bool:
    """Whether this process runs kernels in Triton's interpreter; Triton, too, reads that once."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None

"""Where this project's Triton kernels run.

Triton is optional: the modules that hold kernels import it, and are themselves imported where
`usable` said yes, and nowhere else.
"""

import importlib.util
import sys
from functools import cache

import torch
from torch import Tensor

OLDEST_GPU = (8, 0)
"""Compute capability from which tensor cores take bf16."""
TILES_TAKE = 160 * 1024
"""Shared memory of a block of interval.py, where it has most: an A100 has that, an RTX 99 KiB."""


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


def tile_width(x: Tensor, width: int, *, shared: int) -> int:
    """The head width that tiles are cut for: twice the own one where a GPU has less shared memory.

    Args:
        shared: bytes that a block of threads takes for the widest heads.
    """
    return width if _shared_memory(x) >= shared else 2 * width


def _shared_memory(x: Tensor) -> int:
    """Bytes that a block of threads may have; of tensors on no GPU, no limit is known."""
    if not x.is_cuda:
        return sys.maxsize
    # Torch 2.13 has it, but not in its stubs.
    found = torch.cuda.get_device_properties(x.device)
    return found.shared_memory_per_block_optin  # type: ignore[attr-defined]


@cache
def interprets() -> bool:
    """Whether this process runs kernels in Triton's interpreter; Triton reads that once, too."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None

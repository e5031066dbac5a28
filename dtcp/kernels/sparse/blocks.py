"""The blocks of Triton's sparse kernels, as data: by width, dtype and GPU.

Bytes are the compiler's, with the widest keys of a line; a test compiles them. What they spill:
docs/decisions.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels import triton_support


class BlockConfig(NamedTuple):
    """Rows (queries times heads) and keys that a program holds, and how Triton runs it."""

    rows: int
    keys: int
    warps: int
    stages: int


class SparseBlocks(NamedTuple):
    """The blocks of each kernel."""

    forward: BlockConfig
    query_gradients: BlockConfig
    key_gradients: BlockConfig


class Columns(NamedTuple):
    """Channels as a kernel holds them, rounded up: those of a value, and those behind, 0 for none.

    The latent and the rotary key of DeepSeek-V3.2 are 512 + 64.
    """

    values: int
    others: int

    @classmethod
    def of(cls, dim: int, value_dim: int) -> "Columns":
        return cls(power_of_two(value_dim), power_of_two(dim - value_dim) if dim > value_dim else 0)


def power_of_two(width: int) -> int:
    """The power of two that holds a width, and that tensor cores take."""
    return max(16, 1 << (width - 1).bit_length())


class Fit(NamedTuple):
    """Blocks, and where they fit."""

    columns: int  # at most, of values and others together
    shared: int  # bytes of shared memory that they use
    blocks: SparseBlocks
    major: int | None = None  # the compute capability that they are for; None for any
    others: int = 512  # columns of others, at most


_BY_QUERIES, _BY_KEYS = BlockConfig(64, 32, 8, 2), BlockConfig(32, 64, 8, 2)
HALF_FITS = (
    Fit(256, 147_840, SparseBlocks(_BY_QUERIES, _BY_QUERIES, _BY_KEYS), major=10),
    Fit(256, 98_560, SparseBlocks(_BY_QUERIES, _BY_QUERIES, _BY_KEYS)),
    Fit(576, 225_408, SparseBlocks(_BY_QUERIES, _BY_QUERIES, _BY_KEYS), major=9),
    Fit(
        576,
        220_208,
        SparseBlocks(_BY_QUERIES, BlockConfig(64, 16, 8, 2), BlockConfig(32, 32, 8, 2)),
        major=10,
        others=64,
    ),
    # Of Qwen4's 256 + 256 a program's sums would take 552 of 512 columns of tensor memory.
    Fit(
        576,
        164_912,
        SparseBlocks(_BY_QUERIES, BlockConfig(32, 16, 8, 2), BlockConfig(32, 32, 8, 2)),
        major=10,
    ),
    Fit(
        576,
        114_816,
        SparseBlocks(_BY_QUERIES, BlockConfig(32, 16, 8, 2), BlockConfig(16, 32, 8, 2)),
    ),
    Fit(
        576,
        83_968,
        SparseBlocks(
            BlockConfig(32, 16, 8, 2), BlockConfig(16, 16, 8, 1), BlockConfig(16, 16, 8, 1)
        ),
    ),
)
"""For bf16 and fp16; the first that fits is taken. The last four: B200 twice, A100, RTX."""

_OF_FP32 = SparseBlocks(*(BlockConfig(16, 16, 8, 1),) * 3)
FULL_FITS = (
    Fit(256, 81_920, _OF_FP32),
    Fit(512, 163_840, _OF_FP32),
    Fit(576, 180_224, _OF_FP32),
)
"""For fp32, in three products on tensor cores."""


def sparse_fit(q: Tensor, value_dim: int) -> Fit | None:
    """The blocks for queries of this width and dtype on this GPU; None if none fit."""
    columns = Columns.of(q.shape[-1], value_dim)
    fits = _fits_on(q.dtype, triton_support.capability_major(q), triton_support.shared_memory(q))
    wide_enough = (
        fit for fit in fits if sum(columns) <= fit.columns and columns.others <= fit.others
    )
    return next(wide_enough, None)


def _fits_on(dtype: torch.dtype, major: int, shared: int) -> list[Fit]:
    """What fits into a GPU of this generation and shared memory, the best first."""
    fits = FULL_FITS if dtype == torch.float32 else HALF_FITS
    return [fit for fit in fits if fit.shared <= shared and fit.major in (None, major)]


def widest_columns(dtype: torch.dtype, major: int, shared: int) -> int:
    """The most columns that fit into such a GPU; 0 for none."""
    return max((fit.columns for fit in _fits_on(dtype, major, shared)), default=0)

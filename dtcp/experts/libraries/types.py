"""What a library of GPU kernels has to do, and how its handles become tensors.

An op takes and returns tensors alone, and what it returns is what autograd, checkpoints and graphs
keep. So the handle of a dispatch, by which its results go home and gradients go both ways, is taken
apart into tensors and put together again: no table of handles that somebody would have to empty.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Handle(NamedTuple):
    """What a library remembers of one dispatch."""

    tensors: list[Tensor | None]
    numbers: list[int]


class TokenLibrary(Protocol):
    """Kernels that carry rows of hidden states between the ranks of one group, and sum them.

    Rows of a rank are those of its experts, sorted by expert. R is their number.
    """

    dtypes: tuple[torch.dtype, ...]
    """Of hidden states that the kernels take."""

    def dispatch(
        self, x: Tensor, index: Tensor, weight: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor, Handle]:
        """Send tokens to their experts, and what each expert's output weighs.

        Args:
            x, index, weight: [N, D], [N, k] and [N, k]; num_experts for what is not routed.
        Returns:
            rows [R, D], weights [R], ends [E / n] int32, and the handle.
        """

    def dispatch_again(self, x: Tensor, handle: Handle) -> Tensor:
        """Send [N, D] the same way: rows [R, D]."""

    def combine(self, rows: Tensor, handle: Handle) -> Tensor:
        """Bring rows home, and sum those of a token: [N, D]."""

    def combine_weights(
        self, rows: Tensor, weights: Tensor, index: Tensor, handle: Handle
    ) -> tuple[Tensor, Tensor]:
        """The same with a number [R] for each row, which goes to its choice: [N, D] and [N, k]."""


def pack_handle(handle: Handle) -> tuple[Tensor, Tensor]:
    """A handle as two tensors: bytes on the device, and numbers on the host, int64."""
    numbers, pieces, device = [len(handle.numbers), *handle.numbers], [], torch.device("cpu")
    for x in handle.tensors:
        if x is None:
            numbers.append(_NONE)
            continue
        on_host = x.device.type == "cpu" and x.numel() <= _FEW
        numbers += [_ON_HOST if on_host else _ON_DEVICE, _DTYPES.index(x.dtype), x.ndim, *x.shape]
        if on_host:
            numbers += x.flatten().tolist()
        else:
            flat = x.contiguous().flatten().view(torch.uint8)
            pieces += [flat, flat.new_zeros(-flat.numel() % _ALIGNMENT)]
            device = x.device
    layout = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8, device=device)
    return layout, torch.tensor(numbers)


def unpack_handle(layout: Tensor, numbers: Tensor) -> Handle:
    """The handle of which `pack_handle` made these."""
    rest = iter(numbers.tolist())
    plain = [next(rest) for _ in range(next(rest))]
    tensors: list[Tensor | None] = []
    start = 0
    for kind in rest:
        if kind == _NONE:
            tensors.append(None)
            continue
        dtype = _DTYPES[next(rest)]
        shape = [next(rest) for _ in range(next(rest))]
        size = _product(shape)
        if kind == _ON_HOST:
            tensors.append(torch.tensor([next(rest) for _ in range(size)], dtype=dtype).view(shape))
            continue
        stop = start + size * dtype.itemsize
        tensors.append(layout[start:stop].view(dtype).view(shape))
        start = stop + (start - stop) % _ALIGNMENT
    return Handle(tensors, plain)


_NONE, _ON_HOST, _ON_DEVICE = range(3)
_DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32)
_ALIGNMENT = 128
"""Bytes: kernels read what they remember by 16 bytes and more at a time."""
_FEW = 16


def _product(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size

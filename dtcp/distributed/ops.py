"""Ops that communicate: how one is made, and how selective checkpointing knows it again."""

from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef

from dtcp._torch import OpOverload, overload_of


def communicating_op(
    name: str, *, schema: str | None = None
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function an op that says of itself that it communicates.

    Any other op is made with torch.library.custom_op. The difference is what selective
    checkpointing goes by: it keeps what this op returns, and never communicates a second time.

    Args:
        name: dtcp::<name>; a backward op is called dtcp::<name>_backward.
        schema: as of torch.library.custom_op; None reads it off the annotations.

    Example::
        @communicating_op("dtcp::ring_shift")
        def _ring_shift(x: Tensor, by: int, group: str) -> Tensor: ...
    """

    def make(function: Callable[..., Any]) -> CustomOpDef:
        op = torch.library.custom_op(name, mutates_args=(), schema=schema)(function)
        # Kept by the op, which torch holds for the process: no list of ours to go out of date.
        setattr(overload_of(op), _MARK, True)
        return op

    return make


def communicates(op: OpOverload) -> bool:
    """Whether an op was made by `communicating_op`."""
    return getattr(op, _MARK, False)


def selective_checkpoint_save_ops() -> list[OpOverload]:
    """The forward ops whose results came over the network: what a selective policy saves.

    Saving them is what keeps recomputation from communicating a second time.
    """
    # torch.ops.dtcp knows the names that were read off it, and making an op reads its own.
    ops = (getattr(torch.ops.dtcp, name).default for name in sorted(set(torch.ops.dtcp)))
    return [op for op in ops if communicates(op) and not op.name().endswith("_backward")]


_MARK = "dtcp_communicates"

"""Ops that communicate: how one is made, and how selective checkpointing knows it again."""

from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef

from dtcp._torch.ops import OpOverload, overload_of
from dtcp.distributed.moves import OpMoves
from dtcp.local_op import local_op


def communicating_op(
    name: str, *, moves: OpMoves, schema: str | None = None
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function an op that says of itself that it communicates.

    Any other op is a `local_op`. The difference is what selective checkpointing goes by: it keeps
    what this op returns, and never communicates a second time.

    Args:
        name: dtcp::<name>; a backward op is called dtcp::<name>_backward.
        moves: what it moves, from its arguments, with tensors of the right sizes and no data; what
            the host reads in its body, as counts of tokens, the host reads here too.
        schema: as of `local_op`.

    Example::
        @communicating_op("dtcp::ring_shift", moves=lambda x, by, group: Moved(...))
        def _ring_shift(x: Tensor, by: int, group: str) -> Tensor: ...
    """

    def make(function: Callable[..., Any]) -> CustomOpDef:
        op = local_op(name, schema=schema)(function)
        # Kept by the op, which torch holds for the process: no list of ours to go out of date.
        setattr(overload_of(op), _MOVES, moves)
        return op

    return make


def communicates(op: OpOverload) -> bool:
    """Whether an op was made by `communicating_op`."""
    return moves_of(op) is not None


def moves_of(op: OpOverload) -> OpMoves | None:
    """What an op says it moves, as a function of its arguments; None: it does not communicate."""
    return getattr(op, _MOVES, None)


def selective_checkpoint_save_ops() -> list[OpOverload]:
    """The forward ops whose results came over the network: what a selective policy saves.

    Saving them is what keeps recomputation from communicating a second time.
    """
    # torch.ops.dtcp knows the names that were read off it, and making an op reads its own.
    ops = (getattr(torch.ops.dtcp, name).default for name in sorted(set(torch.ops.dtcp)))
    return [op for op in ops if communicates(op) and not op.name().endswith("_backward")]


_MOVES = "dtcp_moves"

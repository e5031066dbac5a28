"""How functions become ops, and how selective checkpointing knows those that communicate."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.library import CustomOpDef

from dtcp._torch import OpOverload, overload_of
from dtcp.autocast import outside_autocast
from dtcp.distributed.moves import OpMoves


def local_op(
    name: str, *, schema: str | None = None
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function an op that moves nothing; its body runs outside of autocast.

    It has no derivative in forward mode, of which torch would drop its share without a word.

    Args:
        name: dtcp::<name>.
        schema: as of torch.library.custom_op; None reads it off the annotations.
    """

    def make(function: Callable[..., Any]) -> CustomOpDef:
        body = outside_autocast(_without_tangents(name, function))
        return torch.library.custom_op(name, mutates_args=(), schema=schema)(body)

    return make


def _without_tangents(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The body of an op that refuses what forward mode gives a tangent."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, Tensor) and unpack_dual(x).tangent is not None for x in args):
            raise NotImplementedError(
                f"{name} is differentiated in reverse alone, got a dual tensor of forward mode: "
                f"use torch.autograd.grad or torch.func.vjp, not jvp, for code around it."
            )
        return function(*args, **kwargs)

    return run


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

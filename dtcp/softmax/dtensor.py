"""DTensor rules of the attention ops: the sequence sharded on the axis the op talks over."""

from math import prod
from typing import Any

from torch.distributed.tensor import DTensor, Shard

from dtcp.distributed.dtensor_rules import HEADS, _local, _wrap, check_placements, handle
from dtcp.softmax.op import AttentionOp

KV_HEADS = 7  # its place among a backward op's arguments after grad_out


def install(op: AttentionOp) -> None:
    """Let an attention op take DTensors. Installing twice is installing once."""
    handle(op.forward._opoverload, _forward)
    handle(op.backward._opoverload, _backward)


def _forward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    q, k, v = args[:3]
    groups = args[7]
    check_placements(str(op), (q, k, v), groups[0])
    out, saved = op(*_local(args), **kwargs)
    # What is kept for backward stays local: nobody but the backward op reads it.
    return _wrap(out, q), saved


def _backward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    grad_out, *rest = args
    like = next(x for x in (*rest, grad_out) if isinstance(x, DTensor))
    if grad_out.placements != like.placements:
        grad_out = grad_out.redistribute(like.device_mesh, like.placements)
    kv_heads = rest[KV_HEADS] // _shards(like, HEADS)
    rest = [*rest[:KV_HEADS], kv_heads, *rest[KV_HEADS + 1 :]]
    *grads, dsink = op(*_local((grad_out, *rest)), **kwargs)
    return (*(_wrap(grad, like) for grad in grads), dsink)


def _shards(x: DTensor, dim: int) -> int:
    """Parts that a dim is cut into."""
    sizes = (x.device_mesh.size(i) for i, p in enumerate(x.placements) if p == Shard(dim))
    return prod(sizes)

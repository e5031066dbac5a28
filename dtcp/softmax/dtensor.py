"""DTensor rules of the attention ops: the sequence sharded on the axis the op talks over."""

from math import prod
from typing import Any, cast

from torch.distributed.tensor import DTensor, Shard

from dtcp.distributed.dtensor_rules import HEADS, _local, _wrap, check_placements, handle
from dtcp.softmax.op import AttentionOp, BackwardArguments, ForwardArguments


def install(op: AttentionOp) -> None:
    """Let an attention op take DTensors. Installing twice is installing once."""
    handle(op.forward._opoverload, _forward)
    handle(op.backward._opoverload, _backward)


def _forward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    x = ForwardArguments(*args)
    keys = () if x.k is None else (x.k,)
    check_placements(str(op), (x.q, *keys, x.v), x.groups[0])
    out, saved = op(*_local(args), **kwargs)
    # What is kept for backward stays local: nobody but the backward op reads it.
    return _wrap(out, cast(DTensor, x.q)), saved


def _backward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    x = BackwardArguments(*args)
    like = next(each for each in (*x[1:], x.grad_out) if isinstance(each, DTensor))
    grad_out = cast(DTensor, x.grad_out)
    if grad_out.placements != like.placements:
        grad_out = grad_out.redistribute(like.device_mesh, like.placements)
    x = x._replace(grad_out=grad_out, kv_heads=x.kv_heads // _shards(like, HEADS))
    *grads, dsink, dkey_scale = op(*_local(x), **kwargs)
    return (*(_wrap(grad, like) for grad in grads), dsink, dkey_scale)


def _shards(x: DTensor, dim: int) -> int:
    """Parts that a dim is cut into."""
    sizes = (x.device_mesh.size(i) for i, p in enumerate(x.placements) if p == Shard(dim))
    return prod(sizes)

"""DTensor rules of the attention ops: the sequence sharded on the axis the op communicates over."""

from typing import Any, cast

from torch.distributed.tensor import DTensor

from dtcp._torch.dtensor import set_dtensor_rule
from dtcp.distributed.dtensor_rules import HEADS, bind, check_placements, num_shards, to_local, wrap
from dtcp.softmax.inputs import AttentionInputs, check_inputs
from dtcp.softmax.op import AttentionOp, BackwardArguments, ForwardArguments


def install_attention_rules(op: AttentionOp) -> None:
    """Let an attention op take DTensors. Installing twice is installing once."""
    set_dtensor_rule(op.forward, _forward)
    set_dtensor_rule(op.backward, _backward)


def _forward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    x = ForwardArguments(**bind(op, args, kwargs))
    of_tokens = [getattr(x, name) for name in x.inputs.of_tokens]
    check_placements(str(op), of_tokens, x.groups[0])
    local = ForwardArguments(*to_local(x))
    check_inputs(local.inputs)
    out, saved = op(*local)
    # What is kept for backward stays local: nobody but the backward op reads it.
    return wrap(out, cast(DTensor, x.q)), saved


def _backward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    x = BackwardArguments(**bind(op, args, kwargs))
    # Placed as the output was (op.py).
    like = cast(DTensor, x.grad_out)
    x = x._replace(kv_heads=x.kv_heads // num_shards(like, HEADS))
    of_tokens = {"q", "k", "v", *x.inputs.of_tokens}
    grads = dict(zip(AttentionInputs._fields, op(*to_local(x)), strict=False))
    return tuple(wrap(y, like) if name in of_tokens else y for name, y in grads.items())

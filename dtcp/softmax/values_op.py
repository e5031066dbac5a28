"""Attention to keys made from values, as a pair of ops: a strategy's, with one tensor to carry."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dtcp.distributed.ledger import LEDGER
from dtcp.distributed.ops import communicating_op
from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax.api import SavedForward, SoftmaxParams
from dtcp.softmax.op import OpContext
from dtcp.softmax.payload import ExchangeStrategy, ValueOnlyPayload

SCHEMA = (
    "(Tensor q, Tensor v, Tensor key_scale, Tensor frequency, Tensor[] metadata, float scale,"
    " float softcap, str[] groups) -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor q, Tensor v, Tensor key_scale, Tensor frequency, Tensor out,"
    " Tensor lse, Tensor[] metadata, float scale, float softcap, str[] groups)"
    " -> (Tensor, Tensor, Tensor)"
)


class ValuesOp:
    """`dtcp::<name>` and `dtcp::<name>_backward`. The last table holds the keys' positions."""

    def __init__(self, name: str, carrier: ExchangeStrategy) -> None:
        self.name, self.carrier = name, carrier
        self.forward = communicating_op(f"dtcp::{name}", schema=SCHEMA)(self._forward)
        backward = communicating_op(f"dtcp::{name}_backward", schema=BACKWARD_SCHEMA)
        self.backward = backward(self._backward)
        self.forward.register_fake(self._forward_fake)
        self.backward.register_fake(self._backward_fake)
        self.forward.register_autograd(self._differentiate, setup_context=self._keep)

    def __call__(
        self,
        q: Tensor,
        v: Tensor,
        key_scale: Tensor,
        frequency: Tensor,
        metadata: Sequence[Tensor],
        how: SoftmaxParams,
        *,
        groups: Sequence[str],
    ) -> Tensor:
        """Attend; q is rotated already, and no tensor is a DTensor."""
        carried = (q, v, key_scale, frequency, list(metadata))
        return self.forward(*carried, how.scale, how.softcap, list(groups))[0]

    def _forward(self, q, v, key_scale, frequency, metadata, scale, softcap, groups):  # type: ignore[no-untyped-def]
        LEDGER.record(f"dtcp::{self.name}")
        call, values = self._call("", v, key_scale, frequency, metadata, scale, softcap, groups)
        out, lse = self.carrier.attend(q, values, None, call)
        return out.contiguous(), lse.contiguous()

    def _forward_fake(self, q, v, key_scale, frequency, metadata, scale, softcap, groups):  # type: ignore[no-untyped-def]
        lse = q.new_empty(q.shape[:-1], dtype=accumulation(q.dtype))
        return q.new_empty((*q.shape[:-1], v.shape[-1])), lse

    def _backward(  # type: ignore[no-untyped-def]
        self, grad_out, q, v, key_scale, frequency, out, lse, metadata, scale, softcap, groups
    ):
        LEDGER.record(f"dtcp::{self.name}_backward")
        call, values = self._call(
            "_backward", v, key_scale, frequency, metadata, scale, softcap, groups
        )
        dq, dv = self.carrier.attend_backward(q, values, SavedForward(grad_out, out, lse), call)
        wanted = ((dq, q), (dv, v), (values.scale_gradient, key_scale))
        return tuple(grad.to(x.dtype).contiguous() for grad, x in wanted)

    def _backward_fake(  # type: ignore[no-untyped-def]
        self, grad_out, q, v, key_scale, frequency, out, lse, metadata, scale, softcap, groups
    ):
        return tuple(x.new_empty(x.shape) for x in (q, v, key_scale))

    def _call(self, suffix, v, key_scale, frequency, metadata, scale, softcap, groups):  # type: ignore[no-untyped-def]
        *read, position_ids = metadata
        how = SoftmaxParams(scale, softcap)
        call = OpContext(f"dtcp::{self.name}{suffix}", read, how, groups, v.shape[2])
        return call, ValueOnlyPayload(v, key_scale, frequency, position_ids)

    def _keep(self, ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, v, key_scale, frequency, metadata, ctx.scale, ctx.softcap, ctx.groups = inputs
        ctx.num_metadata = len(metadata)
        ctx.save_for_backward(*metadata, q, v, key_scale, frequency, *output)
        ctx.mark_non_differentiable(output[1])

    def _differentiate(self, ctx, grad_out, _):  # type: ignore[no-untyped-def]
        # Read once: checkpointing recomputes at the first look and refuses a second.
        kept = ctx.saved_tensors
        metadata, rest = kept[: ctx.num_metadata], kept[ctx.num_metadata :]
        how = (ctx.scale, ctx.softcap, ctx.groups)
        dq, dv, dscale = self.backward(grad_out, *rest, list(metadata), *how)
        no_grad: tuple[Any, ...] = (None, [None] * len(metadata), None, None, None)
        return (dq, dv, dscale, *no_grad)

"""One way to make an attention strategy an op: forward, backward, fakes, autograd.

A strategy is an op, its collectives inside, and not a stretch of traced code, for four reasons
(docs/log.md has the measurements): compiled graphs keep what functional collectives brought,
n times the local size, while an op saves what it says it saves; selective checkpointing can
keep an op's output and so never communicates again; how much each rank sends may change with
every batch without a new graph; and the op counts its own executions and bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dtcp.kernels.attend import Softmax
from dtcp.traffic import LEDGER

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor[] tables, float scale, float softcap,"
    " str[] groups) -> (Tensor, Tensor[])"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor out, Tensor[] saved,"
    " Tensor[] tables, int kv_heads, float scale, float softcap, str[] groups)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


class Strategy(Protocol):
    """How attention is carried out on an axis, on plain local tensors.

    q [B, L, H, D], k [B, L, G, D], v [B, L, G, V], sink [H] or None; `tables` is what the style
    worked out for the batch; `groups` names the process groups to talk over.

    Backward is given the q, k, v and out of forward, unless the strategy keeps its own form of
    them, by heads say: then these are the first four that forward saves, and kept alone.
    """

    keeps_own_form: bool

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, call: "Call"
    ) -> tuple[Tensor, list[Tensor]]:
        """out [B, L, H, V] in q's dtype, and what backward needs besides inputs and out."""
        ...

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        out: Tensor,
        saved: list[Tensor],
        call: "Call",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv, and dsink where there is a sink."""
        ...

    def saved_like(self, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[str]) -> list[Tensor]:
        """Empty tensors of the shapes and dtypes of what forward saves."""
        ...


@dataclass(frozen=True)
class Call:
    """What a call carries besides its tensors."""

    op: str
    tables: Sequence[Tensor]
    how: Softmax
    groups: Sequence[str]
    kv_heads: int

    def moved(self, *, sent: int, received: int) -> None:
        """Count bytes that crossed between ranks in this call."""
        LEDGER.record(self.op, calls=0, sent=sent, received=received)


@dataclass(frozen=True)
class AttentionOp:
    """An attention strategy as a pair of ops."""

    name: str
    strategy: Strategy
    forward: Callable[..., tuple[Tensor, list[Tensor]]]
    backward: Callable[..., tuple[Tensor, ...]]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: Sequence[Tensor],
        how: Softmax,
        *,
        groups: Sequence[str] = (),
        sink: Tensor | None = None,
    ) -> Tensor:
        return self.forward(q, k, v, sink, list(tables), how.scale, how.softcap, list(groups))[0]


def attention_op(name: str, strategy: Strategy) -> AttentionOp:
    """Register `dtcp::<name>` and `dtcp::<name>_backward` for a strategy."""

    def forward(q, k, v, sink, tables, scale, softcap, groups):  # type: ignore[no-untyped-def]
        LEDGER.record(f"dtcp::{name}")
        call = Call(f"dtcp::{name}", tables, Softmax(scale, softcap), groups, k.shape[2])
        out, saved = strategy.forward(q, k, v, sink, call)
        return out.contiguous(), [x.contiguous() for x in saved]

    def forward_fake(q, k, v, sink, tables, scale, softcap, groups):  # type: ignore[no-untyped-def]
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        return out, strategy.saved_like(q, k, v, groups)

    def backward(  # type: ignore[no-untyped-def]
        grad_out, q, k, v, sink, out, saved, tables, kv_heads, scale, softcap, groups
    ):
        LEDGER.record(f"dtcp::{name}_backward")
        call = Call(f"dtcp::{name}_backward", tables, Softmax(scale, softcap), groups, kv_heads)
        dq, dk, dv, dsink = strategy.backward(grad_out, q, k, v, sink, out, saved, call)
        dsink = q.new_zeros(0) if dsink is None else dsink
        return (
            *(d.to(x.dtype).contiguous() for d, x in ((dq, q), (dk, k), (dv, v))),
            dsink,
        )

    def backward_fake(  # type: ignore[no-untyped-def]
        grad_out, q, k, v, sink, out, saved, tables, kv_heads, scale, softcap, groups
    ):
        tokens, heads = grad_out.shape[:2], grad_out.shape[2]
        sizes = ((heads, q.shape[-1]), (kv_heads, k.shape[-1]), (kv_heads, v.shape[-1]))
        empty = [q.new_empty((*tokens, *size)) for size in sizes]
        return (*empty, q.new_empty(0) if sink is None else sink.new_empty(sink.shape))

    make = torch.library.custom_op
    forward_op = make(f"dtcp::{name}", forward, mutates_args=(), schema=SCHEMA)
    backward_op = make(f"dtcp::{name}_backward", backward, mutates_args=(), schema=BACKWARD_SCHEMA)
    forward_op.register_fake(forward_fake)
    backward_op.register_fake(backward_fake)

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, k, v, sink, tables, ctx.scale, ctx.softcap, ctx.groups = inputs
        out, saved = output
        ctx.kv_heads, ctx.has_sink, ctx.num_tables = k.shape[2], sink is not None, len(tables)
        kept = saved if strategy.keeps_own_form else [q, k, v, out, *saved]
        ctx.save_for_backward(*tables, *([sink] if ctx.has_sink else []), *kept)
        ctx.mark_non_differentiable(*saved)

    def autograd_backward(ctx, grad_out, _):  # type: ignore[no-untyped-def]
        tables, rest = ctx.saved_tensors[: ctx.num_tables], ctx.saved_tensors[ctx.num_tables :]
        sink, rest = (rest[0], rest[1:]) if ctx.has_sink else (None, rest)
        q, k, v, out, *saved = rest
        how = (ctx.kv_heads, ctx.scale, ctx.softcap, ctx.groups)
        *grads, dsink = backward_op(grad_out, q, k, v, sink, out, saved, list(tables), *how)
        dsink = dsink if ctx.has_sink else None
        # torch takes a list of names for one argument, but an empty list for a list of tensors.
        no_grad: tuple[Any, ...] = ([None] * len(tables), None, None, None if ctx.groups else [])
        return (*grads, dsink, *no_grad)

    forward_op.register_autograd(autograd_backward, setup_context=setup_context)
    return AttentionOp(name, strategy, forward_op, backward_op)

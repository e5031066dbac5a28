"""One way to make an attention strategy an op: forward, backward, fakes, autograd.

A strategy is an op, its collectives inside, and not a stretch of traced code, for four reasons
(docs/log.md has the measurements): compiled graphs keep what functional collectives brought,
n times the local size, while an op saves what it says it saves; selective checkpointing can
keep an op's output and so never communicates again; how much each rank sends may change with
every batch without a new graph; and the op counts its own executions and bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.library import custom_op

from dtcp.distributed.ledger import LEDGER
from dtcp.distributed.ops import communicating_op
from dtcp.kernels.softmax.api import SoftmaxParams

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor[] metadata, float scale, float softcap,"
    " str[] groups) -> (Tensor, Tensor[])"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor out, Tensor[] saved,"
    " Tensor[] metadata, int kv_heads, float scale, float softcap, str[] groups)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


class AttentionInputs(NamedTuple):
    """What attention is of, as plain local tensors; or the gradients of these."""

    q: Tensor  # [B, L, H, D]
    k: Tensor  # [B, L, G, D]
    v: Tensor  # [B, L, G, V]
    sink: Tensor | None  # [H]


class ForwardResult(NamedTuple):
    """What forward comes to, and what backward reads again besides what was given."""

    out: Tensor  # [B, L, H, V], in q's dtype
    saved: list[Tensor]


class Strategy(Protocol):
    """How attention is carried out on an axis.

    Backward is given the q, k, v and out of forward, unless the strategy keeps its own form of
    them, by heads say: then these are the first four that forward saves, and kept alone.
    """

    keeps_own_form: bool

    def forward(self, x: AttentionInputs, call: "OpContext") -> ForwardResult:
        """Attend; `call.metadata` is what the style worked out for the batch."""
        ...

    def backward(
        self, grad_out: Tensor, x: AttentionInputs, kept: ForwardResult, call: "OpContext"
    ) -> AttentionInputs:
        """The gradients of x."""
        ...

    def saved_like(self, x: AttentionInputs, groups: Sequence[str]) -> list[Tensor]:
        """Empty tensors of the shapes and dtypes of what forward saves."""
        ...


@dataclass(frozen=True)
class OpContext:
    """What a call carries besides its tensors."""

    op: str
    metadata: Sequence[Tensor]
    how: SoftmaxParams
    groups: Sequence[str]
    kv_heads: int

    def moved(self, *, sent: int, received: int) -> None:
        """Count bytes that crossed between ranks in this call."""
        LEDGER.record(self.op, calls=0, sent=sent, received=received)


class AttentionOp:
    """An attention strategy as a pair of ops, `dtcp::<name>` and `dtcp::<name>_backward`.

    Args:
        communicates: whether ranks exchange anything in it; selective checkpointing keeps what
            it returns if so.
    """

    def __init__(self, name: str, strategy: Strategy, *, communicates: bool = True) -> None:
        make = communicating_op if communicates else partial(custom_op, mutates_args=())
        self.name, self.strategy = name, strategy
        self.forward = make(f"dtcp::{name}", schema=SCHEMA)(self._forward)
        self.backward = make(f"dtcp::{name}_backward", schema=BACKWARD_SCHEMA)(self._backward)
        self.forward.register_fake(self._forward_fake)
        self.backward.register_fake(self._backward_fake)
        self.forward.register_autograd(self._differentiate, setup_context=self._keep)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        metadata: Sequence[Tensor],
        how: SoftmaxParams,
        *,
        groups: Sequence[str] = (),
        sink: Tensor | None = None,
    ) -> Tensor:
        return self.forward(q, k, v, sink, list(metadata), how.scale, how.softcap, list(groups))[0]

    def _forward(self, q, k, v, sink, metadata, scale, softcap, groups):  # type: ignore[no-untyped-def]
        LEDGER.record(f"dtcp::{self.name}")
        how = SoftmaxParams(scale, softcap)
        call = OpContext(f"dtcp::{self.name}", metadata, how, groups, k.shape[2])
        out, saved = self.strategy.forward(AttentionInputs(q, k, v, sink), call)
        return out.contiguous(), [x.contiguous() for x in saved]

    def _forward_fake(self, q, k, v, sink, metadata, scale, softcap, groups):  # type: ignore[no-untyped-def]
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        return out, self.strategy.saved_like(AttentionInputs(q, k, v, sink), groups)

    def _backward(  # type: ignore[no-untyped-def]
        self, grad_out, q, k, v, sink, out, saved, metadata, kv_heads, scale, softcap, groups
    ):
        LEDGER.record(f"dtcp::{self.name}_backward")
        how = SoftmaxParams(scale, softcap)
        call = OpContext(f"dtcp::{self.name}_backward", metadata, how, groups, kv_heads)
        x, kept = AttentionInputs(q, k, v, sink), ForwardResult(out, saved)
        *grads, dsink = self.strategy.backward(grad_out, x, kept, call)
        dsink = q.new_zeros(0) if dsink is None else dsink
        wanted = zip(grads, (q, k, v), strict=True)
        return (*(grad.to(x.dtype).contiguous() for grad, x in wanted), dsink)

    def _backward_fake(  # type: ignore[no-untyped-def]
        self, grad_out, q, k, v, sink, out, saved, metadata, kv_heads, scale, softcap, groups
    ):
        empty = [x.new_empty(x.shape) for x in (q, k, v)]
        if self.strategy.keeps_own_form:
            tokens, heads = grad_out.shape[:2], grad_out.shape[2]
            sizes = ((heads, q.shape[-1]), (kv_heads, k.shape[-1]), (kv_heads, v.shape[-1]))
            empty = [q.new_empty((*tokens, *size)) for size in sizes]
        return (*empty, q.new_empty(0) if sink is None else sink.new_empty(sink.shape))

    def _keep(self, ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, k, v, sink, metadata, ctx.scale, ctx.softcap, ctx.groups = inputs
        out, saved = output
        ctx.kv_heads, ctx.has_sink, ctx.num_metadata = k.shape[2], sink is not None, len(metadata)
        kept = saved if self.strategy.keeps_own_form else [q, k, v, out, *saved]
        ctx.save_for_backward(*metadata, *([sink] if ctx.has_sink else []), *kept)
        ctx.mark_non_differentiable(*saved)

    def _differentiate(self, ctx, grad_out, _):  # type: ignore[no-untyped-def]
        # Read once: checkpointing recomputes at the first look and refuses a second.
        kept = ctx.saved_tensors
        metadata, rest = kept[: ctx.num_metadata], kept[ctx.num_metadata :]
        sink, rest = (rest[0], rest[1:]) if ctx.has_sink else (None, rest)
        q, k, v, out, *saved = rest
        how = (ctx.kv_heads, ctx.scale, ctx.softcap, ctx.groups)
        *grads, dsink = self.backward(grad_out, q, k, v, sink, out, saved, list(metadata), *how)
        dsink = dsink if ctx.has_sink else None
        # torch takes a list of names for one argument, but an empty list for a list of tensors.
        no_grad: tuple[Any, ...] = ([None] * len(metadata), None, None, None if ctx.groups else [])
        return (*grads, dsink, *no_grad)

"""Gated linear attention as a pair of ops, `dtcp::gated_linear_attention` and its backward.

As the delta rule's (op.py), whose exchange of states it shares; its maps are smaller.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dtcp.distributed.dtensor_rules import check_unwritten
from dtcp.distributed.ledger import LEDGER
from dtcp.distributed.ops import communicating_op
from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.linear_attention.api import linear_kernel
from dtcp.kernels.linear_attention.types import LinearInputs
from dtcp.recurrent.exchange import SCALES
from dtcp.recurrent.metadata import DeltaMetadata
from dtcp.recurrent.moves import LinearShape
from dtcp.recurrent.op import (
    carry_of,
    cut_in_parts,
    empty_results,
    install_rules,
    keep_inputs,
    kept_states,
    parts_of,
    rule_moves,
    whole_of_parts,
)
from dtcp.sequence.arguments import FLOATS, check_tensor

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor[] metadata, bool scan, str[] groups)"
    " -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor g, Tensor state, Tensor[] metadata,"
    " bool scan, str[] groups) -> (Tensor, Tensor, Tensor, Tensor)"
)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    metadata: DeltaMetadata,
    *,
    scan: bool = False,
    groups: Sequence[str] = (),
) -> Tensor:
    """Linear attention on this rank's segments, states from other ranks included: [B, L, H, V].

    Args:
        q, k: [B, L, G, K], q scaled.
        v: [B, L, H, V], in the dtype of q and k or in that of their sums: values that were made by
            a product need not be rounded for it.
        g: [B, L, H], or [B, L, H, K] for a decay of each key channel.
        metadata: of the batch.
        scan: bring states by a scan, rather than by gathering them.
        groups: the process group of the sequence; none for whole rows.

    Saved for backward: the inputs, and the state that enters each segment.
    """
    named: dict[str, Any] = {"q": q, "k": k, "v": v, "g": g}
    check_tensor("Linear attention", dtypes=FLOATS, **named)
    if q.dtype != k.dtype or v.dtype not in (q.dtype, accumulation(q.dtype)):
        raise TypeError(
            f"Linear attention computes in one floating dtype, with values in it or in fp32, got "
            f"q.dtype={q.dtype}, k.dtype={k.dtype}, v.dtype={v.dtype}: convert q, k and v to one."
        )
    fits = q.ndim == v.ndim == 4 and q.shape == k.shape and q.shape[:2] == v.shape[:2]
    if (
        not fits
        or v.shape[2] % q.shape[2]
        or g.shape not in (v.shape[:3], (*v.shape[:3], k.shape[-1]))
    ):
        raise ValueError(
            f"Linear attention takes one query, key, value and decay per token and head, got "
            f"q.shape={tuple(q.shape)}, k.shape={tuple(k.shape)}, v.shape={tuple(v.shape)}, "
            f"g.shape={tuple(g.shape)}: give q, k [B, L, G, K], v [B, L, H, V], H a multiple of G, "
            f"and g [B, L, H] or [B, L, H, K]."
        )
    out: Tensor = _forward(q, k, v, g, metadata.tensors(), scan, list(groups))[0]
    return out


def _forward_moves(q, k, v, g, metadata, scan, groups):  # type: ignore[no-untyped-def]
    return rule_moves(LinearShape.of(k, v), metadata, scan, groups, reverse=False)


def _backward_moves(grad_out, q, k, v, g, state, metadata, scan, groups):  # type: ignore[no-untyped-def]
    return rule_moves(LinearShape.of(k, v), metadata, scan, groups, reverse=True)


@communicating_op("dtcp::gated_linear_attention", schema=SCHEMA, moves=_forward_moves)
def _forward(q, k, v, g, metadata, scan, groups):  # type: ignore[no-untyped-def]
    LEDGER.record("dtcp::gated_linear_attention")
    batch = DeltaMetadata.of_tensors(metadata)
    parts = parts_of(LinearInputs(q, k, v, g, batch.starts), batch, "Linear attention")
    carry = carry_of(q, batch, scan, groups, reverse=False, maps=SCALES)
    out, state = linear_kernel(parts[0]).forward(parts, carry)
    return whole_of_parts(out, v), kept_states(state, batch).contiguous()


@_forward.register_fake
def _(q, k, v, g, metadata, scan, groups):  # type: ignore[no-untyped-def]
    return empty_results(k, v, metadata)


@communicating_op(
    "dtcp::gated_linear_attention_backward", schema=BACKWARD_SCHEMA, moves=_backward_moves
)
def _backward(grad_out, q, k, v, g, state, metadata, scan, groups):  # type: ignore[no-untyped-def]
    LEDGER.record("dtcp::gated_linear_attention_backward")
    batch = DeltaMetadata.of_tensors(metadata)
    parts = parts_of(LinearInputs(q, k, v, g, batch.starts), batch, "Linear attention")
    grad_parts, rows = cut_in_parts(grad_out, batch), sum(len(x.v) for x in parts)
    carry = carry_of(q, batch, scan, groups, reverse=True, maps=SCALES)
    grads = linear_kernel(parts[0]).backward(parts, grad_parts, state[:rows], carry)
    wanted = zip(zip(*grads, strict=True), (q, k, v, g), strict=True)
    return tuple(whole_of_parts(each, part) for each, part in wanted)


@_backward.register_fake
def _(grad_out, q, k, v, g, state, metadata, scan, groups):  # type: ignore[no-untyped-def]
    return tuple(part.new_empty(part.shape) for part in (q, k, v, g))


def _differentiate(ctx, grad_out, _):  # type: ignore[no-untyped-def]
    q, k, v, g, state, *metadata = ctx.saved_tensors
    kept = zip(LinearInputs._fields, (q, k, v, g), ctx.writes, strict=False)
    check_unwritten("dtcp::gated_linear_attention", kept)
    grads = _backward(grad_out, q, k, v, g, state, metadata, ctx.scan, ctx.groups)
    # torch takes a list of names for one argument, but an empty list for a list of tensors.
    return (*grads, [None] * len(metadata), None, None if ctx.groups else [])


_forward.register_autograd(_differentiate, setup_context=keep_inputs)


def install_linear_rules() -> None:
    """Let the ops take DTensors. Installing twice is installing once."""
    install_rules(_forward, _backward)

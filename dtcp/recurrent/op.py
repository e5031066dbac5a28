"""The gated delta rule as a pair of ops, `dtcp::gated_delta_rule` and its backward.

One op from inputs to output, the exchange of states inside, for the reasons that attention is
one (kernels/op.py): what it saves is what it says, checkpointing need not communicate again, and
it counts its own executions; the collectives inside count their bytes.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from dtcp._torch.dtensor import set_dtensor_rule
from dtcp.distributed.dtensor_rules import (
    bind,
    check_placements,
    check_unwritten,
    to_local,
    wrap,
    writes_to,
)
from dtcp.distributed.groups import axis_of, group_of
from dtcp.distributed.ledger import LEDGER
from dtcp.distributed.moves import Moved
from dtcp.distributed.ops import communicating_op
from dtcp.kernels.delta_rule.api import Carry, DeltaInputs, delta_kernel
from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.linear_attention.types import LinearInputs
from dtcp.recurrent.exchange import (
    MATRICES,
    StateMaps,
    entering_along_chains,
    entering_by_gather,
    entering_by_scan,
)
from dtcp.recurrent.metadata import DeltaMetadata
from dtcp.recurrent.moves import DeltaShape, states_moved, states_passed
from dtcp.sequence.arguments import FLOATS, check_tensor

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor[] metadata, bool scan,"
    " str[] groups) -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state,"
    " Tensor[] metadata, bool scan, str[] groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    metadata: DeltaMetadata,
    *,
    scan: bool = False,
    groups: Sequence[str] = (),
) -> Tensor:
    """The rule on this rank's segments, states from other ranks included: [B, L, H, V].

    Args:
        q, k: [B, L, G, K], q scaled.
        v: [B, L, H, V].
        g: [B, L, H], or [B, L, H, K] for a decay of each key channel.
        beta: [B, L, H].
        metadata: of the batch.
        scan: bring states by a scan, rather than by gathering them.
        groups: the process group of the sequence; none for whole rows.

    Saved for backward: the inputs, and the state that enters each segment.
    """
    named: dict[str, Any] = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    check_tensor("The delta rule", dtypes=FLOATS, **named)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"The delta rule computes in one floating dtype, got q.dtype={q.dtype}, "
            f"k.dtype={k.dtype}, v.dtype={v.dtype}: convert q, k and v to one."
        )
    if v.ndim != 4:
        raise ValueError(
            f"The delta rule writes a value per token and head, got v.shape={tuple(v.shape)}: "
            f"give [B, L, H, V]."
        )
    if g.shape not in (v.shape[:3], (*v.shape[:3], k.shape[-1])):
        raise ValueError(
            f"The delta rule decays by value head, or by key channel of one, got g.shape="
            f"{tuple(g.shape)} with k.shape={tuple(k.shape)}, v.shape={tuple(v.shape)}: give g as "
            f"[B, L, H] or [B, L, H, K]."
        )
    if (
        q.shape != k.shape
        or q.shape[:2] != v.shape[:2]
        or v.shape[2] % q.shape[2]
        or beta.shape != v.shape[:3]
    ):
        raise ValueError(
            f"The delta rule takes one query, key, value and beta per token and head, got q.shape="
            f"{tuple(q.shape)}, k.shape={tuple(k.shape)}, v.shape={tuple(v.shape)}, beta.shape="
            f"{tuple(beta.shape)}: give q, k [B, L, G, K], v [B, L, H, V] and beta [B, L, H], H a "
            f"multiple of G."
        )
    out: Tensor = _forward(q, k, v, g, beta, metadata.tensors(), scan, list(groups))[0]
    return out


def rule_moves(
    shape: DeltaShape,
    metadata: Sequence[Tensor],
    scan: bool,
    groups: Sequence[str],
    *,
    reverse: bool,
) -> Moved:
    """What a rule of these sizes moves, one way."""
    if not groups:
        return Moved()
    batch, rank, summary = (
        DeltaMetadata.of_tensors(metadata),
        dist.get_rank(group_of(groups[0])),
        shape.summary,
    )
    if batch.in_stretches:
        counts = batch.counts
        if batch.onward_counts.numel():
            counts = counts + batch.onward_counts
        sent, received = counts[int(reverse)].tolist()
        return states_passed(sent, received, summary // shape.batch, rank)
    num_ranks, segments = batch.chain.shape
    nodes = batch.neighbours
    return states_moved(
        summary, num_ranks, segments, rank, scan=scan, reverse=reverse, ranks_per_node=nodes
    )


def _forward_moves(q, k, v, g, beta, metadata, scan, groups):  # type: ignore[no-untyped-def]
    return rule_moves(DeltaShape.of(k, v), metadata, scan, groups, reverse=False)


def _backward_moves(grad_out, q, k, v, g, beta, state, metadata, scan, groups):  # type: ignore[no-untyped-def]
    return rule_moves(DeltaShape.of(k, v), metadata, scan, groups, reverse=True)


@communicating_op("dtcp::gated_delta_rule", schema=SCHEMA, moves=_forward_moves)
def _forward(q, k, v, g, beta, metadata, scan, groups):  # type: ignore[no-untyped-def]
    LEDGER.record("dtcp::gated_delta_rule")
    batch = DeltaMetadata.of_tensors(metadata)
    parts = parts_of(DeltaInputs(q, k, v, g, beta, batch.starts), batch, "The delta rule")
    carry = carry_of(q, batch, scan, groups, reverse=False)
    out, state = delta_kernel(parts[0]).forward(parts, carry)
    return whole_of_parts(out, v), kept_states(state, batch).contiguous()


@_forward.register_fake
def _(q, k, v, g, beta, metadata, scan, groups):  # type: ignore[no-untyped-def]
    return empty_results(k, v, metadata)


@communicating_op("dtcp::gated_delta_rule_backward", schema=BACKWARD_SCHEMA, moves=_backward_moves)
def _backward(grad_out, q, k, v, g, beta, state, metadata, scan, groups):  # type: ignore[no-untyped-def]
    LEDGER.record("dtcp::gated_delta_rule_backward")
    batch = DeltaMetadata.of_tensors(metadata)
    parts = parts_of(DeltaInputs(q, k, v, g, beta, batch.starts), batch, "The delta rule")
    grad_parts = cut_in_parts(grad_out, batch)
    rows = sum(len(x.v) for x in parts)
    carry = carry_of(q, batch, scan, groups, reverse=True)
    grads = delta_kernel(parts[0]).backward(parts, grad_parts, state[:rows], carry)
    wanted = zip(zip(*grads, strict=True), (q, k, v, g, beta), strict=True)
    return tuple(whole_of_parts(each, part) for each, part in wanted)


@_backward.register_fake
def _(grad_out, q, k, v, g, beta, state, metadata, scan, groups):  # type: ignore[no-untyped-def]
    return tuple(part.new_empty(part.shape) for part in (q, k, v, g, beta))


def _differentiate(ctx, grad_out, _):  # type: ignore[no-untyped-def]
    q, k, v, g, beta, state, *metadata = ctx.saved_tensors
    kept = zip(DeltaInputs._fields, (q, k, v, g, beta), ctx.writes, strict=False)
    check_unwritten("dtcp::gated_delta_rule", kept)
    rest = (metadata, ctx.scan, ctx.groups)
    grads = _backward(grad_out, q, k, v, g, beta, state, *rest)
    # torch takes a list of names for one argument, but an empty list for a list of tensors.
    return (*grads, [None] * len(metadata), None, None if ctx.groups else [])


def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """What the backward op of a rule reads: the inputs, and the states that enter segments."""
    *parts, metadata, ctx.scan, ctx.groups = inputs
    ctx.save_for_backward(*parts, output[1], *metadata)
    ctx.writes = [writes_to(part) for part in parts]
    ctx.mark_non_differentiable(output[1])


_forward.register_autograd(_differentiate, setup_context=keep_inputs)


Inputs = TypeVar("Inputs", DeltaInputs, LinearInputs)


def parts_of(x: Inputs, metadata: DeltaMetadata, subject: str) -> list[Inputs]:
    """The inputs of a rule, each part's by themselves.

    Args:
        subject: the rule's name, for what is refused.
    """
    if metadata.starts.shape != x.v.shape[:2]:
        raise ValueError(
            f"{subject} reads the metadata of its own batch, got some for "
            f"{tuple(metadata.starts.shape)} tokens with v.shape={tuple(x.v.shape)}: pass those "
            f"made with this batch."
        )
    # Kernels take decays from differences of a chunk's running sum of g, where -inf has none and a
    # large number swallows the others' digits. Below this nothing is kept that a float could hold.
    nothing = math.log(torch.finfo(accumulation(x.g.dtype)).tiny)
    cut = (cut_in_parts(part, metadata) for part in x._replace(g=x.g.clamp(min=nothing)))
    return [type(x)(*part) for part in zip(*cut, strict=True)]


def cut_in_parts(x: Tensor, metadata: DeltaMetadata) -> list[Tensor]:
    """Segments as rows of one part: [B, L, ...] -> [B * P, T, ...]; or each stretch as a part."""
    if not metadata.in_stretches:
        return [x.unflatten(1, (metadata.chain.shape[1], -1)).flatten(0, 1).contiguous()]
    lengths = [length for length in metadata.lengths.tolist() if length]
    return [part[None].contiguous() for part in x.flatten(0, 1).split(lengths)]


def whole_of_parts(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The way back from `cut_in_parts`, in the shape and the dtype of another tensor."""
    whole = torch.cat([x.flatten(0, 1) for x in parts])
    return whole.reshape(like.shape).to(like.dtype).contiguous()


def empty_results(k: Tensor, v: Tensor, metadata: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of the shapes and dtypes of what the forward op of a rule gives: out, and states."""
    batch = DeltaMetadata.of_tensors(metadata)
    rows = batch.lengths.shape[0] or k.shape[0] * batch.chain.shape[1]
    states = v.new_empty(rows, v.shape[2], k.shape[3], v.shape[3], dtype=accumulation(v.dtype))
    return v.new_empty(v.shape), states


def kept_states(state: Tensor, metadata: DeltaMetadata) -> Tensor:
    """What is saved: of stretches, as many as there is room for: of one shape on all ranks."""
    if not metadata.in_stretches:
        return state
    kept = state.new_zeros(len(metadata.lengths), *state.shape[1:])
    kept[: len(state)] = state
    return kept


def carry_of(
    q: Tensor,
    metadata: DeltaMetadata,
    scan: bool,
    groups: Sequence[str],
    *,
    reverse: bool,
    maps: StateMaps = MATRICES,
) -> Carry | None:
    """How summaries of this rank's segments become the states that enter them."""
    if not groups:
        return None
    axis = axis_of(groups[0], q.device)
    if metadata.in_stretches:
        way = int(reverse)
        passing = [metadata.send[way], metadata.counts[way], metadata.steps[way]]
        if metadata.onward.numel():
            passing += [metadata.onward[way], metadata.onward_counts[way]]
        return partial(entering_along_chains, passing=tuple(passing), axis=axis, maps=maps)
    entering: Any = entering_by_scan if scan else entering_by_gather
    entering = partial(entering, axis=axis, ranks_per_node=metadata.neighbours)
    chain, segments = metadata.chain.tolist(), metadata.chain.shape[1]
    entering = partial(entering, chain=chain, reverse=reverse, maps=maps)

    def carry(summary: Tensor) -> Tensor:
        own = summary.unflatten(0, (-1, segments)).movedim(1, 0).contiguous()
        return entering(own).movedim(0, 1).flatten(0, 1)

    return carry


def install_delta_rules() -> None:
    """Let the ops take DTensors. Installing twice is installing once."""
    install_rules(_forward, _backward)


def install_rules(forward: Any, backward: Any) -> None:
    """Let a rule's ops take DTensors: the sequence on the axis they communicate over, heads on
    others. Installing twice is installing once.
    """
    set_dtensor_rule(forward, _on_dtensors)
    set_dtensor_rule(backward, _backward_on_dtensors)


def _on_dtensors(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The op's forward on shards: the sequence on its axis, heads on others."""
    call = bind(op, args, kwargs)
    tensors = [call[name] for name in ("q", "k", "v", "g", "beta") if name in call]
    check_placements(str(op), tensors, call["groups"][0])
    out, state = op(**to_local(call))
    # What is kept for backward stays local: nobody but the backward op reads it.
    return wrap(out, call["v"]), state


def _backward_on_dtensors(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The op's backward on shards."""
    call = bind(op, args, kwargs)
    grad_out, like = call["grad_out"], call["v"]
    if not isinstance(grad_out, DTensor):
        # What follows gave no gradient, for which torch puts plain zeros.
        call["grad_out"] = grad_out = torch.zeros_like(like)
    if grad_out.placements != like.placements:
        call["grad_out"] = grad_out.redistribute(like.device_mesh, like.placements)
    return tuple(wrap(grad, like) for grad in op(**to_local(call)))

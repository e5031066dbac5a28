"""Rules that hand states on, each as a pair of ops: `dtcp::<name>` and its backward.

One op from inputs to output, the exchange of states inside, for the reasons that attention is
one (kernels/op.py): what it saves is what it says, checkpointing need not communicate again, and
it counts its own executions; the collectives inside count their bytes.
"""

import math
from collections.abc import Callable, Sequence
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
from dtcp.kernels.delta_rule.types import Carry, DeltaInputs
from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.linear_attention.types import LinearInputs
from dtcp.recurrent.exchange import (
    StateMaps,
    entering_along_chains,
    entering_by_gather,
    entering_by_scan,
)
from dtcp.recurrent.metadata import DeltaMetadata
from dtcp.recurrent.moves import DeltaShape, states_moved, states_passed

Inputs = TypeVar("Inputs", DeltaInputs, LinearInputs)


class RuleOp:
    """A rule that hands states on, as a pair of ops: `dtcp::<name>` and `dtcp::<name>_backward`.

    Saved for backward: the inputs, and the state that enters each segment.

    Args:
        subject: the rule's name in words, for what is refused.
        inputs: what its kernels read: tensors of tokens, q, k and v first, and `starts`.
        kernel: the backend for these inputs.
        shape: sizes of a call.
        maps: what a segment does to the state that enters it.
    """

    def __init__(
        self,
        name: str,
        subject: str,
        inputs: type[Any],
        kernel: Callable[[Any], Any],
        shape: type[DeltaShape],
        maps: StateMaps,
    ) -> None:
        self.name, self.subject, self.inputs, self.kernel = name, subject, inputs, kernel
        self.shape, self.maps, self.names = shape, maps, inputs._fields[:-1]
        given = ", ".join(f"Tensor {x}" for x in self.names)
        rest = "Tensor[] metadata, bool scan, str[] groups"
        grads = ", ".join(["Tensor"] * len(self.names))
        make, make_backward = (
            partial(communicating_op, moves=moves)
            for moves in (self._forward_moves, self._backward_moves)
        )
        forward = f"({given}, {rest}) -> (Tensor, Tensor)"
        backward = f"(Tensor grad_out, {given}, Tensor state, {rest}) -> ({grads})"
        self.forward = make(f"dtcp::{name}", schema=forward)(self._forward)
        self.backward = make_backward(f"dtcp::{name}_backward", schema=backward)(self._backward)
        self.forward.register_fake(self._forward_fake)
        self.backward.register_fake(self._backward_fake)
        self.forward.register_autograd(self._differentiate, setup_context=_keep_inputs)

    def __call__(
        self, *inputs: Tensor, metadata: DeltaMetadata, scan: bool, groups: Sequence[str]
    ) -> Tensor:
        """out [B, L, H, V].

        Args:
            scan: bring states by a scan, rather than by gathering them.
            groups: the process group of the sequence; none for whole rows.
        """
        return self.forward(*inputs, metadata.tensors(), scan, list(groups))[0]

    def _forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        *given, metadata, scan, groups = args
        LEDGER.record(f"dtcp::{self.name}")
        batch = DeltaMetadata.of_tensors(metadata)
        x = self.inputs._make((*given, batch.starts))
        parts = _parts_of(x, batch, self.subject)
        carry = _carry_of(x.q, batch, scan, groups, reverse=False, maps=self.maps)
        out, state = self.kernel(parts[0]).forward(parts, carry)
        return _whole_of_parts(out, x.v), _kept_states(state, batch).contiguous()

    def _forward_fake(self, *args: Any) -> tuple[Tensor, Tensor]:
        return _empty_results(args[1], args[2], args[len(self.names)])

    def _forward_moves(self, *args: Any) -> Moved:
        shape, (metadata, scan, groups) = self.shape.of(*args[1:3]), args[-3:]
        return _rule_moves(shape, metadata, scan, groups, reverse=False)

    def _backward(self, grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *given, state, metadata, scan, groups = args
        LEDGER.record(f"dtcp::{self.name}_backward")
        batch = DeltaMetadata.of_tensors(metadata)
        x = self.inputs._make((*given, batch.starts))
        parts, grad_parts = _parts_of(x, batch, self.subject), _cut_in_parts(grad_out, batch)
        rows = sum(len(part.v) for part in parts)
        carry = _carry_of(x.q, batch, scan, groups, reverse=True, maps=self.maps)
        grads = self.kernel(parts[0]).backward(parts, grad_parts, state[:rows], carry)
        wanted = zip(zip(*grads, strict=True), given, strict=True)
        return tuple(_whole_of_parts(each, part) for each, part in wanted)

    def _backward_fake(self, grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(part.new_empty(part.shape) for part in args[: len(self.names)])

    def _backward_moves(self, grad_out: Tensor, *args: Any) -> Moved:
        shape, (metadata, scan, groups) = self.shape.of(*args[1:3]), args[-3:]
        return _rule_moves(shape, metadata, scan, groups, reverse=True)

    def _differentiate(self, ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:
        # Read once: checkpointing recomputes at the first look and refuses a second.
        tensors, count = ctx.saved_tensors, len(self.names)
        given, (state, *metadata) = tensors[:count], tensors[count:]
        check_unwritten(f"dtcp::{self.name}", zip(self.names, given, ctx.writes, strict=True))
        grads: tuple[Tensor, ...] = self.backward(
            grad_out, *given, state, metadata, ctx.scan, ctx.groups
        )
        # torch takes a list of names for one argument, but an empty list for a list of tensors.
        return (*grads, [None] * len(metadata), None, None if ctx.groups else [])

    def install_dtensor_rules(self) -> None:
        """Let the ops take DTensors: the sequence on the axis they communicate over, heads on
        others. Installing twice is installing once.
        """
        set_dtensor_rule(self.forward, _on_dtensors)
        set_dtensor_rule(self.backward, _backward_on_dtensors)


def _rule_moves(
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


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """What the backward op of a rule reads: the inputs, and the states that enter segments."""
    *parts, metadata, ctx.scan, ctx.groups = inputs
    ctx.save_for_backward(*parts, output[1], *metadata)
    ctx.writes = [writes_to(part) for part in parts]
    ctx.mark_non_differentiable(output[1])


def _parts_of(x: Inputs, metadata: DeltaMetadata, subject: str) -> list[Inputs]:
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
    cut = (_cut_in_parts(part, metadata) for part in x._replace(g=x.g.clamp(min=nothing)))
    return [type(x)(*part) for part in zip(*cut, strict=True)]


def _cut_in_parts(x: Tensor, metadata: DeltaMetadata) -> list[Tensor]:
    """Segments as rows of one part: [B, L, ...] -> [B * P, T, ...]; or each stretch as a part."""
    if not metadata.in_stretches:
        return [x.unflatten(1, (metadata.chain.shape[1], -1)).flatten(0, 1).contiguous()]
    lengths = [length for length in metadata.lengths.tolist() if length]
    return [part[None].contiguous() for part in x.flatten(0, 1).split(lengths)]


def _whole_of_parts(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The way back from `_cut_in_parts`, in the shape and the dtype of another tensor."""
    whole = torch.cat([x.flatten(0, 1) for x in parts])
    return whole.reshape(like.shape).to(like.dtype).contiguous()


def _empty_results(k: Tensor, v: Tensor, metadata: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of the shapes and dtypes of what the forward op of a rule gives: out, and states."""
    batch = DeltaMetadata.of_tensors(metadata)
    rows = batch.lengths.shape[0] or k.shape[0] * batch.chain.shape[1]
    states = v.new_empty(rows, v.shape[2], k.shape[3], v.shape[3], dtype=accumulation(v.dtype))
    return v.new_empty(v.shape), states


def _kept_states(state: Tensor, metadata: DeltaMetadata) -> Tensor:
    """What is saved: of stretches, as many as there is room for: of one shape on all ranks."""
    if not metadata.in_stretches:
        return state
    kept = state.new_zeros(len(metadata.lengths), *state.shape[1:])
    kept[: len(state)] = state
    return kept


def _carry_of(
    q: Tensor,
    metadata: DeltaMetadata,
    scan: bool,
    groups: Sequence[str],
    *,
    reverse: bool,
    maps: StateMaps,
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

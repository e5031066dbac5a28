"""One way to make an attention strategy an op: forward, backward, fakes, autograd.

A strategy is an op, its collectives inside, and not a stretch of traced code, for four reasons
(docs/decisions has the measurements): compiled graphs keep what functional collectives brought,
n times the local size, while an op saves what it says it saves; selective checkpointing can
keep an op's output and so never communicates again; how much each rank sends may change with
every batch without a new graph; and the op counts its own executions and bytes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, zeros

from dtcp.distributed.dtensor_rules import check_unwritten, writes_to
from dtcp.distributed.ledger import LEDGER
from dtcp.distributed.moves import Moved, Moves
from dtcp.distributed.ops import communicating_op
from dtcp.kernels.softmax.api import SoftmaxParams
from dtcp.kernels.softmax.types import AUTO
from dtcp.local_op import local_op, refuse_derivative
from dtcp.metadata import AttentionMetadata
from dtcp.softmax.inputs import AttentionInputs, check_inputs
from dtcp.softmax.moves import AttentionShape, Peers
from dtcp.softmax.strategy import ForwardResult, OpContext, Strategy


class ForwardArguments(NamedTuple):
    """Of an attention op, in the order of its schema."""

    q: Tensor
    k: Tensor | None
    v: Tensor
    sink: Tensor | None
    key_scale: Tensor | None
    up: Tensor | None
    bias: Tensor | None
    slope: Tensor | None
    relative: Tensor | None
    profiles: Tensor | None
    frequency: Tensor | None
    metadata: list[Tensor]
    scale: float
    softcap: float
    groups: list[str]
    group_sizes: list[int]
    kernel: str = AUTO
    in_line: bool = False
    wide: bool = False

    @property
    def inputs(self) -> AttentionInputs:
        return AttentionInputs(*(getattr(self, name) for name in AttentionInputs._fields))


class BackwardArguments(NamedTuple):
    """Of an attention op's backward, in the order of its schema."""

    grad_out: Tensor
    q: Tensor
    k: Tensor | None
    v: Tensor
    sink: Tensor | None
    key_scale: Tensor | None
    up: Tensor | None
    bias: Tensor | None
    slope: Tensor | None
    relative: Tensor | None
    profiles: Tensor | None
    frequency: Tensor | None
    out: Tensor
    saved: list[Tensor]
    metadata: list[Tensor]
    kv_heads: int
    scale: float
    softcap: float
    groups: list[str]
    kernel: str = AUTO
    in_line: bool = False
    wide: bool = False

    @property
    def inputs(self) -> AttentionInputs:
        return AttentionInputs(*(getattr(self, name) for name in AttentionInputs._fields))


HANDED_ON = ("scale", "softcap", "groups", "kernel", "in_line", "wide")
"""The arguments that forward hands on to backward as they are."""


class AttentionOp:
    """An attention strategy as a pair of ops, `dtcp::<name>` and `dtcp::<name>_backward`.

    Args:
        communicates: whether ranks exchange anything in it; if so, selective checkpointing keeps
            what it returns.
    """

    def __init__(self, name: str, strategy: Strategy, *, communicates: bool) -> None:
        self.name, self.strategy = name, strategy
        make, make_backward = (
            partial(communicating_op, moves=moves) if communicates else local_op
            for moves in (self._forward_moves, self._backward_moves)
        )
        forward = _schema_of(ForwardArguments, "(Tensor, Tensor[])")
        backward = _schema_of(
            BackwardArguments, f"({', '.join(['Tensor'] * len(AttentionInputs._fields[:-1]))})"
        )
        self.forward = make(f"dtcp::{name}", schema=forward)(self._forward)
        self.backward = make_backward(f"dtcp::{name}_backward", schema=backward)(self._backward)
        self.forward.register_fake(self._forward_fake)
        self.backward.register_fake(self._backward_fake)
        self.forward.register_autograd(self._differentiate, setup_context=self._keep)

    def __call__(
        self,
        x: AttentionInputs,
        metadata: AttentionMetadata,
        softmax: SoftmaxParams,
        *,
        groups: Sequence[str] = (),
        group_sizes: Sequence[int] = (),
        keys_sum_grads: bool = False,
    ) -> Tensor:
        """Attend: [B, L, H, V].

        Args:
            group_sizes: how many ranks each of `groups` has.
            keys_sum_grads: k and v are in the dtype of `accumulation`, for others add to their
                gradients.
        Raises:
            ValueError: inputs whose dims do not fit together.
            TypeError: inputs of several dtypes.
        """
        if not any(isinstance(each, DTensor) for each in x):
            # The op's DTensor rule checks the shards: a sink is of this rank's heads.
            check_inputs(x, keys_sum_grads=keys_sum_grads)
        arguments = ForwardArguments(
            *x,
            metadata=metadata.tensors(),
            scale=softmax.scale,
            softcap=softmax.softcap,
            groups=list(groups),
            group_sizes=list(group_sizes),
            kernel=softmax.kernel,
            in_line=metadata.in_line,
            wide=softmax.wide,
        )
        return self.forward(*arguments)[0]

    def _forward(self, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
        x, op = ForwardArguments(*arguments), f"dtcp::{self.name}"
        LEDGER.record(op)
        context = self._context(op, x, x.v.shape[2])
        out, saved = self.strategy.forward(_lined_up(x.inputs, x.in_line), context)
        rows = x.q.shape[0]
        out, *saved = _apart([each.contiguous() for each in (out, *saved)])
        return _in_rows(out, rows), [_in_rows(each, rows) for each in saved]

    def _forward_fake(self, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
        x = ForwardArguments(*arguments)
        out = x.q.new_empty((*x.q.shape[:-1], x.inputs.value_width))
        metadata = self.strategy.metadata_of(x.metadata)
        return out, self.strategy.saved_like(x.inputs, metadata, x.group_sizes)

    def _backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        x, op = BackwardArguments(*arguments), f"dtcp::{self.name}_backward"
        LEDGER.record(op)
        context = self._context(op, x, x.kv_heads)
        out, grad_out, *saved = (
            _for_kernels(each, x.in_line) for each in (x.out, x.grad_out, *x.saved)
        )
        inputs, result = _lined_up(x.inputs, x.in_line), ForwardResult(out, saved)
        grads = self.strategy.backward(grad_out, inputs, result, context)
        results = (
            x.q.new_zeros(0) if each is None else each.to(like.dtype).contiguous()
            for each, like in zip(grads[:-1], _like(x.inputs), strict=True)
        )
        rows, fields = x.grad_out.shape[0], AttentionInputs._fields[:-1]
        of_tokens = x.inputs.of_tokens
        return tuple(
            _in_rows(each, rows) if name in of_tokens and each.numel() else each
            for name, each in zip(fields, _apart(results), strict=True)
        )

    def _backward_fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        x = BackwardArguments(*arguments)
        empty = [
            x.q.new_empty(0) if each is None else each.new_empty(each.shape)
            for each in x.inputs[:-1]
        ]
        if self.strategy.keeps_own_form:
            tokens, heads = x.grad_out.shape[:2], x.grad_out.shape[2]
            sizes = (heads, x.kv_heads, x.kv_heads)
            for index, (own, size) in enumerate(zip((x.q, x.k, x.v), sizes, strict=True)):
                if own is None:
                    continue
                # By heads, queries and keys are as many times as many.
                length = own.shape[1] * tokens[1] // x.q.shape[1]
                width = own.shape[-1] if index else _query_width(x.inputs)
                empty[index] = own.new_empty((tokens[0], length, size, width))
        return tuple(empty)

    def _context(
        self, op: str, x: ForwardArguments | BackwardArguments, kv_heads: int
    ) -> OpContext:
        """What a call carries besides its inputs, as strategies read it."""
        metadata = self.strategy.metadata_of(x.metadata)
        softmax = SoftmaxParams(x.scale, x.softcap, x.kernel, x.wide)
        return OpContext(op, metadata, softmax, x.groups, kv_heads)

    def _forward_moves(self, *arguments: Any) -> Moved:
        x = ForwardArguments(*arguments)
        shape = AttentionShape.of(x.q, x.k, x.v, x.up, beside=x.inputs.beside_queries)
        return self._moves(shape, x.q.shape[1], x).forward

    def _backward_moves(self, *arguments: Any) -> Moved:
        x = BackwardArguments(*arguments)
        batch, length, heads, value_dim = x.grad_out.shape
        # q, k and v may be by heads here, of more tokens and fewer heads.
        own = AttentionShape.of(x.q, x.k, x.v, x.up, beside=x.inputs.beside_queries)
        width = _query_width(x.inputs) if self.strategy.keeps_own_form else own.key_dim
        shape = replace(own, batch=batch, heads=heads, kv_heads=x.kv_heads, key_dim=width)
        return self._moves(shape, length, x).backward

    def _moves(
        self, shape: AttentionShape, length: int, x: ForwardArguments | BackwardArguments
    ) -> Moves:
        shape = replace(shape, wide=x.wide)
        if x.in_line:
            shape, length = replace(shape, batch=1), shape.batch * length
        metadata = self.strategy.metadata_of(x.metadata)
        return self.strategy.moves(shape, length, metadata, Peers.of(x.groups))

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
        x, result = ForwardArguments(*inputs), ForwardResult(*output)
        handed_on = {name: getattr(x, name) for name in HANDED_ON}
        ctx.handed_on = {**handed_on, "kv_heads": x.v.shape[2]}
        ctx.has_keys, ctx.num_metadata = x.k is not None, len(x.metadata)
        ctx.placements = ctx.mesh = None
        if isinstance(result.out, DTensor):
            ctx.placements, ctx.mesh = result.out.placements, result.out.device_mesh
        kept: tuple[Tensor | None, ...] = (*x.inputs, result.out)
        if self.strategy.keeps_own_form:
            # Its own q, k, v and out lead what it saved.
            kept = (None, None, None, *x.inputs[3:], None)
        ctx.kept = [each is not None for each in kept]
        present = [each for each in kept if each is not None]
        ctx.save_for_backward(*x.metadata, *present, *result.saved)
        ctx.writes = [writes_to(each) for each in present]
        ctx.mark_non_differentiable(*result.saved)

    def _differentiate(self, ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:
        if self.strategy.keeps_own_form and torch.is_grad_enabled():
            # What it saved is no input: gradients would seem to depend on none.
            refuse_derivative(f"dtcp::{self.name}_backward")
        if ctx.placements is not None and not isinstance(grad_out, DTensor):
            # What follows gave no gradient, for which torch puts plain zeros.
            mesh, dtype = ctx.mesh, grad_out.dtype
            grad_out = zeros(
                grad_out.shape, dtype=dtype, device_mesh=mesh, placements=ctx.placements
            )
        if isinstance(grad_out, DTensor) and grad_out.placements != ctx.placements:
            grad_out = grad_out.redistribute(placements=ctx.placements)
        # Read once: checkpointing recomputes at the first look and refuses a second.
        tensors = list(ctx.saved_tensors)
        metadata, tensors = tensors[: ctx.num_metadata], tensors[ctx.num_metadata :]
        names = [*AttentionInputs._fields, "out"]
        present = [name for name, there in zip(names, ctx.kept, strict=True) if there]
        check_unwritten(f"dtcp::{self.name}", zip(present, tensors, ctx.writes, strict=False))
        *inputs, out = (tensors.pop(0) if there else None for there in ctx.kept)
        x = dict(zip(AttentionInputs._fields, inputs, strict=True))
        if self.strategy.keeps_own_form:
            (x["q"], x["k"], x["v"], out), tensors = tensors[:4], tensors[4:]
            x["k"] = x["k"] if ctx.has_keys else None
        named: dict[str, Any] = {**x, "out": out, "saved": tensors, "metadata": metadata}
        results = self.backward(*BackwardArguments(grad_out, **named, **ctx.handed_on))
        grads: dict[str, Any] = {
            name: grad
            for name, grad in zip(AttentionInputs._fields[:-1], results, strict=True)
            if x[name] is not None
        }
        grads["metadata"] = [None] * len(metadata)
        # torch takes None for a list of names or numbers, but an empty list for an empty one.
        for name in ("groups", "group_sizes"):
            grads[name] = None if ctx.handed_on["groups"] else []
        return tuple(grads.get(name) for name in ForwardArguments._fields)


def _schema_of(arguments: type[Any], returns: str) -> str:
    """The schema of an op whose arguments are the fields of a NamedTuple, by name and type."""
    spelled: dict[Any, str] = {
        Tensor: "Tensor",
        Tensor | None: "Tensor?",
        list[Tensor]: "Tensor[]",
        list[str]: "str[]",
        list[int]: "int[]",
        float: "float",
        int: "int",
        str: "str",
        bool: "bool",
    }
    fields = arguments.__annotations__.items()
    return f"({', '.join(f'{spelled[kind]} {name}' for name, kind in fields)}) -> {returns}"


def _query_width(x: AttentionInputs) -> int:
    """Channels of a query by heads, beside which others came (ulysses.py)."""
    return x.q.shape[-1] - sum(each.shape[-1] for each in x.beside_queries)


def _lined_up(x: AttentionInputs, in_line: bool) -> AttentionInputs:
    """The inputs of a batch whose rows are one line: its metadata are those of one row."""
    lined_up: dict[str, Any] = {
        name: _for_kernels(getattr(x, name), in_line) for name in x.of_tokens
    }
    return x._replace(**lined_up)


def _for_kernels(x: Tensor, in_line: bool) -> Tensor:
    """What kernels read with their channels side by side: torch's own for CPUs do not look."""
    return _on_a_line(x if x.stride(-1) == 1 else x.contiguous(), in_line)


def _on_a_line(x: Tensor, in_line: bool) -> Tensor:
    """[B, L, ...] to [1, B * L, ...]."""
    return x.flatten(0, 1)[None] if in_line else x


def _in_rows(x: Tensor, rows: int) -> Tensor:
    """The way back; of what is in rows, itself."""
    return x if x.shape[0] == rows else x.view(rows, x.shape[1] // rows, *x.shape[2:])


def _apart(results: Iterable[Tensor]) -> list[Tensor]:
    """Each in a storage of its own, as results of an op are.

    What was cut out of wider rows is one already, but not where it is of a single row.
    """
    taken, out = {0}, []
    for each in results:
        place = each.untyped_storage().data_ptr()
        out.append(each.clone() if place in taken and each.numel() else each)
        taken.add(place)
    return out


def _like(x: AttentionInputs) -> tuple[Tensor, ...]:
    """Whose dtype each gradient has."""
    return tuple(x.q if each is None else each for each in x[:-1])

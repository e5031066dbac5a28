"""A tensor from one layout to another, to the whole sequence and back, or rolled by a token."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.collectives import all_gather, all_to_all, check_shard, exchange_tokens
from dtcp.distributed.groups import axis_of, group_of
from dtcp.distributed.moves import Moved
from dtcp.distributed.ops import communicating_op
from dtcp.metadata import AttentionMetadata, HostTensor
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.partition import Ints
from dtcp.sequence.routes import Route, rolled
from dtcp.sequence.row_layouts import RowLayouts


def shard(x: Tensor, layout: SequenceLayout, mesh: DeviceMesh, *, dim: int = 1) -> Tensor:
    """Keep this rank's tokens of a tensor that every rank holds whole: S to L.

    The ranks' copies are one tensor: its gradient is that of the sum of all ranks' losses, and
    every rank gets it whole.

    Backward all-gathers. Traffic per rank: none, and (n - 1) * L tokens back.
    """
    if not isinstance(layout, SequenceLayout):
        raise TypeError(
            f"A tensor is sharded by a layout, got layout={layout!r}: give an instance, as "
            f"HeadTail(seq_len, mesh.size())."
        )
    if layout.num_shards != mesh.size():
        raise ValueError(
            f"A layout has one shard per rank, got num_shards={layout.num_shards} on a mesh of "
            f"{mesh.size()} ranks: make the layout for this mesh."
        )
    return _Shard.apply(x, layout, mesh, dim)


def gather(x: Tensor, layout: SequenceLayout, mesh: DeviceMesh, *, dim: int = 1) -> Tensor:
    """Give every rank the whole sequence, in position order: L to S.

    The gradient is that of the sum of all ranks' losses: a loss that every rank computes alike
    from the whole counts n times, so divide it, or let each rank read its own part.

    Backward reduce-scatters. Traffic per rank: (n - 1) * L tokens, and as much back.
    """
    check_shard(x, layout, mesh, dim)
    return layout.restore(all_gather(x, mesh, dim=dim), dim=dim)


def relayout(
    x: Tensor, source: SequenceLayout, target: SequenceLayout, mesh: DeviceMesh, *, dim: int = 1
) -> Tensor:
    """Move every token from the rank that holds it in source to the rank that holds it in target.

    Args:
        x: L tokens at dim, laid out as source.
    Returns:
        L tokens at dim, laid out as target.

    Backward is the relayout from target to source. Traffic per rank: the tokens that change
    owner, each way.
    """
    _check_same(source, target)
    check_shard(x, source, mesh, dim)
    ranks = range(mesh.size())
    held, wanted = ([layout.runs(rank) for rank in ranks] for layout in (source, target))
    return exchange_tokens(x, Route.between(held, wanted, mesh.get_local_rank()), mesh, dim=dim)


def roll(
    x: Tensor, layout: SequenceLayout, mesh: DeviceMesh, *, shift: int = -1, dim: int = 1
) -> Tensor:
    """Move every token `shift` positions along the sequence, as torch.roll would the whole.

    With -1 each position gets the next token, whichever rank holds it: what multi-token
    prediction reads. The first wraps around to the last position.

    Args:
        x: L tokens at dim.
    Returns:
        L tokens at dim, laid out as x.

    Backward rolls back. Traffic per rank: `shift` tokens per segment, each way.
    """
    check_shard(x, layout, mesh, dim)
    held = [layout.runs(rank) for rank in range(mesh.size())]
    wanted = [rolled(runs, shift, layout.seq_len) for runs in held]
    return exchange_tokens(x, Route.between(held, wanted, mesh.get_local_rank()), mesh, dim=dim)


@dataclass(frozen=True, eq=False)
class RelayoutMetadata(AttentionMetadata):
    """One rank's part of a relayout: of the same shapes for any two layouts of a sequence."""

    send_order: Tensor  # [L] int32, slots of the source, by the rank they go to
    arrival_index: Tensor  # [L] int32, for each slot of the target its place among the arrivals
    counts: HostTensor  # [2, n] int64, rows to and from each rank

    @classmethod
    def between(
        cls, source: SequenceLayout, target: SequenceLayout, rank: int
    ) -> "RelayoutMetadata":
        """Between two ranks, rows travel in the order in which the source holds them."""
        _check_same(source, target)
        if isinstance(source, RowLayouts):
            rows = RowLayouts(target.seq_len, target.num_shards, (target,) * len(source.rows))
            return replace(cls.between(source.in_line, rows.in_line, rank), in_line=True)
        goes_to, _ = _places(target, source.partition.tokens(rank))
        comes_from, slot = _places(source, target.partition.tokens(rank))
        counts = [np.bincount(x, minlength=source.num_shards) for x in (goes_to, comes_from)]
        # All are a few ascending lists, which a stable sort merges.
        by_slot = np.lexsort((slot, comes_from))
        send_order, arrivals = (
            torch.from_numpy(x.astype(np.int32)) for x in (goes_to.argsort(kind="stable"), by_slot)
        )
        return cls(send_order, _inverse(arrivals), torch.from_numpy(np.stack(counts)))


def apply_relayout(
    x: Tensor, metadata: RelayoutMetadata, group: str, *, reverse: bool = False
) -> Tensor:
    """`relayout` from metadata, for code that is traced once for all batches.

    Args:
        x: [B, L, ...].
        group: name of the process group of the sequence.
        reverse: from the target to the source.

    Backward goes the other way. Traffic as of `relayout`.
    """
    line = x.flatten(0, 1)[None] if metadata.in_line else x
    moved: Tensor = _relayout(line, *metadata.tensors(), group, reverse)
    return moved.view(x.shape)


def _relayout_moves(
    x: Tensor, _: Tensor, __: Tensor, counts: Tensor, group: str, reverse: bool
) -> Moved:
    token = x.numel() // x.shape[1] * x.element_size()
    return relayout_moved(counts, token, dist.get_rank(group_of(group)), reverse=reverse)


def relayout_moved(counts: Tensor, token: int, rank: int, *, reverse: bool = False) -> Moved:
    """What a relayout moves, of counts from its metadata and so many bytes per token."""
    send, receive = counts.flip(0).tolist() if reverse else counts.tolist()
    # The rows to send and those that arrived, before they lie in their places.
    return Moved.rows(send, receive, token, rank, workspace=2 * sum(send) * token)


@communicating_op("dtcp::relayout", moves=_relayout_moves)
def _relayout(
    x: Tensor, send_order: Tensor, arrival_index: Tensor, counts: Tensor, group: str, reverse: bool
) -> Tensor:
    if len(send_order) != x.shape[1]:
        raise ValueError(
            f"A relayout reads the metadata of its own batch, got metadata for {len(send_order)} "
            f"tokens with x.shape={tuple(x.shape)}: pass what was made with this batch."
        )
    send, receive = counts.flip(0).tolist() if reverse else counts.tolist()
    first, last = send_order, arrival_index
    if reverse:
        first, last = _inverse(arrival_index), _inverse(send_order)
    rows = x.transpose(0, 1).index_select(0, first)
    arrived = all_to_all(rows, axis_of(group, x.device), receive=receive, send=send)
    return arrived.index_select(0, last).transpose(0, 1).contiguous()


def _places(layout: SequenceLayout, tokens: NDArray[np.int32]) -> tuple[Ints, Ints]:
    """Which rank holds each token, and in which of its slots."""
    runs = layout.partition
    run = runs.start.searchsorted(tokens, side="right") - 1
    return runs.owner[run], runs.slot[run] + tokens - runs.start[run]


def _inverse(permutation: Tensor) -> Tensor:
    """Where each number stands: what argsort finds by sorting."""
    places = torch.arange(len(permutation), dtype=permutation.dtype, device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation.long(), places)


@_relayout.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *metadata, ctx.group, ctx.reverse = inputs
    ctx.save_for_backward(*metadata)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    moved_back = _relayout(grad, *ctx.saved_tensors, ctx.group, not ctx.reverse)
    return moved_back, None, None, None, None, None


_relayout.register_autograd(_backward, setup_context=_keep)


def _check_same(source: SequenceLayout, target: SequenceLayout) -> None:
    for layout in (source, target):
        if not isinstance(layout, SequenceLayout):
            raise TypeError(
                f"relayout moves tokens from one layout to another, got {layout!r} of type "
                f"{type(layout).__name__}: give an instance."
            )
    if (source.seq_len, source.num_shards) != (target.seq_len, target.num_shards):
        raise ValueError(
            f"relayout moves the same tokens between the same ranks, got source={source}, "
            f"target={target}: make both layouts for one sequence and mesh."
        )


class _Shard(torch.autograd.Function):
    """Not plain indexing: its gradient would be zero wherever other ranks' tokens are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: SequenceLayout, mesh: DeviceMesh, dim: int) -> Tensor:
        ctx.layout, ctx.mesh, ctx.dim = layout, mesh, dim
        return layout.shard(x, mesh.get_local_rank(), dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gather(grad, ctx.layout, ctx.mesh, dim=ctx.dim), None, None, None

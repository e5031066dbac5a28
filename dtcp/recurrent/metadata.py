"""What recurrent mixers read of a batch: the gated delta rule and the causal convolution."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcp.metadata import AttentionMetadata, HostTensor, no_indices, no_sizes
from dtcp.recurrent.node_state_passing import node_state_passing_tensors
from dtcp.recurrent.state_passing import state_passing_tensors
from dtcp.sequence.arguments import check_ints
from dtcp.sequence.coords import Coords, documents_of
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.node_routes import NodeRoutes
from dtcp.sequence.routes import Route, halo_runs
from dtcp.sequence.stretches import Stretches, left_routes

SEGMENTED = (Contiguous, HeadTail)
"""Layouts of segments of one length, as many on every rank, whatever the documents."""


def _no_hops() -> Tensor:
    return torch.zeros(2, 0, 3, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class DeltaMetadata(AttentionMetadata):
    """What the gated delta rule reads of a batch.

    Segments are of one length and as many on every rank, or else stretches are of any.
    """

    starts: Tensor  # [B, L] int32, 1 where a document starts
    chain: HostTensor  # [n, P] int64, the place of each rank's segments in the sequence
    lengths: HostTensor = field(default_factory=no_sizes)  # [room] int64, of stretches, then 0
    send: HostTensor = field(default_factory=no_sizes)  # [2, n * room], of state_passing_tensors
    counts: HostTensor = field(default_factory=no_sizes)  # [2, 2, n]
    steps: HostTensor = field(default_factory=no_sizes)  # [2, (n + 1) * room, 3]
    ranks_per_node: HostTensor = field(default_factory=no_sizes)  # [1], empty where nobody says
    onward: HostTensor = field(default_factory=no_sizes)  # [2, R], of node_state_passing_tensors
    onward_counts: HostTensor = field(default_factory=no_sizes)  # [2, 2, n]

    @property
    def neighbours(self) -> int:
        """Ranks that share a node; 0 where nobody has said."""
        return int(self.ranks_per_node.sum())

    @property
    def in_stretches(self) -> bool:
        return self.lengths.numel() > 0


def delta_metadata(
    coords: Coords, layout: SequenceLayout | None, rank: int = 0, *, ranks_per_node: int = 0
) -> DeltaMetadata:
    """Of one rank; of whole rows without a layout.

    Args:
        ranks_per_node: neighbours that share a node; 0: nobody has said.
    """
    starts = (coords.token_index == coords.start).to(torch.int32)
    if layout is None:
        return DeltaMetadata(starts, torch.zeros(1, 1, dtype=torch.int64))
    starts = layout.shard(starts, rank)
    if issubclass(layout.kind, SEGMENTED):
        nodes = torch.full((int(ranks_per_node > 0),), ranks_per_node)
        return DeltaMetadata(starts, chain_of(layout), ranks_per_node=nodes)
    stretches = Stretches.of(layout, documents_of(coords))
    none, lengths = torch.zeros(layout.num_shards, 0, dtype=torch.int64), stretches.lengths(rank)
    if ranks_per_node in (0, 1, layout.num_shards):
        return DeltaMetadata(starts, none, lengths, *state_passing_tensors(stretches, rank))
    tensors = node_state_passing_tensors(stretches, rank, ranks_per_node)
    send, counts, steps, onward, onward_counts = tensors
    handed = replace(DeltaMetadata(starts, none, lengths), send=send, counts=counts, steps=steps)
    return replace(handed, onward=onward, onward_counts=onward_counts)


def chain_of(layout: SequenceLayout) -> Tensor:
    """Place of each rank's segments in the sequence: [n, P] int64."""
    segments = [layout.segments(rank) for rank in range(layout.num_shards)]
    firsts = torch.tensor([[start for start, _ in row] for row in segments])
    return torch.searchsorted(firsts.flatten().sort().values, firsts)


@dataclass(frozen=True, eq=False)
class ConvMetadata(AttentionMetadata):
    """What a convolution reads of a batch."""

    reach: Tensor  # [B, P, T] int32, tokens before each one in its document, at most w - 1
    route: HostTensor  # [2, hops, 3] int64, what is sent and what is received: rank, start, stop
    # Likewise, of what is handed on inside a node; no hops of one tier.
    onward: HostTensor = field(default_factory=_no_hops)
    # Of stretches of any length, whose reach is [1, 1, B * L] and ends where they start:
    first_slots: Tensor = field(default_factory=no_indices)  # [room * (w - 1)] int32, on the line
    first_reach: Tensor = field(default_factory=no_indices)  # [1, room, w - 1] int32, of these

    @property
    def routes(self) -> NodeRoutes:
        return NodeRoutes(self.route, self.onward)


def conv_metadata(
    coords: Coords,
    width: int,
    layout: SequenceLayout | None,
    rank: int = 0,
    *,
    ranks_per_node: int = 0,
) -> ConvMetadata:
    """Of one rank; of whole rows without a layout.

    Args:
        ranks_per_node: neighbours that share a node; 0: nobody has said.
    Raises:
        ValueError: segments shorter than what a token reads to its left.
    """
    reach = (coords.token_index - coords.start).clamp(max=width - 1).to(torch.int32)
    if layout is None:
        return ConvMetadata(reach[:, None], _no_hops())
    reach = layout.shard(reach, rank)
    if not issubclass(layout.kind, SEGMENTED):
        stretches = Stretches.of(layout, documents_of(coords))
        routes = left_routes(stretches, width - 1, rank, ranks_per_node)
        return _conv_of_stretches(reach.flatten().numpy(), stretches, routes, width - 1, rank)
    route = halo_route(layout, width, rank)
    return ConvMetadata(reach.unflatten(1, (route.shape[1], -1)), route)


def _conv_of_stretches(
    reach: NDArray[np.int32], stretches: Stretches, routes: NodeRoutes, left: int, rank: int
) -> ConvMetadata:
    """The reach of all tokens inside their stretches, and of the first ones beyond."""
    mine = np.flatnonzero(stretches.rank == rank)
    slot, length = stretches.slot[mine], stretches.length[mine]
    inside = np.arange(len(reach)) - np.repeat(slot, length)
    enters = stretches.enters[mine] >= 0
    after = np.arange(left)
    real = enters[:, None] & (after < length[:, None])
    first = np.where(real, slot[:, None] + after, 0)
    slots, reaches = np.zeros((2, stretches.room, left), dtype=np.int32)
    slots[: len(mine)], reaches[: len(mine)] = first, np.where(real, reach[first], 0)
    return ConvMetadata(
        torch.from_numpy(np.minimum(reach, inside).astype(np.int32))[None, None],
        *routes,
        torch.from_numpy(slots.flatten()),
        torch.from_numpy(reaches)[None],
        in_line=True,
    )


def halo_route(layout: SequenceLayout, width: int, rank: int) -> Tensor:
    """What a rank sends and receives of the tokens left of segments: [2, P, 3] int64.

    No segment is shorter than what is read, so one rank reads each token, whatever the nodes.

    Raises:
        ValueError: segments shorter than what a token reads to its left.
    """
    check_ints("A convolution", least=1, width=width)
    if layout.segment_len < width - 1:
        raise ValueError(
            f"A convolution reads {width - 1} tokens from the segment left of its own, got "
            f"segment_len={layout.segment_len} with {layout}: use fewer ranks, or longer rows."
        )
    ranks = range(layout.num_shards)
    held = [layout.runs(r) for r in ranks]
    wanted = [halo_runs(layout, r, left=width - 1, right=0) for r in ranks]
    route, count = Route.between(held, wanted, rank), len(layout.segments(rank))
    return torch.stack([_filled(hops, count) for hops in (route.send, route.receive)])


def _filled(hops: Sequence[tuple[int, int, int]], count: int) -> Tensor:
    """[count, 3]: hops of length zero fill it up, so that all ranks' are alike."""
    return torch.tensor([*hops, *[(0, 0, 0)] * (count - len(hops))]).view(count, 3)

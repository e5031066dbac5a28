"""What recurrent mixers read of a batch: the gated delta rule and the causal convolution."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.metadata import AttentionMetadata, HostTensor
from dtcp.sequence.arguments import check_ints
from dtcp.sequence.coords import Coords
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.routes import Route, halo_runs


@dataclass(frozen=True, eq=False)
class DeltaMetadata(AttentionMetadata):
    """What the gated delta rule reads of a batch."""

    starts: Tensor  # [B, L] int32, 1 where a document starts
    chain: HostTensor  # [n, P] int64, the place of each rank's segments in the sequence


def delta_metadata(coords: Coords, layout: SequenceLayout | None, rank: int = 0) -> DeltaMetadata:
    """Of one rank; of whole rows without a layout."""
    starts = (coords.token_index == coords.start).to(torch.int32)
    if layout is None:
        return DeltaMetadata(starts, torch.zeros(1, 1, dtype=torch.int64))
    return DeltaMetadata(layout.shard(starts, rank), chain_of(layout))


def chain_of(layout: SequenceLayout) -> Tensor:
    """Place of each rank's segments in the sequence: [n, P] int64."""
    segments = [layout.segments(rank) for rank in range(layout.num_shards)]
    firsts = torch.tensor([[start for start, _ in row] for row in segments])
    return torch.searchsorted(firsts.flatten().sort().values, firsts)


@dataclass(frozen=True, eq=False)
class ConvMetadata(AttentionMetadata):
    """What a convolution reads of a batch."""

    reach: Tensor  # [B, P, T] int32, tokens before each one in its document, at most w - 1
    route: HostTensor  # [2, P, 3] int64, what is sent and what is received: rank, start, stop


def conv_metadata(
    coords: Coords, width: int, layout: SequenceLayout | None, rank: int = 0
) -> ConvMetadata:
    """Of one rank; of whole rows without a layout.

    Raises:
        ValueError: segments shorter than what a token reads to its left.
    """
    reach = (coords.token_index - coords.start).clamp(max=width - 1).to(torch.int32)
    if layout is None:
        return ConvMetadata(reach[:, None], torch.zeros(2, 1, 3, dtype=torch.int64))
    route = halo_route(layout, width, rank)
    return ConvMetadata(layout.shard(reach, rank).unflatten(1, (route.shape[1], -1)), route)


def halo_route(layout: SequenceLayout, width: int, rank: int) -> Tensor:
    """What a rank sends and receives of the tokens left of segments: [2, P, 3] int64.

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

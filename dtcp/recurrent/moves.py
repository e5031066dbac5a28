"""What recurrent mixers move between ranks: states and halos, by formula."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor
from torch.distributed.tensor import DTensor

from dtcp.distributed.moves import Moved
from dtcp.distributed.node_collectives import gathered_on_nodes
from dtcp.distributed.scan import scanned
from dtcp.kernels.dtypes import accumulation
from dtcp.sequence.arguments import check_tensor
from dtcp.style import MixerShape


@dataclass(frozen=True)
class DeltaShape(MixerShape):
    """Sizes of a gated delta rule: what its traffic depends on, beside the layout."""

    batch: int
    heads: int
    key_dim: int
    value_dim: int
    element_size: int = 4
    """Of a state: fp32, or fp64 for fp64."""

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> Self:
        """That of a rule on k [B, L, G, K] and v [B, L, H, V], of the heads that this rank has."""
        check_tensor("The delta rule", shape="[B, L, G, K]", ndim=4, k=k)
        check_tensor("The delta rule", shape="[B, L, H, V]", ndim=4, v=v)
        own = v.to_local() if isinstance(v, DTensor) else v
        batch, _, heads, value_dim = own.shape
        return cls(batch, heads, k.shape[3], value_dim, accumulation(v.dtype).itemsize)

    @property
    def summary(self) -> int:
        """Bytes of one segment's map."""
        maps = self.batch * self.heads * self.key_dim
        return maps * (self.key_dim + self.value_dim) * self.element_size


@dataclass(frozen=True)
class LinearShape(DeltaShape):
    """Sizes of a gated linear attention, whose maps scale the rows of a state."""

    @property
    def summary(self) -> int:
        maps = self.batch * self.heads * self.key_dim
        return maps * (1 + self.value_dim) * self.element_size


@dataclass(frozen=True)
class ChannelShape(MixerShape):
    """Sizes of a tensor [B, L, C] of which whole tokens travel."""

    batch: int
    channels: int
    element_size: int

    @property
    def token(self) -> int:
        """Bytes of a token in all rows."""
        return self.batch * self.channels * self.element_size


def states_moved(
    summary: int,
    num_ranks: int,
    segments: int,
    rank: int,
    *,
    scan: bool,
    reverse: bool,
    ranks_per_node: int = 0,
) -> Moved:
    """What bringing the states that enter `segments` segments per rank moves.

    Args:
        summary: bytes of one segment's map.
        scan: by composition in rounds that double, rather than by gathering all maps.
        reverse: from the right, for gradients.
        ranks_per_node: neighbours that share a node; 0: nobody has said.
    """
    if not scan:
        return gathered_on_nodes(segments * summary, num_ranks, rank, ranks_per_node)
    # From the left, or from the right; of two segments per rank, both, and pairs from the right.
    ways = [(1, reverse)] if segments == 1 else [(1, False), (2, True)]
    moved = Moved()
    for maps, way in ways:
        counts = scanned(num_ranks, rank, reverse=way, ranks_per_node=ranks_per_node)
        moved += Moved.rows(*counts, maps * summary, rank)
    return replace(moved, workspace=6 * segments * summary)


def states_passed(sent: Sequence[int], received: Sequence[int], summary: int, rank: int) -> Moved:
    """What passing maps of so many bytes along chains moves, one way."""
    workspace = summary * (sum(sent) + 2 * sum(received))
    return Moved.rows(sent, received, summary, rank, workspace=workspace)

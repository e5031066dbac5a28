"""Where a forecast's tokens go: to every expert equally many, for no router has seen them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from dtcp._torch import OpOverload, argument_names, real_tensors
from dtcp.distributed.groups import group_of
from dtcp.distributed.moves import Moved

ROUTE = "dtcp::route_tokens"
EXPERT_OPS = frozenset(
    [ROUTE, "dtcp::tokens_to_experts", "dtcp::send_tokens", "dtcp::results_home"]
)
"""What communicates over ep, by name of the op."""


@dataclass(frozen=True)
class ExpertMoves:
    """What the experts of one kind of block move over ep, in one micro-batch, on one rank.

    Args:
        count: of such blocks.
        peers: the ranks of the group, by their number in the world; `rank` is one of them.
    """

    part: str
    count: int
    rank: int
    peers: tuple[int, ...]
    forward: Moved = field(default_factory=Moved)
    backward: Moved = field(default_factory=Moved)

    def received(self, ranks_per_node: int = 0) -> tuple[int, int]:
        """Bytes of all these blocks, forward and backward.

        Args:
            ranks_per_node: count those from other nodes alone; 0: all.
        """
        sizes = [
            sum(
                size
                for peer, size in zip(self.peers, moved.received, strict=False)
                if not ranks_per_node or peer // ranks_per_node != self.rank // ranks_per_node
            )
            for moved in (self.forward, self.backward)
        ]
        return self.count * sizes[0], self.count * sizes[1]


def even_routes(func: OpOverload, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    """What `route_tokens` returns where each expert is chosen as often, on every rank."""
    bound: Mapping[str, Any] = {**dict(zip(argument_names(func), args, strict=False)), **kwargs}
    index, group, shared_by = bound["index"], bound["group"], bound["shared_by"]
    n, rank = dist.get_world_size(group_of(group)), dist.get_rank(group_of(group))
    chosen = index.numel()
    if shared_by:
        size, own = dist.get_world_size(group_of(shared_by)), dist.get_rank(group_of(shared_by))
        tokens = len(index)
        mine = tokens * (own + 1) // size - tokens * own // size
        chosen = mine * index.shape[1]
    send = [chosen // n + (peer < chosen % n) for peer in range(n)]
    with real_tensors():
        counts = torch.tensor([send, [send[rank]] * n])
    return (
        index.new_empty(index.numel()),
        index.new_empty(n * send[rank]),
        index.new_empty(bound["num_experts"] // n, dtype=torch.int32),
        counts,
        index.new_empty(n * bound["faults"].shape[0]),
    )

"""Where a forecast's tokens go: equally many to every expert, since no router has seen them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from dtcp._torch.fakes import real_tensors
from dtcp._torch.ops import OpOverload
from dtcp.distributed.dtensor_rules import bind
from dtcp.distributed.groups import group_of
from dtcp.distributed.moves import Moved
from dtcp.experts.expected_moves import ExpertSizes, tokens_per_node

ROUTE = "dtcp::route_tokens"
EXPERT_OPS = frozenset(
    [ROUTE, "dtcp::dispatch_tokens", "dtcp::send_tokens", "dtcp::combine_results"]
)
"""Ops that communicate over ep, by name."""


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


class EvenRoutes:
    """Returns what `route_tokens` would if every expert were chosen equally often, on every rank.

    Where tokens cross to nodes first, `tokens_per_node` of them choose an expert of each node.
    """

    def __init__(self) -> None:
        self._num_experts, self._top_k, self._tokens = 0, 0, 0

    def before_experts(self, experts: nn.Module, args: tuple[Any, ...]) -> None:
        """A hook of modules of experts, called with tokens and what each has chosen, [N, k]."""
        if len(args) > 1 and isinstance(args[1], Tensor):
            self._num_experts, self._top_k = int(vars(experts)["num_experts"]), args[1].shape[-1]

    def __call__(self, func: OpOverload, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
        """Args: the call of `route_tokens`."""
        bound = bind(func, args, kwargs)
        index, n = bound["index"], bound["num_ranks"]
        rank = dist.get_rank(group_of(bound["group"]))
        send = self._sent(index.shape, n, bound)
        with real_tensors():
            counts = torch.tensor([send, [send[rank]] * n])
        return (
            index.new_empty(index.numel()),
            index.new_empty(n * send[rank]),
            index.new_empty(bound["num_experts"] // n, dtype=torch.int32),
            counts,
            index.new_empty(n * bound["faults"].shape[0]),
        )

    def _sent(self, shape: Sequence[int], n: int, bound: Mapping[str, Any]) -> list[int]:
        """Rows to each of n ranks. Args: shape: of the choices."""
        tokens, per_token = shape
        if bound["shared_by"]:
            tokens = _own_share(tokens, bound["shared_by"])
        if not bound["refuse"]:
            # The first hop: its choices are of nodes, and the second one goes on with the faults.
            self._tokens = tokens
            sizes = ExpertSizes(tokens, shape[1], self._num_experts, self._top_k)
            return [round(tokens_per_node(sizes, n))] * n
        if bound["num_experts"] == self._num_experts:
            chosen = tokens * per_token
        else:
            # The second hop: choices of this node's experts alone, of the tokens of every node.
            chosen = self._tokens * self._top_k
        return [chosen // n + (peer < chosen % n) for peer in range(n)]


def _own_share(tokens: int, shared_by: str) -> int:
    size, own = dist.get_world_size(group_of(shared_by)), dist.get_rank(group_of(shared_by))
    return tokens * (own + 1) // size - tokens * own // size

"""How tokens reach experts on other ranks: the seam at which another library may stand in."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dtcp.distributed.groups import group_sizes
from dtcp.experts.op import (
    NO_EXPERT,
    NOT_FINITE,
    ExchangeGroups,
    combine_results,
    dispatch_tokens,
    receive_tokens,
    route_tokens,
    send_tokens,
)

Compute = Callable[[Tensor, Tensor], Tensor]
"""(rows [R, D] sorted by expert, ends [E / n] int32) -> [R, D], by this rank's experts."""


Meanwhile = Callable[[], Tensor]
"""What needs none of the tokens that travel: an expert that all tokens share."""


class RoutedTokens(NamedTuple):
    """Tokens of this rank, and what their router chose."""

    x: Tensor  # [N, D]
    chosen: Tensor  # [N, k] int64; num_experts for a choice that is not routed and gives zeros
    weight: Tensor  # [N, k]
    meanwhile: Meanwhile | None = None  # computed while the tokens travel

    def faults(self, num_experts: int) -> Tensor:
        """What is wrong with the routing, as a number: [1] int64, 0 for nothing."""
        # What a router gives for padding is nobody's.
        routed = self.weight.detach().masked_fill(self.chosen == num_experts, 0)
        not_finite = (~routed.isfinite()).any().to(torch.int64)
        no_expert = ((self.chosen < 0) | (self.chosen > num_experts)).any().to(torch.int64)
        return (not_finite * NOT_FINITE + no_expert * NO_EXPERT).view(1)


class TokenExchange(Protocol):
    """Brings tokens to their experts and back, over the ranks of ep."""

    @property
    def num_experts(self) -> int:
        """Of all ranks together."""

    def __call__(self, tokens: RoutedTokens, compute: Compute) -> tuple[Tensor, Tensor | None]:
        """Sum the weighted outputs of each token's experts, wherever they are; differentiable.

        Returns:
            [N, D], and what `meanwhile` gave.
        """


@dataclass(frozen=True)
class AllToAllExchange:
    """Every choice of a token travels as a row, straight to the rank of its expert.

    Args:
        group: name of the process group of ep.
        shared_by: that of ranks that hold the same tokens, as those of tp do; each routes a part.

    Traffic per rank: D elements per choice that an expert of another rank takes, there and back,
    and the same again backward.
    """

    num_experts: int
    group: str
    shared_by: str = ""
    num_ranks: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_ranks", *group_sizes([self.group]))

    def __call__(self, tokens: RoutedTokens, compute: Compute) -> tuple[Tensor, Tensor | None]:
        return self.carry_out(tokens, compute, tokens.faults(self.num_experts))

    def carry_out(
        self, tokens: RoutedTokens, compute: Compute, faults: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The same for tokens of which it is known what is wrong with them.

        Args:
            faults: [M] int64, as route_tokens takes them.
        """
        x, index, weight, meanwhile = tokens
        ranks = ExchangeGroups(self.num_ranks, self.group, self.shared_by)
        routing = route_tokens(index, faults, num_experts=self.num_experts, ranks=ranks)
        per_token, other = index.shape[1], None
        if meanwhile is None:
            rows = dispatch_tokens(x, routing, per_token=per_token, group=self.group)
        else:
            flying = send_tokens(x, routing, per_token=per_token, group=self.group)
            other = meanwhile()
            rows = receive_tokens(flying, routing)
        out = combine_results(compute(rows, routing.ends), routing, group=self.group)
        return (out.unflatten(0, index.shape) * weight[..., None].to(out.dtype)).sum(1), other


@dataclass(frozen=True)
class NodeExchange:
    """A token crosses to a node once, however many of the node's experts it has chosen.

    Its first stop there is the rank that has this rank's place in its own node. From there it goes
    on to the ranks of its experts; their weighted results are summed at the first stop, so that
    one row comes home from each node.

    Args:
        num_nodes: of as many ranks each, neighbours in the group of ep; a node's experts are those
            of its ranks.
        across: name of the group of the ranks that have this one's place, one of each node.
        inside: that of the ranks of this node.
        node: this rank's.
        shared_by: as of AllToAllExchange.

    Traffic per rank: between nodes, D elements per token and other node that holds a chosen
    expert, there and back, and k numbers and weights with each; inside a node as of
    AllToAllExchange. The same again backward.
    """

    num_experts: int
    num_nodes: int
    across: str
    inside: str
    node: int
    shared_by: str = ""
    in_node: AllToAllExchange = field(init=False, repr=False)

    def __post_init__(self) -> None:
        local = AllToAllExchange(self.num_experts // self.num_nodes, self.inside)
        object.__setattr__(self, "in_node", local)

    def __call__(self, tokens: RoutedTokens, compute: Compute) -> tuple[Tensor, Tensor | None]:
        x, index, weight, meanwhile = tokens
        each = self.num_experts // self.num_nodes
        nodes = torch.arange(self.num_nodes, device=index.device)
        # [N, nodes]: the nodes that hold a chosen expert; a choice that is not routed is on none.
        on_node = (index[:, :, None] // each == nodes).any(1)
        to_nodes = torch.where(on_node, nodes, self.num_nodes)
        routing = route_tokens(
            to_nodes,
            tokens.faults(self.num_experts),
            num_experts=self.num_nodes,
            ranks=ExchangeGroups(self.num_nodes, self.across, self.shared_by),
            refuse=False,
        )

        def bring(y: Tensor) -> Tensor:
            return dispatch_tokens(y, routing, per_token=self.num_nodes, group=self.across)

        here = bring(index) - self.node * each
        elsewhere = (here < 0) | (here >= each)
        here, shares = here.masked_fill(elsewhere, each), bring(weight).masked_fill(elsewhere, 0)
        arrived = RoutedTokens(bring(x), here, shares, meanwhile)
        # A fault is known to the ranks of its place alone: others hear of it inside their nodes.
        sums, other = self.in_node.carry_out(arrived, compute, routing.faults)
        home = combine_results(sums, routing, group=self.across)
        return home.unflatten(0, to_nodes.shape).sum(1), other

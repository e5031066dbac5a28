"""How tokens reach experts that a plan has spread over the axis ep."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp._torch.mesh import unflattened
from dtcp.distributed.groups import connect, group_name
from dtcp.experts import (
    AllToAllExchange,
    LibraryExchange,
    NodeExchange,
    RoutedTokens,
    TokenExchange,
    library_for,
)
from dtcp.experts.exchange import Compute
from dtcp.parallelize.tensor_parallel import copy_to_region, reduce_from_region

LOAD = "dtcp_load"
"""Where experts of transformers count the tokens that chose each of them, as `Experts.load`."""


@dataclass
class SpreadStyle(ParallelStyle):
    """A style that gives each rank of ep experts of its own.

    Args:
        shared_by: the axis tp, whose ranks hold the same tokens: each sends a part of them.
        ranks_per_node: neighbours on the axis that are on one machine; a token then crosses to each
            other machine once. 0: tokens travel straight to their experts.
        exchange: what carries the tokens: "all_to_all", or the library "deep_ep" or "hybrid_ep",
            which find nodes themselves; "auto" for a library where one is installed, on CUDA, and
            for tokens that it takes.
    """

    shared_by: DeviceMesh | None = None
    ranks_per_node: int = 0
    exchange: str = "auto"
    split_over: DeviceMesh | None = None

    def token_exchange(self, num_experts: int, ep: DeviceMesh) -> TokenExchange:
        """How tokens travel over the axis.

        Raises:
            ValueError: experts that ep does not divide, nodes that do not divide ep, or a library
                that is not there.
        """
        check_experts(num_experts, ep.size())
        shared_by = self.shared_by if self.split_over is None else None
        tp = "" if shared_by is None else group_name(shared_by)
        library = library_for(self.exchange, ep.device_type)
        own: TokenExchange = AllToAllExchange(num_experts, group_name(ep), tp)
        names = {group_name(ep), tp}
        if self.ranks_per_node not in (0, 1, ep.size()):
            own = across_nodes = self._across_nodes(num_experts, ep, tp)
            names |= {across_nodes.across, across_nodes.inside}
        for name in sorted(names - {""}):
            connect(name, ep.device_type)
        if not library:
            return own
        # Who names a library wants that one.
        otherwise = own if self.exchange == "auto" else None
        return LibraryExchange(library, num_experts, group_name(ep), ep.size(), tp, otherwise)

    def _across_nodes(self, num_experts: int, ep: DeviceMesh, tp: str) -> NodeExchange:
        size, each = ep.size(), self.ranks_per_node
        if each < 0 or size % each:
            raise ValueError(
                f"Ranks of ep are on nodes of equally many, got ranks_per_node={each} with "
                f"ep={size}: choose an ep that is a multiple of it, or 0."
            )
        axes = unflattened(ep, (size // each, each), ("across_nodes", "inside_node"))
        across, inside = (group_name(axes[name]) for name in ("across_nodes", "inside_node"))
        node = ep.get_local_rank() // each
        return NodeExchange(num_experts, size // each, across, inside, node, tp)


def check_experts(num_experts: int, ep: int) -> None:
    """Refuse a number of experts that the ranks of ep cannot share equally."""
    if num_experts % ep:
        raise ValueError(
            f"Ranks of ep have equally many experts, got num_experts={num_experts} with ep={ep}: "
            f"choose an ep that divides it."
        )


def with_exchange(styles: Mapping[str, ParallelStyle], exchange: str) -> dict[str, ParallelStyle]:
    """The styles of a plan's axis ep, with this exchange."""
    return {
        name: replace(style, exchange=exchange) if isinstance(style, SpreadStyle) else style
        for name, style in styles.items()
    }


def exchanged(
    exchange: TokenExchange,
    tokens: RoutedTokens,
    compute: Compute,
    *,
    real: Tensor | None,
    shared_by: DeviceMesh | None,
) -> tuple[Tensor, Tensor | None]:
    """Sum the outputs of each token's experts, wherever they are; those of padding are zeros.

    Args:
        real: [N] bool, False for padding, which is not routed; None where there is none.
        shared_by: as of SpreadStyle.
    """
    if real is not None:
        nowhere = exchange.num_experts
        tokens = tokens._replace(chosen=torch.where(real[:, None], tokens.chosen, nowhere))
    if shared_by is None:
        return exchange(tokens, compute)
    part, other = exchange(copied(tokens, shared_by), compute)
    return reduce_from_region(part, shared_by), other


def copied(tokens: RoutedTokens, mesh: DeviceMesh) -> RoutedTokens:
    """Tokens that are the same on every rank of an axis, where each rank reads them on its own."""
    x, weight = copy_to_region(tokens.x, mesh), copy_to_region(tokens.weight, mesh)
    return tokens._replace(x=x, weight=weight)

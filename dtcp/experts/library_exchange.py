"""The exchange of tokens by a library of GPU kernels: what stands at the seam of TokenExchange."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.experts.exchange import Compute, RoutedTokens, TokenExchange
from dtcp.experts.libraries import LIBRARIES
from dtcp.experts.library_op import library_combine, library_dispatch
from dtcp.experts.op import ExchangeGroups, route_tokens


@dataclass(frozen=True)
class LibraryExchange:
    """A token travels once to each rank that holds one of its experts, and one row comes back.

    Outputs of a rank's experts are weighed and summed there, and those sums at home: in another
    order than AllToAllExchange's, the same in every run. Gradients of experts' weights are sums
    over rows in the order in which they arrived; torch.use_deterministic_algorithms(True) fixes it.

    Args:
        library: "deep_ep" or "hybrid_ep".
        group, shared_by: as of AllToAllExchange.
        num_ranks: of the group.
        otherwise: what carries tokens of a dtype that the library does not take; None refuses
            them.

    Traffic per rank: D elements per token and other rank that holds a chosen expert, there and
    back, and the same again backward; the exchange of these counts; and what the library sends
    besides.
    """

    library: str
    num_experts: int
    group: str
    num_ranks: int
    shared_by: str = ""
    otherwise: TokenExchange | None = None

    def __call__(self, tokens: RoutedTokens, compute: Compute) -> tuple[Tensor, Tensor | None]:
        x, index, weight, meanwhile = tokens
        taken = LIBRARIES[self.library].dtypes
        if x.dtype not in taken:
            if self.otherwise is None:
                raise TypeError(
                    f"Tokens travel by {self.library} in {taken[0]}, got {x.dtype}: train in that "
                    f"dtype, or choose exchange='all_to_all'."
                )
            return self.otherwise(tokens, compute)
        each, n = self.num_experts // self.num_ranks, self.num_ranks
        ranks = torch.arange(n, device=index.device)
        # [N, n]: the ranks that hold a chosen expert.
        to_ranks = torch.where((index[:, :, None] // each == ranks).any(1), ranks, n)
        own, faults = ExchangeGroups(n, self.group, self.shared_by), tokens.faults(self.num_experts)
        counts = route_tokens(to_ranks, faults, num_experts=n, ranks=own).counts
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        way = counts, self.group, self.library
        rows, weighs, ends, *handle = library_dispatch(
            x, *way, index, wide, self.num_experts, self.shared_by
        )
        other = None if meanwhile is None else meanwhile()
        out = (compute(rows, ends) * weighs[:, None]).to(x.dtype)
        mixed: Tensor = library_combine(out, *way, *handle, weighs.detach(), len(x))
        return mixed, other

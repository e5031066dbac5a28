"""Which keys each rank needs from each other rank: data, known before anything moves.

Step s of n pairs every rank r with the ranks s places away: r receives from r - s and sends to
r + s. What rank r needs from a shard is the union of its queries' intervals over the shard's
tokens, so a sliding window needs its halo, packed documents need the parts of documents that
cross shards, and a causal mask needs nothing that lies ahead. No strategy has a rule of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.kernels.softmax.block_ranges import check_intervals
from dtcp.sequence.arguments import check_rank
from dtcp.sequence.layout import SequenceLayout


@dataclass(frozen=True)
class RequiredKeys:
    """The keys that cross between this rank and the others, step by step."""

    send_slots: list[Tensor]  # n of [<= L], local slots, ascending; step 0 is empty
    receive_tokens: list[Tensor]  # n of [<= L], token indices, ascending; step 0: this rank's own

    @property
    def received_tokens(self) -> int:
        return sum(x.numel() for x in self.receive_tokens[1:])


def required_keys(
    layout: SequenceLayout, rank: int, first_key: Tensor, last_key: Tensor
) -> RequiredKeys:
    """Work out what this rank sends and receives; every rank finds its side of the same pairs.

    Args:
        first_key, last_key: [B, S] in token order, the whole row's.
    """
    requested = keys_requested_by(layout, rank, first_key, last_key)  # [n, L] bool
    n = layout.num_shards
    held = [layout.token_indices(r) for r in range(n)]
    mine = held[rank]
    wanted = _union(first_key[:, mine], last_key[:, mine], layout.seq_len)  # [S] bool
    receive, send = [mine], [mine[:0]]
    for step in range(1, n):
        theirs = held[(rank - step) % n]
        receive.append(theirs[wanted[theirs]])
        send.append(requested[(rank + step) % n].nonzero().flatten())
    return RequiredKeys(send, receive)


def keys_requested_by(
    layout: SequenceLayout, rank: int, first_key: Tensor, last_key: Tensor
) -> Tensor:
    """Which of this rank's keys each rank needs: [n, L] bool, by local slot.

    All queries' intervals are cut down to this shard's tokens, so the work is O(S log L).
    """
    _check(layout, rank, first_key, last_key)
    n, length = layout.num_shards, layout.shard_len
    mine = layout.token_indices(rank)  # ascending
    owner = torch.empty(layout.seq_len, dtype=torch.int64)
    owner[layout.permutation()] = torch.arange(n).repeat_interleave(length)
    first, last = (x.to(torch.int64).contiguous() for x in (first_key, last_key))
    start = torch.searchsorted(mine, first)
    stop = torch.searchsorted(mine, last, right=True)
    some = start < stop
    row = owner.expand_as(first)[some] * (length + 1)
    edges = torch.zeros(n * (length + 1), dtype=torch.int64)
    ones = torch.ones_like(row)
    edges.index_add_(0, row + start[some], ones)
    edges.index_add_(0, row + stop[some], -ones)
    return edges.view(n, length + 1)[:, :-1].cumsum(1) > 0


def _check(layout: SequenceLayout, rank: int, first_key: Tensor, last_key: Tensor) -> None:
    """Refuse intervals that are not of the layout's whole rows."""
    check_rank(type(layout).__name__, rank, layout.num_shards)
    check_intervals(first_key, last_key)
    if (
        first_key.shape[1] != layout.seq_len
        or not first_key.shape[0]
        or int(first_key.amin()) < 0
        or int(last_key.amax()) >= layout.seq_len
    ):
        raise ValueError(
            f"The intervals of a mask are those of whole rows, got first_key.shape="
            f"{tuple(first_key.shape)} with {layout}: take them from Mask.intervals of the "
            f"batch's coords."
        )


def _union(first: Tensor, last: Tensor, seq_len: int) -> Tensor:
    """Which tokens lie inside any of the intervals: [S] bool."""
    some = last >= first
    edges = torch.zeros(seq_len + 1, dtype=torch.int64)
    first, last = first[some].to(torch.int64), last[some].to(torch.int64)
    edges.index_add_(0, first, torch.ones_like(first))
    edges.index_add_(0, last + 1, -torch.ones_like(last))
    return edges[:-1].cumsum(0) > 0

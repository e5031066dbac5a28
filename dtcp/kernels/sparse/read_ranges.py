"""Which keys and entries each query reads, and which queries read each of them, as runs.

A rank's queries are in ascending order and documents follow one another, so both relations are
one run per row: [start, stop). They are worked out on the host once per batch. A kernel that
walks along runs needs a mask only at their ends.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dtcp.sequence.partition import Run

BEYOND = torch.iinfo(torch.int64).max


def key_runs(
    window_first: Tensor, last: Tensor, segments: Sequence[Run], left: int
) -> tuple[Tensor, Tensor]:
    """The keys that each query reads, and the queries that read each key.

    Args:
        window_first, last: [B, L], the token indices that a query sees; last is -1 for padding.
        segments: runs of token indices, those of the rank's queries.
        left: keys that precede each segment's own.
    Returns:
        Runs of keys [B, L, 2], and runs of queries [B, K, 2].
    """
    runs, readers, key, query = [], [], 0, 0
    for start, stop in segments:
        length = stop - start
        mine = slice(query, query + length)
        # Padding ends a row, and its queries read no key.
        first = window_first[:, mine].masked_fill(last[:, mine] < 0, BEYOND).contiguous()
        own = torch.arange(key + left, key + left + length)
        begin = own - torch.arange(start, stop) + window_first[:, mine]
        runs.append(_runs(begin, (own + 1).expand_as(begin).where(last[:, mine] >= 0, 0)))
        token_index = torch.arange(start - left, stop).expand(len(first), -1).contiguous()
        end = torch.searchsorted(first, token_index, right=True)
        readers.append(_runs(query + (token_index - start).clamp(min=0), query + end))
        key, query = key + left + length, query + length
    return torch.cat(runs, dim=1), torch.cat(readers, dim=1)


def entry_runs(
    first: Tensor, last: Tensor, closing: Tensor, segments: Sequence[Run]
) -> tuple[Tensor, Tensor]:
    """The entries that each query sees, and the queries that see each entry.

    A run of entries may contain places that hold none: the last places of a segment.

    Args:
        first, last: [B, L], the token indices that a query's entries close at.
        closing: [B, P], token indices of the entries' last tokens, ascending; NOWHERE in places
            that hold no entry.
        segments: runs of token indices, those of the rank's queries.
    Returns:
        Runs of entries [B, L, 2], and runs of queries [B, P, 2].
    """
    token_index = torch.cat([torch.arange(*run) for run in segments]).expand_as(last).contiguous()
    first = first.masked_fill(last < 0, BEYOND).contiguous()
    begin = torch.searchsorted(token_index, closing.contiguous())
    readers = _runs(begin, torch.searchsorted(first, closing.contiguous(), right=True))
    runs = [_row_entry_runs(*row) for row in zip(first, last, closing, readers, strict=True)]
    return torch.stack(runs), readers


def _row_entry_runs(first: Tensor, last: Tensor, closing: Tensor, readers: Tensor) -> Tensor:
    """The runs of entries that the queries of one row see: [L, 2]."""
    places = (readers[:, 0] < readers[:, 1]).nonzero().flatten()
    closing = closing[places].contiguous()
    low, high = torch.searchsorted(closing, first), torch.searchsorted(closing, last, right=True)
    places = torch.cat((places, torch.zeros(1, dtype=torch.int64)))
    none = high <= low
    return _runs(places[low].where(~none, 0), (places[high - 1] + 1).where(~none, 0))


def _runs(start: Tensor, stop: Tensor) -> Tensor:
    """[..., 2] of start and stop, both 0 where the run is empty."""
    runs = torch.stack((start.expand_as(stop), stop), dim=-1)
    return runs.masked_fill((start >= stop)[..., None], 0)

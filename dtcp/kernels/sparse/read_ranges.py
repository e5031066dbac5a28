"""Which keys and entries each query reads, and which queries read each of them, as runs.

Queries of a rank stand in the order of their positions and documents follow one another, so both
ways round it is one run of places. Worked out on the host, once a batch: a kernel that walks
along runs needs no mask but at their ends.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dtcp.sequence.layout import Run

BEYOND = torch.iinfo(torch.int64).max


def key_runs(
    window_first: Tensor, last: Tensor, segments: Sequence[Run], left: int
) -> tuple[Tensor, Tensor]:
    """Runs of keys that queries read, [B, L, 2], and of queries that read keys, [B, K, 2].

    Args:
        window_first, last: [B, L], the positions that a query sees; last is -1 for padding.
        segments: positions of the rank's queries.
        left: keys before each segment's own.
    """
    runs, readers, key, query = [], [], 0, 0
    for start, stop in segments:
        length = stop - start
        mine = slice(query, query + length)
        # Padding ends a row, and no window of it begins at any key.
        first = window_first[:, mine].masked_fill(last[:, mine] < 0, BEYOND).contiguous()
        own = torch.arange(key + left, key + left + length)
        begin = own - torch.arange(start, stop) + window_first[:, mine]
        runs.append(_runs(begin, (own + 1).expand_as(begin).where(last[:, mine] >= 0, 0)))
        position = torch.arange(start - left, stop).expand(len(first), -1).contiguous()
        end = torch.searchsorted(first, position, right=True)
        readers.append(_runs(query + (position - start).clamp(min=0), query + end))
        key, query = key + left + length, query + length
    return torch.cat(runs, dim=1), torch.cat(readers, dim=1)


def entry_runs(
    first: Tensor, last: Tensor, closing: Tensor, segments: Sequence[Run]
) -> tuple[Tensor, Tensor]:
    """The same of entries: [B, L, 2] and [B, P, 2].

    Within a run of entries there may be places that hold none: a segment's last ones.

    Args:
        closing: [B, P], positions of their last tokens, ascending but for the places of none,
            which lie beyond all positions.
    """
    position = torch.cat([torch.arange(*run) for run in segments]).expand_as(last).contiguous()
    first = first.masked_fill(last < 0, BEYOND).contiguous()
    begin = torch.searchsorted(position, closing.contiguous())
    readers = _runs(begin, torch.searchsorted(first, closing.contiguous(), right=True))
    runs = [_entries_seen(*row) for row in zip(first, last, closing, readers, strict=True)]
    return torch.stack(runs), readers


def _entries_seen(first: Tensor, last: Tensor, closing: Tensor, readers: Tensor) -> Tensor:
    """The runs of entries that one row's queries see: [L, 2]."""
    places = (readers[:, 0] < readers[:, 1]).nonzero().flatten()
    at = closing[places].contiguous()
    low, high = torch.searchsorted(at, first), torch.searchsorted(at, last, right=True)
    places = torch.cat((places, torch.zeros(1, dtype=torch.int64)))
    none = high <= low
    return _runs(places[low].where(~none, 0), (places[high - 1] + 1).where(~none, 0))


def _runs(start: Tensor, stop: Tensor) -> Tensor:
    """From and up to, both 0 where there is nothing between them."""
    runs = torch.stack((start.expand_as(stop), stop), dim=-1)
    return runs.masked_fill((start >= stop)[..., None], 0)

"""The indexer: which entries each query reads, found tile by tile with a running selection."""

from collections.abc import Iterator
from math import inf

import torch
from torch import Tensor

from dtcp.distributed.ledger import LEDGER
from dtcp.kernels.dtypes import accumulation

NONE = -1
"""In a selection: no entry."""
SCORES = 2**24
"""Numbers a tile of scores may have before heads are summed: 64 MiB in fp32."""


@torch.library.custom_op("dtcp::select_entries", mutates_args=())
def select_entries(
    q: Tensor,
    weight: Tensor,
    keys: Tensor,
    first: Tensor,
    last: Tensor,
    closing: Tensor,
    tiles: Tensor,
    num_selected: int,
) -> Tensor:
    """Pick the entries of the highest scores, sum_h weight_h * relu(q_h . key), of those seen.

    Of equal scores the earlier entry wins, so that the selection depends on nothing but scores.
    Has no gradient.

    Args:
        q: [B, L, H, D].
        weight: [B, L, H].
        keys: [B, P, D], in the order of their positions.
        first, last: [B, L] int32, where each query's document starts and the query stands.
        closing: [B, P] int32, position of each entry's last token.
        tiles: [B, tiles, 6] int64 on the host, see dtcp.sparse.mixer.
    Returns:
        [B, L, num_selected] int32, ascending places among the entries, then -1.
    """
    LEDGER.record("dtcp::select_entries")
    out = q.new_full((*q.shape[:2], num_selected), NONE, dtype=torch.int32)
    for row, spans in enumerate(tiles.tolist()):
        for start, stop, _, _, low, high in spans:
            seen = (first[row, start:stop], last[row, start:stop], closing[row])
            if high - low <= num_selected:
                out[row, start:stop, : high - low] = _all_seen(*seen, low, high)
                continue
            here = (q[row, start:stop], weight[row, start:stop], keys[row])
            out[row, start:stop] = _select(*here, *seen, low, high, num_selected)
    return out


@select_entries.register_fake
def _(
    q: Tensor,
    weight: Tensor,
    keys: Tensor,
    first: Tensor,
    last: Tensor,
    closing: Tensor,
    tiles: Tensor,
    num_selected: int,
) -> Tensor:
    return q.new_empty((*q.shape[:2], num_selected), dtype=torch.int32)


def sees(first: Tensor, last: Tensor, closing: Tensor) -> Tensor:
    """Whether a query sees an entry: its last token is in the document and not ahead: [Q, P]."""
    return (closing >= first[:, None]) & (closing <= last[:, None])


def _all_seen(first: Tensor, last: Tensor, closing: Tensor, low: int, high: int) -> Tensor:
    """Where no more entries are in sight than may be selected, no score is needed."""
    seen = sees(first, last, closing[low:high])
    place = torch.arange(low, high, dtype=torch.int32, device=closing.device)
    return _compact(place.expand_as(seen), seen, high - low, fill=NONE)


def _select(
    q: Tensor,
    weight: Tensor,
    keys: Tensor,
    first: Tensor,
    last: Tensor,
    closing: Tensor,
    low: int,
    high: int,
    num_selected: int,
) -> Tensor:
    """The selection of one tile of queries [Q, H, D] among the entries from low up to high."""
    queries, heads, _ = q.shape
    best = q.new_full((queries, num_selected), -inf, dtype=accumulation(q.dtype))
    place = q.new_full((queries, num_selected), NONE, dtype=torch.int32)
    q, weight = q.to(best.dtype), weight.to(best.dtype)
    for start, stop in _steps(low, high, max(1, SCORES // (queries * heads))):
        scores = (q.flatten(0, 1) @ keys[start:stop].to(best.dtype).mT).relu_()
        score = torch.einsum("qhp,qh->qp", scores.unflatten(0, (queries, heads)), weight)
        score = score.masked_fill(~sees(first, last, closing[start:stop]), -inf)
        places = torch.arange(start, stop, dtype=torch.int32, device=q.device)
        best, place = _best(
            torch.cat((best, score), dim=1),
            torch.cat((place, places.expand(queries, -1)), dim=1),
            num_selected,
        )
    chosen = best > -inf
    return _compact(place, chosen, num_selected, fill=NONE)


def _best(score: Tensor, place: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row, in the order given; of equal ones the first."""
    least = score.topk(number, dim=1).values[:, -1:]
    above, equal = score > least, score == least
    room = number - above.sum(1, keepdim=True)
    keep = above | (equal & (equal.cumsum(1) <= room))
    return _compact(score, keep, number, fill=-inf), _compact(place, keep, number, fill=NONE)


def _compact(x: Tensor, keep: Tensor, length: int, *, fill: float) -> Tensor:
    """Move what is kept of each row to its start, in order. No host sync, as a mask would."""
    slot = torch.where(keep, keep.cumsum(1) - 1, length)
    out = x.new_full((x.shape[0], length + 1), fill)
    return out.scatter_(1, slot, x)[:, :length]


def _steps(low: int, high: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(low, high, step):
        yield start, min(start + step, high)

"""Who sends which slots to whom: worked out on the host, before anything moves.

Every rank holds some tokens of a sequence and wants some, both known as runs. What it sends and
where it puts what it receives follow, so the exchange itself needs no negotiation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.sequence.arguments import check_ints, check_rank
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.partition import Run

Hop = tuple[int, int, int]
"""A rank, and the slots from start up to stop that go to it or come from it."""


@dataclass(frozen=True)
class Route:
    """One rank's part of an exchange of tokens.

    Sender and receiver list what passes between them in the same order, so tokens travel without
    labels. A slot may be sent more than once; a slot that nothing is received for is zero.
    """

    send: tuple[Hop, ...]
    """Ranks ascending; slots of what this rank holds."""
    receive: tuple[Hop, ...]
    """Ranks ascending; slots of what this rank wants."""
    wanted_len: int

    @classmethod
    def between(
        cls, held: Sequence[Sequence[Run]], wanted: Sequence[Sequence[Run]], rank: int
    ) -> "Route":
        """Bring each rank the tokens it wants from the ranks that hold them.

        Args:
            held, wanted: the runs of every rank, in slot order. One rank holds a token; slots of
                wanted tokens that no rank holds stay zero.
        """
        if not isinstance(wanted, Sequence) or len(held) != len(wanted):
            raise ValueError(
                f"A route is between the ranks of one axis, got held={held}, wanted={wanted}: give "
                f"the runs of every rank in both."
            )
        check_rank("A route", rank, len(held))
        peers = range(len(held))
        return cls(
            send=tuple(
                (peer, slot, slot + length)
                for peer in peers
                for _, slot, length in _overlaps(wanted[peer], held[rank])
            ),
            receive=tuple(
                (peer, slot, slot + length)
                for peer in peers
                for slot, _, length in _overlaps(wanted[rank], held[peer])
            ),
            wanted_len=sum(stop - start for start, stop in wanted[rank]),
        )


def halo_runs(layout: SequenceLayout, rank: int, *, left: int, right: int) -> list[Run]:
    """Tokens next to each of the rank's segments: its left ones, then its right ones.

    Indices below 0 or from S on lie outside of the sequence.
    """
    check_ints("A halo", least=0, left=left, right=right)
    runs: list[Run] = []
    for start, stop in layout.segments(rank):
        runs += [(start - left, start), (stop, stop + right)]
    return runs


def halo_token_indices(layout: SequenceLayout, rank: int, *, left: int, right: int) -> Tensor:
    """Index of each token that `collectives.halo` returns, -1 where there is none.

    Returns:
        [segments * (left + right)], int64.
    """
    runs = halo_runs(layout, rank, left=left, right=right)
    index = torch.cat([torch.arange(*run, device="cpu") for run in runs])
    return torch.where((index >= 0) & (index < layout.seq_len), index, -1)


def rolled(runs: Sequence[Run], shift: int, seq_len: int) -> list[Run]:
    """The tokens `shift` before those of the runs; before the first comes the last."""
    check_ints("A roll of the tokens of a row", least=1, seq_len=seq_len)
    check_ints("A roll of the tokens of a row", shift=shift)
    cut: list[Run] = []
    for start, stop in runs:
        first = (start - shift) % seq_len
        last = first + stop - start
        cut += [(first, min(last, seq_len)), (0, max(last - seq_len, 0))]
    return [(first, last) for first, last in cut if first < last]


def _overlaps(wanted: Sequence[Run], held: Sequence[Run]) -> list[tuple[int, int, int]]:
    """Where wanted runs meet held ones: slot among the wanted, slot among the held, length."""
    overlaps = []
    wanted_slot = 0
    for first, last in wanted:
        held_slot = 0
        for start, stop in held:
            low, high = max(first, start), min(last, stop)
            if low < high:
                overlaps.append((wanted_slot + low - first, held_slot + low - start, high - low))
            held_slot += stop - start
        wanted_slot += last - first
    return overlaps

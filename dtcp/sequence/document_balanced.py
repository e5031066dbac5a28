"""A layout of packed documents in which every rank has L tokens and the mean of the work.

Let rho be the work of a row per token. Tokens that cost more are heavy, the others light; under a
causal mask a document is light down to depth rho and heavy below. Line up all heavy tokens, longest
document first and each from its end, and all light ones, shortest document first and each from its
start. A rank gets one stretch of each line. Let G(u) be the work of the first u heavy tokens and
F(v) that of the first v light ones. The ranks before rank r have L tokens each and the mean of the
work where u heavy ones are among theirs, with

    G(u) + F(r L - u) = r L rho.

There is such a u: r L heavy tokens cost at least r L rho, r L light ones at most that, and where
either line is too short, the same holds of what is left of the other. There is one u_r: a heavy
token more for a light one less never lowers the left side. And u_r <= u_(r+1) <= u_r + L: L light
tokens more add at most L rho to the left side, L heavy ones at least that. Tokens are whole, so a
rank has the mean to within the work of one token.

The same lines with short documents left whole, each in the line that its own mean belongs to, have
no such proof: where the boundaries come out right, they are as good, and fewer keys travel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout, check_divides, shared_lengths
from dtcp.sequence.mask_work import MaskWork, WorkRuns
from dtcp.sequence.masks import Causal
from dtcp.sequence.partition import (
    Ints,
    Partition,
    Run,
    differs,
    joined_runs,
    stops_of,
    sums_before,
    unique_ascending,
)


@dataclass(frozen=True)
class DocumentBalanced(SequenceLayout):
    """Give every rank as many tokens, and as much work to within a token's, in few pieces.

    Where a document goes is decided by its length alone: each rank has one stretch of the tokens
    that cost more than the mean and one of those that cost less. A single document under a causal
    mask is cut head-tail.

        lengths=(3, 9), n=2        rank 0: 0 1 2 9 10 11        rank 1: 3 4 5 6 7 8

    Attributes:
        starts: the token index at which each piece starts, ascending from 0.
        owners: the rank of each piece.
    """

    reads_documents = True

    starts: tuple[int, ...] = field(repr=False)
    owners: tuple[int, ...] = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths, owners = np.diff([*self.starts, self.seq_len]), np.array(self.owners)
        known = len(lengths) == len(owners) and self.starts[:1] == (0,) and (lengths > 0).all()
        known = known and ((owners >= 0) & (owners < self.num_shards)).all()
        held = np.bincount(owners, lengths, self.num_shards).tolist() if known else []
        if held != [self.shard_len] * self.num_shards:
            raise ValueError(
                f"DocumentBalanced gives every rank {self.shard_len} tokens, in pieces that "
                f"follow each other from token 0, got {len(self.starts)} starts and "
                f"{len(self.owners)} owners, tokens={held[:8]}: let for_batch choose the pieces."
            )

    def runs(self, rank: int) -> list[Run]:
        # Not from the partition: dynamo traces this, and arrays would be tensors to it.
        self._check_rank(rank)
        stops = (*self.starts[1:], self.seq_len)
        runs = zip(self.starts, stops, self.owners, strict=True)
        return joined_runs([(start, stop) for start, stop, owner in runs if owner == rank])

    @cached_property
    def partition(self) -> Partition:
        return Partition.ascending(np.array(self.starts), np.array(self.owners), self.seq_len)

    @classmethod
    def for_batch(
        cls, documents: Documents, num_shards: int, *, work: Callable[[], Tensor] | None = None
    ) -> Self:
        """Balance `work`, or that of a causal mask inside each document."""
        lengths = shared_lengths(cls, documents)
        check_divides(cls, documents.seq_len, num_shards, num_shards)
        if work is None:
            work = MaskWork(((Causal(), 1),), Coords.of(documents))
        runs = work.runs(0) if isinstance(work, MaskWork) else WorkRuns.of_tokens(work())
        starts, owners = best_pieces(runs, lengths, num_shards)
        return cls(documents.seq_len, num_shards, tuple(starts.tolist()), tuple(owners.tolist()))


class _Line(NamedTuple):
    """Tokens lined up, in stretches of neighbours. Each field [P]."""

    start: Ints
    stop: Ints
    work: Ints  # of the token of each stretch that is lined up first
    step: Ints  # from each token to the one lined up next

    def taken(self, order: Ints) -> "_Line":
        return _Line(*(x[order] for x in self))

    def turned(self) -> "_Line":
        """Each stretch from its last token."""
        last = self.work + self.step * (self.stop - self.start - 1)
        return self._replace(work=last, step=-self.step)

    @property
    def places(self) -> Ints:
        """Tokens before each stretch, and all of them: [P + 1]."""
        return sums_before(self.stop - self.start)

    def all_work(self) -> Ints:
        """Of each stretch."""
        length = self.stop - self.start
        return length * self.work + self.step * (length * (length - 1) // 2)

    def work_of_first(self) -> Callable[[Ints], Ints]:
        """From a number of tokens to the work of so many, the first ones."""
        places, before = self.places, sums_before(self.all_work())
        # One stretch of nothing at the end, so that every number of tokens has a stretch.
        twice = np.zeros((2, len(places)), dtype=np.int64)
        # Of n tokens of a stretch: n * work + step * n * (n - 1) / 2.
        np.multiply(2, self.work, out=twice[0, :-1])
        twice[0, :-1] -= self.step
        twice[1, :-1] = self.step
        linear, square = twice

        def total(tokens: Ints) -> Ints:
            stretch = places.searchsorted(tokens, side="right") - 1
            some = tokens - places[stretch]
            out: Ints = before[stretch] + some * (linear[stretch] + square[stretch] * some) // 2
            return out

        return total


def best_pieces(work: WorkRuns, lengths: tuple[int, ...], num_shards: int) -> tuple[Ints, Ints]:
    """Where pieces start, from left to right, and the rank of each, with the fewest keys to bring.

    To leave short documents whole saves keys where many have about one length, and costs nothing:
    of several lengths up to which they are left whole, those count that keep every rank's work.

    Args:
        work: of the row's tokens.
        lengths: of its documents; padding follows them.
    """
    seq_len, bounds = int(work.stop[-1]), sums_before(np.array(lengths, dtype=np.int64))
    row = RowOfDocuments.of(work, lengths, num_shards)
    cut = row.length[1:][row.document[1:] == row.document[:-1]]
    shard_len, before, wholes = seq_len // num_shards, 0, [0]
    for whole in (shard_len // 4, shard_len // 2, shard_len, 2 * shard_len, 4 * shard_len):
        if (kept := int((cut <= whole).sum())) > before:
            wholes.append(whole)
        before = kept
    found = [pieces for pieces in row.pieces_of_each(wholes) if pieces is not None]
    # The first of equal ones: what leaves no document whole is always among them.
    return min(found, key=lambda pieces: _brought(pieces[0], pieces[1], bounds, seq_len))


class RowOfDocuments(NamedTuple):
    """A row to deal out, from left to right; documents cut where tokens cost the mean."""

    tokens: _Line
    document: Ints  # [P]
    length: Ints  # [P], of the document; 0 of padding
    total: int  # work
    num_shards: int

    @classmethod
    def of(cls, work: WorkRuns, lengths: tuple[int, ...], num_shards: int) -> "RowOfDocuments":
        of_documents = np.array([*lengths, 0])
        bounds = sums_before(of_documents[:-1])
        tokens = _cut(work, bounds, work.total // int(work.stop[-1]))
        document = bounds.searchsorted(tokens.start, side="right") - 1
        return cls(tokens, document, of_documents[document], work.total, num_shards)

    def pieces(self, whole: int) -> tuple[Ints, Ints] | None:
        """`pieces_of_each` of one length."""
        return self.pieces_of_each([whole])[0]

    def pieces_of_each(self, wholes: Sequence[int]) -> list[tuple[Ints, Ints] | None]:
        """One stretch of each line for each rank: where its pieces start, and whose they are.

        Args:
            wholes: documents of so many tokens or fewer stand in one line as they are.
        Returns:
            of each, None where so many whole documents leave no stretches of the mean work.
        """
        tokens, document, length = self.tokens, self.document, self.length
        longest_first = np.lexsort((-tokens.start, document, -length))
        shortest_first = np.lexsort((tokens.start, document, length))
        heavy = [self._is_heavy(whole) for whole in wholes]
        lines = (
            [tokens.taken(longest_first[x[longest_first]]).turned() for x in heavy],
            [tokens.taken(shortest_first[~x[shortest_first]]) for x in heavy],
        )
        before, done = _heavy_before(*lines, self.total, self.num_shards)
        seq_len, n = int(tokens.stop[-1]), self.num_shards
        rest = np.arange(n + 1) * (seq_len // n) - before
        forward = (before[:, 1:] >= before[:, :-1]) & (rest[:, 1:] >= rest[:, :-1])
        ends = tokens.work, tokens.turned().work
        most = max(1, *(int(x.max(initial=0)) for x in ends))
        # To within the work of one token.
        even = np.abs((done[:, 1:] - done[:, :-1]) * n - self.total) < most * n
        return [
            _dealt(heavy, of_heavy, light, of_light) if good else None
            for heavy, light, of_heavy, of_light, good in zip(
                *lines, before, rest, (forward & even).all(1), strict=True
            )
        ]

    def _is_heavy(self, whole: int) -> NDArray[np.bool_]:
        """Which stretches stand in the line of heavy ones: [P]."""
        tokens, seq_len = self.tokens, int(self.tokens.stop[-1])
        heavy: NDArray[np.bool_] = tokens.work > self.total // seq_len
        if not whole:
            return heavy
        # Of a whole document, what counts is its own mean.
        work = np.bincount(self.document, tokens.all_work()) * seq_len
        length = np.bincount(self.document, tokens.stop - tokens.start)
        dear = work > length * float(self.total)
        return np.where(self.length <= whole, dear[self.document], heavy)


def _brought(start: Ints, owner: Ints, bounds: Ints, seq_len: int) -> int:
    """Tokens that ranks need of others under a causal mask: what lies before their last tokens."""
    first = unique_ascending(np.concatenate((start, bounds[:-1])))
    stop = stops_of(first, seq_len)
    of = owner[start.searchsorted(first, side="right") - 1]
    document = bounds.searchsorted(first, side="right") - 1
    real = document < len(bounds) - 1
    first, stop, of, document = (x[real] for x in (first, stop, of, document))
    if not len(first):
        return 0
    order = np.lexsort((first, document, of))
    first, stop, of, document = (x[order] for x in (first, stop, of, document))
    new = differs(of) | differs(document)
    last = np.roll(new, -1)
    return int((stop - bounds[document])[last].sum() - (stop - first).sum())


def _cut(work: WorkRuns, bounds: Ints, mean: int) -> _Line:
    """The row in stretches of one document each, whose tokens all cost more than the mean, or none.

    A token costs a whole number, so it costs more than the mean if it does more than the floor.
    """
    growing, falling = work.step > 0, work.step < 0
    size = np.where(work.step == 0, 1, np.abs(work.step))
    crossing = np.where(growing, (mean - work.work) // size + 1, 0)
    crossing = np.where(falling, -((mean - work.work) // size), crossing)
    inside = (crossing > 0) & (crossing < work.stop - work.start)
    cuts = (work.start, bounds[bounds < work.stop[-1]], (work.start + crossing)[inside])
    start: Ints = unique_ascending(np.concatenate(cuts))
    run = work.start.searchsorted(start, side="right") - 1
    first = work.work[run] + work.step[run] * (start - work.start[run])
    return _Line(start, stops_of(start, int(work.stop[-1])), first, work.step[run])


def _heavy_before(
    heavy: Sequence[_Line], light: Sequence[_Line], total: int, num_shards: int
) -> tuple[Ints, Ints]:
    """Heavy tokens before each rank, and all of them, and the work before it: two [V, n + 1].

    For V pairs of lines of as many tokens at once, in quarters: a step costs calls, not numbers.
    """
    # All lines as one, so that a step of the bisection is one look at it.
    pairs = list(zip(heavy, light, strict=True))
    lines = [line for pair in pairs for line in pair]
    work_of_first = _Line(*map(np.concatenate, zip(*lines, strict=True))).work_of_first()
    counts = np.array([[int((x.stop - x.start).sum()) for x in pair] for pair in pairs])
    first = sums_before(counts.flatten())
    of_heavy, of_light = counts[:, :1], counts[:, 1:]
    # Where the heavy line starts and the light one does, among all tokens.
    starts = first[:-1].reshape(-1, 2, 1)
    tokens = np.arange(num_shards + 1) * (int(counts[0].sum()) // num_shards)
    enough = np.array([-(-rank * total // num_shards) for rank in range(num_shards + 1)])
    offset = work_of_first(starts).sum(-2)

    def work_before(of_heavy: Ints) -> Ints:
        both = np.stack((of_heavy, tokens - of_heavy), axis=-2) + starts
        work: Ints = work_of_first(both).sum(-2) - offset
        return work

    low, high = np.maximum(0, tokens - of_light), np.minimum(tokens, of_heavy)
    quarters = np.arange(1, 4).reshape(-1, 1, 1)
    while bool((low < high).any()):
        inner = low + (high - low) * quarters // 4
        reached = work_before(inner) >= enough
        ends = np.concatenate((low[None], np.where(reached, 0, inner + 1)))
        low, high = ends.max(0), np.where(reached, inner, high).min(0)
    return low, work_before(low)


def _dealt(heavy: _Line, of_heavy: Ints, light: _Line, of_light: Ints) -> tuple[Ints, Ints]:
    """Starts and ranks of all pieces, from left to right, neighbours of one rank joined.

    Args:
        of_heavy, of_light: how many tokens of each line lie before each rank's, and all of them.
    """
    dealt = (_dealt_line(heavy, of_heavy, turned=True), _dealt_line(light, of_light, turned=False))
    start, owner = (np.concatenate(x) for x in zip(*dealt, strict=True))
    order = start.argsort()
    start, owner = start[order], owner[order]
    new = differs(owner)
    return start[new], owner[new]


def _dealt_line(line: _Line, before: Ints, *, turned: bool) -> tuple[Ints, Ints]:
    """Starts and ranks of the pieces of a line, before[r] tokens of which lie before rank r's."""
    places = line.places
    cuts = unique_ascending(np.concatenate((places, before)))
    first, last = cuts[:-1], cuts[1:]
    stretch = places.searchsorted(first, side="right") - 1
    rank = before.searchsorted(first, side="right") - 1
    if turned:
        return line.stop[stretch] - (last - places[stretch]), rank
    return line.start[stretch] + (first - places[stretch]), rank

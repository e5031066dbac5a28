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

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
from torch import Tensor

from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.interval_runs import Ints, MaskWork, WorkRuns
from dtcp.sequence.layout import SequenceLayout, check_divides, shared_lengths
from dtcp.sequence.masks import Causal
from dtcp.sequence.partition import Partition, Run, joined_runs, unique_ascending


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
        return np.append(0, np.cumsum(self.stop - self.start))

    def all_work(self) -> Ints:
        """Of each stretch."""
        length = self.stop - self.start
        return length * self.work + self.step * (length * (length - 1) // 2)

    def work_of_first(self) -> Callable[[Ints], Ints]:
        """From a number of tokens to the work of so many, the first ones."""
        places, before = self.places, np.append(0, np.cumsum(self.all_work()))
        # One stretch of nothing at the end, so that every number of tokens has a stretch.
        work, step = np.append(self.work, 0), np.append(self.step, 0)

        def total(tokens: Ints) -> Ints:
            stretch = np.searchsorted(places, tokens, side="right") - 1
            some = tokens - places[stretch]
            out: Ints = before[stretch] + some * work[stretch]
            return out + step[stretch] * (some * (some - 1) // 2)

        return total


def best_pieces(work: WorkRuns, lengths: tuple[int, ...], num_shards: int) -> tuple[Ints, Ints]:
    """Where pieces start, from left to right, and the rank of each, with the fewest keys to bring.

    To leave short documents whole saves keys where many have about one length, and costs nothing:
    of several lengths up to which they are left whole, those count that keep every rank's work.

    Args:
        work: of the row's tokens.
        lengths: of its documents; padding follows them.
    """
    seq_len, bounds = int(work.stop[-1]), np.cumsum([0, *lengths])
    row = RowOfDocuments.of(work, lengths, num_shards)
    pieces = row.pieces(0)
    assert pieces is not None
    fewest, shard_len = _brought(*pieces, bounds, seq_len), seq_len // num_shards
    cut = row.length[1:][row.document[1:] == row.document[:-1]]
    before = 0
    for whole in (shard_len // 4, shard_len // 2, shard_len, 2 * shard_len, 4 * shard_len):
        kept = int((cut <= whole).sum())
        found = row.pieces(whole) if kept > before else None
        before = kept
        if found is not None and (brought := _brought(*found, bounds, seq_len)) < fewest:
            pieces, fewest = found, brought
    return pieces


class RowOfDocuments(NamedTuple):
    """A row to deal out, from left to right; documents cut where tokens cost the mean."""

    tokens: _Line
    document: Ints  # [P]
    length: Ints  # [P], of the document; 0 of padding
    total: int  # work
    num_shards: int

    @classmethod
    def of(cls, work: WorkRuns, lengths: tuple[int, ...], num_shards: int) -> "RowOfDocuments":
        bounds = np.cumsum([0, *lengths])
        tokens = _cut(work, bounds, work.total // int(work.stop[-1]))
        document = np.searchsorted(bounds, tokens.start, side="right") - 1
        return cls(tokens, document, np.array([*lengths, 0])[document], work.total, num_shards)

    def pieces(self, whole: int) -> tuple[Ints, Ints] | None:
        """One stretch of each line for each rank: where its pieces start, and whose they are.

        Args:
            whole: documents of so many tokens or fewer stand in one line as they are.
        Returns:
            None where so many whole documents leave no stretches of the mean work.
        """
        tokens, seq_len = self.tokens, int(self.tokens.stop[-1])
        heavy = tokens.work > self.total // seq_len
        length = tokens.stop - tokens.start
        # Of a whole document, what counts is its own mean.
        work = np.bincount(self.document, tokens.all_work()) * seq_len
        dear = work > np.bincount(self.document, length) * float(self.total)
        heavy = np.where(self.length <= whole, dear[self.document], heavy)
        order = np.lexsort((-tokens.start, self.document, -self.length))
        heavy_line = tokens.taken(order[heavy[order]]).turned()
        order = np.lexsort((tokens.start, self.document, self.length))
        light_line = tokens.taken(order[~heavy[order]])
        before = _heavy_before(heavy_line, light_line, self.total, self.num_shards)
        rest = np.arange(self.num_shards + 1) * (seq_len // self.num_shards) - before
        if not _is_balanced(heavy_line, light_line, before, rest, self.total):
            return None
        dealt = (_dealt(heavy_line, before, turned=True), _dealt(light_line, rest, turned=False))
        start, owner = (np.concatenate(x) for x in zip(*dealt, strict=True))
        order = start.argsort()
        start, owner = start[order], owner[order]
        new = np.append(True, owner[1:] != owner[:-1])
        return start[new], owner[new]


def _is_balanced(heavy: _Line, light: _Line, before: Ints, rest: Ints, total: int) -> bool:
    """Whether stretches follow each other and every rank has the mean to within a token's work."""
    if (np.diff(before) < 0).any() or (np.diff(rest) < 0).any():
        return False
    done = heavy.work_of_first()(before) + light.work_of_first()(rest)
    n = len(before) - 1
    most = max(x.max(initial=0) for line in (heavy, light) for x in (line.work, line.turned().work))
    return bool((np.abs(np.diff(done) * n - total) < max(1, most) * n).all())


def _brought(start: Ints, owner: Ints, bounds: Ints, seq_len: int) -> int:
    """Tokens that ranks need of others under a causal mask: what lies before their last tokens."""
    inner = bounds[:-1]
    first = unique_ascending(np.append(start, inner))
    stop = np.append(first[1:], seq_len)
    of = owner[np.searchsorted(start, first, side="right") - 1]
    document = np.searchsorted(bounds, first, side="right") - 1
    real = document < len(bounds) - 1
    first, stop, of, document = (x[real] for x in (first, stop, of, document))
    if not len(first):
        return 0
    order = np.lexsort((first, document, of))
    first, stop, of, document = (x[order] for x in (first, stop, of, document))
    last = np.append((of[1:] != of[:-1]) | (document[1:] != document[:-1]), True)
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
    run = np.searchsorted(work.start, start, side="right") - 1
    first = work.work[run] + work.step[run] * (start - work.start[run])
    return _Line(start, np.append(start[1:], work.stop[-1]), first, work.step[run])


def _heavy_before(heavy: _Line, light: _Line, total: int, num_shards: int) -> Ints:
    """Heavy tokens before each rank, and all of them: [n + 1], by bisection."""
    of_heavy, of_light = int(heavy.places[-1]), int(light.places[-1])
    # Both lines as one, so that a step of the bisection is one look at it.
    work_of_first = _Line(*map(np.append, heavy, light)).work_of_first()
    work_of_heavy = work_of_first(np.array([of_heavy]))
    tokens = np.arange(num_shards + 1) * ((of_heavy + of_light) // num_shards)
    enough = np.array([-(-rank * total // num_shards) for rank in range(num_shards + 1)])
    enough += work_of_heavy
    low, high = np.maximum(0, tokens - of_light), np.minimum(tokens, of_heavy)
    while bool((low < high).any()):
        middle = (low + high) // 2
        work = work_of_first(np.concatenate((middle, of_heavy + tokens - middle)))
        reached = work[: len(tokens)] + work[len(tokens) :] >= enough
        low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
    return low


def _dealt(line: _Line, before: Ints, *, turned: bool) -> tuple[Ints, Ints]:
    """Starts and ranks of the pieces of a line, before[r] tokens of which lie before rank r's."""
    places = line.places
    cuts = unique_ascending(np.concatenate((places, before)))
    first, last = cuts[:-1], cuts[1:]
    stretch = np.searchsorted(places, first, side="right") - 1
    rank = np.searchsorted(before, first, side="right") - 1
    if turned:
        return line.stop[stretch] - (last - places[stretch]), rank
    return line.start[stretch] + (first - places[stretch]), rank

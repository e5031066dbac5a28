"""The pieces of packed documents that give every rank L tokens and the mean of the work.

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
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtcp.sequence.mask_work import WorkRuns
from dtcp.sequence.partition import Ints, differs, stops_of, sums_before, unique_ascending

Bools = NDArray[np.bool_]
BASE = 4
"""Of the numbers in which the boundaries of ranks are found digit by digit."""
FEW_RANKS = 32
"""Up to which documents left whole are tried: from 64 ranks on they spare 0 to 4 % of the keys."""


class _Line(NamedTuple):
    """Tokens lined up, in stretches of neighbours. Each field [P]."""

    start: Ints
    stop: Ints
    work: Ints  # of the token of each stretch that is lined up first
    step: Ints  # from each token to the one lined up next

    def turned(self) -> "_Line":
        """Each stretch from its last token."""
        last = self.work + self.step * (self.stop - self.start - 1)
        return self._replace(work=last, step=-self.step)

    def all_work(self) -> Ints:
        """Of each stretch."""
        length = self.stop - self.start
        return length * self.work + self.step * (length * (length - 1) // 2)


def best_pieces(work: WorkRuns, lengths: tuple[int, ...], num_shards: int) -> tuple[Ints, Ints]:
    """Where pieces start, from left to right, and the rank of each, with the fewest keys to bring.

    Leaving short documents whole saves keys where many have about the same length, and costs
    nothing: several lengths up to which they are left whole are tried, and only those count that
    keep every rank's work. On many ranks, each with a few parts of long documents, it saves next to
    nothing.

    Args:
        work: of the row's tokens.
        lengths: of its documents; padding follows them.
    """
    row = RowOfDocuments.of(work, lengths, num_shards)
    if num_shards > FEW_RANKS:
        return row.best_pieces([0])
    cut = np.sort(row.length[1:][row.document[1:] == row.document[:-1]])
    shard_len = row.seq_len // num_shards
    wholes = [shard_len // 4, shard_len // 2, shard_len, 2 * shard_len, 4 * shard_len]
    kept = [0, *cut.searchsorted(wholes, side="right").tolist()]
    more = [whole for whole, (a, b) in zip(wholes, pairwise(kept), strict=True) if a < b]
    return row.best_pieces([0, *more])


class RowOfDocuments(NamedTuple):
    """A row to deal out, from left to right; documents cut where tokens cost the mean."""

    tokens: _Line
    document: Ints  # [P]
    length: Ints  # [P], of the document; 0 of padding
    bounds: Ints  # where documents start, and where the last one ends
    total: int  # work
    num_shards: int

    @classmethod
    def of(cls, work: WorkRuns, lengths: tuple[int, ...], num_shards: int) -> "RowOfDocuments":
        of_documents = np.array([*lengths, 0])
        bounds, total = sums_before(of_documents[:-1]), work.total
        tokens = _cut(work, bounds, total // int(work.stop[-1]))
        document = bounds.searchsorted(tokens.start, side="right") - 1
        return cls(tokens, document, of_documents[document], bounds, total, num_shards)

    @property
    def seq_len(self) -> int:
        return int(self.tokens.stop[-1])

    def best_pieces(self, wholes: Sequence[int]) -> tuple[Ints, Ints]:
        """Where pieces start, from left to right, and whose they are: one stretch of each line.

        Args:
            wholes: documents of so many tokens or fewer stand in one line as they are: each a way
                to deal the row out, of which one leaves every rank the mean work at least.
        Returns:
            of the way that brings the fewest keys; of equal ones, the first.
        """
        lines = self._lines(self._is_heavy(np.array(wholes)))
        before, done = lines.heavy_before(self.total, self.num_shards)
        rest = np.arange(self.num_shards + 1) * (self.seq_len // self.num_shards) - before
        parts = np.stack((before, rest))
        growing = (parts[..., 1:] >= parts[..., :-1]).all(0)
        good = (growing & self._is_even(done)).all(1)
        # Ways that go back somewhere are dealt out with the others, and not taken.
        start, holder = lines.dealt(np.maximum.accumulate(parts, axis=2)[..., :-1])
        if len(wholes) == 1:
            return start, holder
        reach = self._reach(start, holder, len(wholes))
        best = int(np.where(good, reach, reach.max() + 1).argmin())
        mine = holder // self.num_shards == best
        return start[mine] - best * self.seq_len, holder[mine] - best * self.num_shards

    def _is_heavy(self, wholes: Ints) -> Bools:
        """Which stretches stand in the line of heavy ones: [V, P]."""
        tokens, seq_len = self.tokens, self.seq_len
        heavy: Bools = tokens.work > self.total // seq_len
        # Of a whole document, what counts is its own mean.
        work = np.bincount(self.document, tokens.all_work()) * seq_len
        length = np.bincount(self.document, tokens.stop - tokens.start)
        dear = work > length * float(self.total)
        # Padding, of length 0, costs nothing: it is light in either way.
        return np.where(self.length <= wholes[:, None], dear[self.document], heavy)

    def _lines(self, heavy: Bools) -> "_Lines":
        """Heavy stretches, longest document first, and light ones, shortest first."""
        count = len(self.length)
        longest_first = np.lexsort((-self.tokens.start, self.document, -self.length))
        shortest_first = self.length.argsort(kind="stable")
        chosen = np.concatenate((heavy[:, longest_first], ~heavy[:, shortest_first]), axis=1)
        way, place = chosen.nonzero()
        order = np.concatenate((longest_first, shortest_first + count))[place]
        both = zip(self.tokens.turned(), self.tokens, strict=True)
        line = _Line(*(np.concatenate(x)[order] for x in both))
        return _Lines(line, way, turned=order < count, ways=len(heavy), seq_len=self.seq_len)

    def _is_even(self, done: Ints) -> Bools:
        """Which ranks have the mean work to within that of one token: [V, n].

        Args:
            done: [V, n + 1], the work before each rank's, and all of it.
        """
        ends = self.tokens.work, self.tokens.turned().work
        most, n = max(1, *(int(x.max(initial=0)) for x in ends)), self.num_shards
        return np.abs((done[:, 1:] - done[:, :-1]) * n - self.total) < most * n

    def _reach(self, start: Ints, holder: Ints, ways: int) -> Ints:
        """How far from the starts of documents ranks reach under a causal mask, of each way: [V].

        They need all tokens before the last one that they hold of a document: but for those that
        they hold, as many in all ways, those that they need of others.
        """
        count, end = len(self.bounds), ways * self.seq_len
        bounds = (np.arange(ways)[:, None] * self.seq_len + self.bounds).flatten()
        first = unique_ascending(np.concatenate((start, bounds[bounds < end])))
        rank = holder[start.searchsorted(first, side="right") - 1]
        document = bounds.searchsorted(first, side="right") - 1
        reach = stops_of(first, end) - bounds[document]
        # Of each rank and document the last stretch, by one sort.
        of_document = (rank * count + document % count) * len(first)
        order = np.sort(of_document + np.arange(len(first)))
        pair, stretch = order // len(first), order % len(first)
        counted = np.append(pair[1:] != pair[:-1], True) & (pair % count < count - 1)
        way = pair[counted] // (count * self.num_shards)
        sums = np.bincount(way, reach[stretch[counted]], ways)
        return sums.astype(np.int64)


@dataclass(frozen=True, eq=False)
class _Lines:
    """Of V ways to deal out a row the heavy and the light line, all of them one after another.

    Args:
        line: their stretches, [P].
        way, turned: of each stretch, and whether it is lined up from its last token.
    """

    line: _Line
    way: Ints
    turned: Bools
    ways: int
    seq_len: int

    @cached_property
    def places(self) -> Ints:
        """Tokens before each stretch, and all of them: [P + 1]."""
        return sums_before(self.line.stop - self.line.start)

    @cached_property
    def first(self) -> Ints:
        """Tokens before the heavy and the light line of each way: [2, V, 1]."""
        length = np.where(self.turned, self.line.stop - self.line.start, 0)
        heavy = np.bincount(self.way, length, self.ways).astype(np.int64)
        before = np.arange(self.ways) * self.seq_len
        return np.stack((before, before + heavy))[..., None]

    def twice_work_of_first(self) -> Callable[[Ints], Ints]:
        """From a number of tokens to twice the work of so many, the first ones."""
        line, places = self.line, self.places
        # Twice the work of n tokens of a stretch is n * (2 * work - step) + n * n * step, with n
        # tokens less those before the stretch. One stretch of nothing at the end, so that every
        # number of tokens has a stretch.
        first, linear = places[:-1], 2 * line.work - line.step
        table = np.zeros((3, len(places)), dtype=np.int64)
        table[0] = 2 * sums_before(line.all_work())
        table[0, :-1] += first * (first * line.step - linear)
        table[1, :-1], table[2, :-1] = linear - 2 * first * line.step, line.step

        def total(tokens: Ints) -> Ints:
            constant, slope, square = table.take(places[1:].searchsorted(tokens, "right"), axis=1)
            return constant + tokens * (slope + tokens * square)

        return total

    def heavy_before(self, total: int, num_shards: int) -> tuple[Ints, Ints]:
        """Heavy tokens before each rank, and all, and the work before it: two [V, n + 1].

        The greatest number whose work is too little, digit by digit, for all ways at once: a step
        costs calls, not numbers. Where so many whole documents leave no such number, one near it.
        """
        ranks = np.arange(num_shards + 1)
        tokens = ranks * (self.seq_len // num_shards)
        first, ends = self.first, self.first[1] - self.first[0]
        low, high = np.maximum(0, tokens + ends - self.seq_len), np.minimum(tokens, ends)
        twice_work_of_first = self.twice_work_of_first()
        offset = twice_work_of_first(first).sum(0)
        mean, rest = divmod(total, num_shards)
        enough = 2 * (ranks * mean - -ranks * rest // num_shards) + offset
        # A heavy token more is a light one less.
        places = first + np.stack((0 * tokens, tokens))[:, None]
        sign: Ints = np.array([1, -1]).reshape(-1, 1, 1, 1)

        def twice_work_before(heavy: Ints) -> Ints:
            """And that of `offset`; [K, V, n + 1]."""
            work = twice_work_of_first(places[:, None] + sign * heavy)
            return work[0] + work[1]

        digits = np.arange(1, BASE).reshape(-1, 1, 1)
        step = 1
        while step * BASE <= int((high - low).max()):
            step *= BASE
        count = low - 1
        while step:
            tried = np.minimum(count + step * digits, high - 1)
            count = count + step * (twice_work_before(tried) < enough).sum(0)
            step //= BASE
        count = np.minimum(count + 1, high)
        return count, (twice_work_before(count[None])[0] - offset) // 2

    def dealt(self, before: Ints) -> tuple[Ints, Ints]:
        """Where the pieces of ranks start, from left to right, and whose they are.

        Args:
            before: [2, V, n], tokens of either line before those of each rank.
        Returns:
            counted through the rows and the ranks of all ways, one after another.
        """
        bounds: Ints = np.moveaxis(before + self.first, 0, 1).flatten()
        num_shards = before.shape[2]
        cuts = unique_ascending(np.concatenate((self.places, bounds)))
        first, last = cuts[:-1], cuts[1:]
        stretch = self.places.searchsorted(first, side="right") - 1
        chunk = bounds.searchsorted(first, side="right") - 1
        holder = chunk // (2 * num_shards) * num_shards + chunk % num_shards
        place = self.places[stretch]
        start = self.way[stretch] * self.seq_len + np.where(
            self.turned[stretch],
            self.line.stop[stretch] - (last - place),
            self.line.start[stretch] + (first - place),
        )
        order = start.argsort()
        start, holder = start[order], holder[order]
        new = differs(holder)
        return start[new], holder[new]


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

"""What a token may see: predicates on coordinates, and the intervals that kernels read.

A mask is defined by `visible`, a predicate on the coordinates of a query and of a key. Every
mask here has a property that makes it cheap: the keys a query sees are one interval of the row, or
a few. `intervals` gives their two ends for each token, once per batch; strategies and kernels read
nothing else, so neither knows which mask it serves. Documents never see each other and padding is
never seen, whatever the mask.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtcp.sequence.arguments import WHOLE_NUMBERS, check_ints, check_tensor
from dtcp.sequence.block_runs import split_block
from dtcp.sequence.coords import Coords
from dtcp.sequence.interval_sets import Interval, emptied, intersection, overlap, union
from dtcp.sequence.memory import Memory


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees. Masks are values; combine them with `&` and `|`."""

    @property
    def sees_itself(self) -> bool:
        """Whether a token that sees any key sees itself.

        The union of two such masks has no gap, so it is one interval.
        """
        return True

    @property
    def num_intervals(self) -> int:
        """How many intervals the keys of a token fall into, at most: one kernel call each.

        It does not depend on the batch: graphs read it as a size.
        """
        return 1

    def visible(self, q: Coords, k: Coords) -> Tensor:
        """The mask's meaning: bool [B, Q, K]. Dense, for tests and pictures; nothing runs it."""
        same_document = q.document[:, :, None] == k.document[:, None, :]
        return same_document & (k.document >= 0)[:, None, :] & self._sees(q, k)

    def intervals(self, coords: Coords) -> tuple[Tensor, Tensor]:
        """Token index of the first and last key each token sees; last < first: it sees none.

        Returns:
            two [B, S], int32; two [I, B, S] of a mask of I > 1 intervals.
        Raises:
            ValueError: for some token the mask is more intervals than `num_intervals`, or they
                overlap.
        """
        clipped = self._clipped(coords)
        first, last = (
            clipped[0] if len(clipped) == 1 else map(torch.stack, zip(*clipped, strict=True))
        )
        return first.to(torch.int32), last.to(torch.int32)

    def work(self, coords: Coords) -> Tensor:
        """Keys that each token sees, summed over rows: [S]."""
        first, last = self.intervals(coords)
        return (last - first + 1).clamp(min=0).flatten(0, -2).sum(0)

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        raise NotImplementedError

    def _interval(self, coords: Coords) -> Interval:
        """The ends of `intervals`, which may lie outside the token's document."""
        raise NotImplementedError

    def _clipped(self, coords: Coords) -> list[Interval]:
        """The intervals, cut where the token's document ends: [B, S] each."""
        first, last = ends_of(self, self._interval(coords), coords)
        first, last = torch.maximum(first, coords.start), torch.minimum(last, coords.end)
        first, last = emptied((coords.document < 0) | (last < first), (first, last))
        return intervals_of(self, first, last)


def intervals_of(mask: Mask, first: Tensor, last: Tensor) -> list[Interval]:
    """The intervals of a mask one by one, from what `Mask.intervals` returns.

    Raises:
        ValueError: two of them overlap: keys in both would be counted twice.
    """
    if mask.num_intervals < 2:
        return [(first, last)]
    intervals = list(zip(first, last, strict=True))
    twice = overlap(intervals)
    if bool(twice.any()):
        row, token = twice.nonzero()[0].tolist()
        found = [(int(first[row, token]), int(last[row, token])) for first, last in intervals]
        raise ValueError(
            f"The intervals of a mask do not overlap, got {mask} that gives token {token} of row "
            f"{row} the keys {found}: count each key once."
        )
    return intervals


def ends_of(mask: Mask, ends: Any, coords: Coords) -> tuple[Tensor, Tensor]:
    """What a mask gives, checked to be a first and a last key for every token.

    Raises:
        TypeError, ValueError: it is something else, which torch would broadcast, cut or unpack.
    """
    check_ints(type(mask).__name__, least=1, num_intervals=mask.num_intervals)
    subject, shape, named = f"The interval of {mask}", tuple(coords.document.shape), "[B, S]"
    if mask.num_intervals > 1:
        shape, named = (mask.num_intervals, *shape), f"[{mask.num_intervals}, B, S]"
    if not isinstance(ends, tuple | list) or len(ends) != 2:
        raise TypeError(
            f"{subject} is a first and a last key for every token, got {type(ends).__name__}: "
            f"return two tensors {named}."
        )
    first, last = ends
    check_tensor(subject, shape=named, dtypes=WHOLE_NUMBERS, first=first, last=last)
    if first.shape != shape or last.shape != shape:
        raise ValueError(
            f"{subject} is a first and a last key for every token, got first.shape="
            f"{tuple(first.shape)}, last.shape={tuple(last.shape)}: return two of {shape}."
        )
    return first, last


@dataclass(frozen=True)
class Bidirectional(Mask):
    """A token sees its whole document."""

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        return torch.ones_like(q.token_index[:, :, None] == k.token_index[:, None, :])

    def _interval(self, coords: Coords) -> Interval:
        return coords.start, coords.end


@dataclass(frozen=True)
class Causal(Mask):
    """A token sees itself and what comes before it."""

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        return k.token_index[:, None, :] <= q.token_index[:, :, None]

    def _interval(self, coords: Coords) -> Interval:
        return coords.start, coords.token_index


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """A token sees itself and the size - 1 tokens left of it.

    `Causal() & SlidingWindow(W)` is the window of decoders. `right` limits the other side, for
    encoders: how many tokens right of it a token sees; None for all.
    """

    size: int
    right: int | None = None

    def __post_init__(self) -> None:
        check_ints("SlidingWindow", size=self.size)
        check_ints("SlidingWindow", right=0 if self.right is None else self.right)
        if self.size < 1 or (self.right is not None and self.right < 0):
            raise ValueError(
                f"SlidingWindow counts a token itself, so size >= 1 and right >= 0, got "
                f"size={self.size}, right={self.right}: size=1 is a token that sees only itself."
            )

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        back = q.token_index[:, :, None] - k.token_index[:, None, :]
        near = back < self.size
        return near if self.right is None else near & (-back <= self.right)

    def _interval(self, coords: Coords) -> Interval:
        last = coords.end if self.right is None else coords.token_index + self.right
        return coords.token_index - (self.size - 1), last


@dataclass(frozen=True)
class AttentionChunks(Mask):
    """A token sees the chunk that it stands in: documents are cut every `size` tokens.

    `Causal() & AttentionChunks(8192)` is the local attention of Llama 4. Chunks are counted from
    the start of each document, so that a packed document is what it is in a row of its own.
    """

    size: int

    def __post_init__(self) -> None:
        check_ints("AttentionChunks", least=1, size=self.size)

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        q_chunk, k_chunk = ((x.token_index - x.start) // self.size for x in (q, k))
        return q_chunk[:, :, None] == k_chunk[:, None, :]

    def _interval(self, coords: Coords) -> Interval:
        first = coords.token_index - (coords.token_index - coords.start) % self.size
        return first, first + (self.size - 1)


@dataclass(frozen=True)
class BlockBidirectional(Mask):
    """A token in a block sees its block, and a token in none sees nothing: combine by `|`.

    `SlidingWindow(W) & (Causal() | BlockBidirectional())` is the rule for images in text.
    """

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        q_block, k_block = token_field(self, q, "block"), token_field(self, k, "block")
        return (q_block[:, :, None] == k_block[:, None, :]) & (q_block >= 0)[:, :, None]

    def _interval(self, coords: Coords) -> Interval:
        if coords.block_ends is not None:
            return coords.block_ends[0], coords.block_ends[1]
        block, seq_len = token_field(self, coords, "block"), coords.token_index.shape[1]
        # A block cut by a document border is two blocks: neither part sees the other.
        border = torch.ones_like(block, dtype=torch.bool)
        border[:, 1:] = (block.diff(dim=1) != 0) | (coords.document.diff(dim=1) != 0)
        _check_runs(block, coords.document, border)
        first = torch.where(border, coords.token_index, 0).cummax(dim=1).values
        ends = torch.ones_like(border)
        ends[:, :-1] = border[:, 1:]
        last = (
            torch.where(ends, coords.token_index, seq_len - 1).flip(1).cummin(dim=1).values.flip(1)
        )
        outside = block < 0
        return first.masked_fill(outside, 0), last.masked_fill(outside, -1)


@dataclass(frozen=True)
class MemoryDocument(Mask):
    """A token sees a whole document of another sequence: the one with its document's number.

    The mask of cross attention. Its intervals count the tokens of that sequence, so it is not
    combined with masks of this one.
    """

    def intervals(self, coords: Coords) -> tuple[Tensor, Tensor]:
        first, last = self._interval(coords)
        none = coords.document < 0
        return first.masked_fill(none, 0).int(), last.masked_fill(none, -1).int()

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        return torch.ones_like(q.token_index[:, :, None] == k.token_index[:, None, :])

    def _interval(self, coords: Coords) -> Interval:
        documents = self.memory(coords).documents
        most = max([1, *map(len, documents.lengths)])
        bounds = torch.zeros(documents.batch, most + 1, dtype=torch.int64)
        for row, lengths in zip(bounds, documents.lengths, strict=True):
            row[1 : len(lengths) + 1] = torch.tensor(lengths).cumsum(0)
        document = coords.document.clamp(min=0)
        return bounds.gather(1, document), bounds.gather(1, document + 1) - 1

    def memory(self, coords: Coords) -> Memory:
        """The other sequence.

        Raises:
            ValueError: the batch has none.
        """
        if coords.memory is None:
            raise ValueError(
                "Cross attention reads the keys of another sequence, got memory=None: shard that "
                "sequence first, and pass its ShardedBatch to shard_batch(..., memory=) (on one "
                "device its Documents to batch_metadata)."
            )
        return coords.memory


@dataclass(frozen=True)
class _OfTwo(Mask):
    left: Mask
    right: Mask

    def __post_init__(self) -> None:
        _check_masks(self.left, self.right)

    @property
    def sees_itself(self) -> bool:
        return self.left.sees_itself and self.right.sees_itself


@dataclass(frozen=True)
class And(_OfTwo):
    """Seen by both."""

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        return self.left._sees(q, k) & self.right._sees(q, k)

    @property
    def num_intervals(self) -> int:
        return self.left.num_intervals * self.right.num_intervals

    def _clipped(self, coords: Coords) -> list[Interval]:
        return intersection(self.left._clipped(coords), self.right._clipped(coords))


@dataclass(frozen=True)
class Or(_OfTwo):
    """Seen by either: one interval where both see the token itself, or as many as both have."""

    @property
    def num_intervals(self) -> int:
        count = self.left.num_intervals + self.right.num_intervals
        return 1 if count == 2 and self.sees_itself else count

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        return self.left._sees(q, k) | self.right._sees(q, k)

    def _clipped(self, coords: Coords) -> list[Interval]:
        return self.united(self.left._clipped(coords), self.right._clipped(coords))

    def united(self, left: list[Interval], right: list[Interval]) -> list[Interval]:
        """The keys of either, in as many intervals as the mask has.

        Raises:
            ValueError: a gap between two masks that say they have none.
        """
        joined = union(left, right)
        if self.num_intervals > 1:
            return joined
        (a_first, a_last), (b_first, b_last) = joined
        if bool(((a_first <= a_last) & (b_first <= b_last)).any()):
            raise ValueError(
                f"A mask is one interval of the row for every token that sees itself, got mask="
                f"{self}, whose two sides leave a gap: use masks that overlap, or set "
                f"sees_itself=False in the class of one whose tokens do not see themselves."
            )
        seen = b_first <= b_last
        return [(torch.where(seen, b_first, a_first), torch.where(seen, b_last, a_last))]


def _check_masks(*sides: Mask) -> None:
    for side in sides:
        if isinstance(side, MemoryDocument):
            raise TypeError(
                f"Masks are combined where they are of one sequence, got {side!r} among {sides}: "
                f"use the mask of cross attention as it is."
            )
        if not isinstance(side, Mask):
            raise TypeError(
                f"A mask is combined with another one, got {side!r} of type "
                f"{type(side).__name__}: give a Mask, as Causal() & SlidingWindow(128)."
            )
        if type(side).intervals is not Mask.intervals:
            raise TypeError(
                f"Masks are combined by their `_interval`, got {side!r} with `intervals` of its "
                f"own: leave `intervals` as it is, and define `_interval`."
            )


def token_field(mask: Mask, coords: Coords, name: str) -> Tensor:
    """What a mask reads of every token beside its place, [B, S].

    Raises:
        ValueError: the batch does not have it.
    """
    value = getattr(coords, name)
    if value is None:
        instead = ", or the mm_token_type_ids of its images" if name == "block" else ""
        raise ValueError(
            f"{mask} reads the {name} of every token, got coords.{name}=None: pass "
            f"{name}=[B, S] with the batch{instead}."
        )
    return value


def _check_runs(block: Tensor, document: Tensor, border: Tensor) -> None:
    """A block id may stand in one run per document: two runs would be two intervals."""
    for row in range(block.shape[0]):
        starts = border[row] & (block[row] >= 0) & (document[row] >= 0)
        runs = torch.stack((document[row][starts], block[row][starts]), dim=1)
        if runs.shape[0] != runs.unique(dim=0).shape[0]:
            raise split_block(row)

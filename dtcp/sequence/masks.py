"""What a token may see: predicates on coordinates, and the intervals that kernels read.

A mask is defined by `visible`, a predicate on the coordinates of a query and of a key. Every
mask here has a property that makes it cheap: the keys a query sees are one interval of
positions. `intervals` states it, as two integers a token, once a batch; strategies and kernels
read nothing else, so neither knows which mask it serves. Documents never see each other and
padding is never seen, whatever the mask.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from dtcp.sequence.documents import Documents


@dataclass(frozen=True)
class Coords:
    """Where tokens stand: all a mask may read. Each field [B, S], int64.

    Args:
        token_index: index in the row; None stands for 0 .. S - 1 in every row.
        document: index of the document in the row, -1 for padding.
        start, end: first and last position of the token's document.
        prefix: tokens at the start of the token's document that all of it sees (PrefixLM).
        block: id of the token's bidirectional block, -1 for none (BlockBidirectional).
        position_ids: what rotary angles are counted by, where not by the place in the document; one
            a token, or [axes, B, S]. No mask reads it.
    """

    token_index: Tensor
    document: Tensor
    start: Tensor
    end: Tensor
    prefix: Tensor | None = None
    block: Tensor | None = None
    position_ids: Tensor | None = None

    @classmethod
    def of(
        cls,
        documents: Documents,
        *,
        prefix: Tensor | None = None,
        block: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Self:
        """Coordinates of whole rows, in position order."""
        document = documents.document()
        for name, extra in (("prefix", prefix), ("block", block)):
            if extra is not None and extra.shape != document.shape:
                raise ValueError(
                    f"Coords take one {name} a token, got {name}.shape={tuple(extra.shape)}: "
                    f"pass [B, S] = {tuple(document.shape)}, before sharding."
                )
        token_index = torch.arange(documents.seq_len).expand_as(document)
        starts, ends = documents.starts(), documents.ends()
        return cls(token_index, document, starts, ends, prefix, block, position_ids)

    def at(self, slots: Tensor) -> Self:
        """The coordinates of some tokens of each row: slots [L] -> fields [B, L]."""
        taken = {
            name: value[..., slots] for name, value in self.__dict__.items() if value is not None
        }
        return replace(self, **taken)


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees. Masks are values; combine them with `&` and `|`."""

    def visible(self, q: Coords, k: Coords) -> Tensor:
        """The mask's meaning: bool [B, Q, K]. Dense, for tests and pictures; nothing runs it."""
        same_document = q.document[:, :, None] == k.document[:, None, :]
        return same_document & (k.document >= 0)[:, None, :] & self._sees(q, k)

    def intervals(self, coords: Coords) -> tuple[Tensor, Tensor]:
        """First and last position each token sees: two [B, S] int32; last < first: sees none.

        Raises:
            ValueError: the mask is not one interval of positions for some token.
        """
        first, last = self._interval(coords)
        first, last = torch.maximum(first, coords.start), torch.minimum(last, coords.end)
        none = (coords.document < 0) | (last < first)
        first, last = first.masked_fill(none, 0), last.masked_fill(none, -1)
        return first.to(torch.int32), last.to(torch.int32)

    def work(self, coords: Coords) -> Tensor:
        """Keys that each token sees, added up for all rows: [S]."""
        first, last = self.intervals(coords)
        return (last - first + 1).clamp(min=0).sum(0)

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        raise NotImplementedError

    def _interval(self, at: Coords) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class Bidirectional(Mask):
    """A token sees its whole document."""

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        return torch.ones_like(q.token_index[:, :, None] == k.token_index[:, None, :])

    def _interval(self, at: Coords) -> tuple[Tensor, Tensor]:
        return at.start, at.end


@dataclass(frozen=True)
class Causal(Mask):
    """A token sees itself and what comes before it."""

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        return k.token_index[:, None, :] <= q.token_index[:, :, None]

    def _interval(self, at: Coords) -> tuple[Tensor, Tensor]:
        return at.start, at.token_index


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """A token sees itself and the size - 1 tokens left of it; the right is not limited.

    `Causal() & SlidingWindow(W)` is the window of decoders. `right` limits the other side, for
    encoders: the tokens right of it that a token sees.
    """

    size: int
    right: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or (self.right is not None and self.right < 0):
            raise ValueError(
                f"SlidingWindow counts a token itself, so size >= 1 and right >= 0, got "
                f"size={self.size}, right={self.right}: size=1 is a token that sees only itself."
            )

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        back = q.token_index[:, :, None] - k.token_index[:, None, :]
        near = back < self.size
        return near if self.right is None else near & (-back <= self.right)

    def _interval(self, at: Coords) -> tuple[Tensor, Tensor]:
        last = at.end if self.right is None else at.token_index + self.right
        return at.token_index - (self.size - 1), last


@dataclass(frozen=True)
class PrefixLM(Mask):
    """A token sees what comes before it, and the whole prefix of its document."""

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        before = k.token_index[:, None, :] <= q.token_index[:, :, None]
        return before | ((k.token_index - k.start) < _needs(self, k, "prefix"))[:, None, :]

    def _interval(self, at: Coords) -> tuple[Tensor, Tensor]:
        return at.start, torch.maximum(at.token_index, at.start + _needs(self, at, "prefix") - 1)


@dataclass(frozen=True)
class BlockBidirectional(Mask):
    """A token in a block sees its block, and a token in none sees nothing: combine by `|`.

    `SlidingWindow(W) & (Causal() | BlockBidirectional())` is the rule for images in text.
    """

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        q_block, k_block = _needs(self, q, "block"), _needs(self, k, "block")
        return (q_block[:, :, None] == k_block[:, None, :]) & (q_block >= 0)[:, :, None]

    def _interval(self, at: Coords) -> tuple[Tensor, Tensor]:
        block, seq_len = _needs(self, at, "block"), at.token_index.shape[1]
        # A block cut by a document border is two blocks: neither part sees the other.
        border = torch.ones_like(block, dtype=torch.bool)
        border[:, 1:] = (block.diff(dim=1) != 0) | (at.document.diff(dim=1) != 0)
        _check_runs(block, at.document, border)
        first = torch.where(border, at.token_index, 0).cummax(dim=1).values
        ends = torch.ones_like(border)
        ends[:, :-1] = border[:, 1:]
        last = torch.where(ends, at.token_index, seq_len - 1).flip(1).cummin(dim=1).values.flip(1)
        outside = block < 0
        return first.masked_fill(outside, 0), last.masked_fill(outside, -1)


@dataclass(frozen=True)
class And(Mask):
    """Seen by both."""

    left: Mask
    right: Mask

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        return self.left._sees(q, k) & self.right._sees(q, k)

    def _interval(self, at: Coords) -> tuple[Tensor, Tensor]:
        (a_first, a_last), (b_first, b_last) = self.left._interval(at), self.right._interval(at)
        return torch.maximum(a_first, b_first), torch.minimum(a_last, b_last)


@dataclass(frozen=True)
class Or(Mask):
    """Seen by either; the two must overlap or touch, or the keys are no single interval."""

    left: Mask
    right: Mask

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        return self.left._sees(q, k) | self.right._sees(q, k)

    def _interval(self, at: Coords) -> tuple[Tensor, Tensor]:
        a_first, a_last = self._clipped(self.left, at)
        b_first, b_last = self._clipped(self.right, at)
        no_a, no_b = a_last < a_first, b_last < b_first
        gap = (a_first > b_last + 1) | (b_first > a_last + 1)
        if bool((gap & ~no_a & ~no_b & (at.document >= 0)).any()):
            raise ValueError(
                f"A mask is one interval of positions for every token, got mask={self}, whose "
                f"two sides leave a gap: use masks that overlap."
            )
        first = torch.where(no_a, b_first, torch.where(no_b, a_first, a_first.minimum(b_first)))
        last = torch.where(no_a, b_last, torch.where(no_b, a_last, a_last.maximum(b_last)))
        return first, last

    @staticmethod
    def _clipped(mask: Mask, at: Coords) -> tuple[Tensor, Tensor]:
        first, last = mask._interval(at)
        return torch.maximum(first, at.start), torch.minimum(last, at.end)


def vision_blocks(mm_token_type_ids: Tensor) -> Tensor:
    """Number the runs of image and video tokens, from 0 in every row: [B, S], -1 for the rest.

    Whole rows are numbered, before sharding: of two shards, each would start at 0.

    Args:
        mm_token_type_ids: [B, S], 1 for an image token, 2 for a video token, as transformers'
            processors give them; audio and text are in no block.
    """
    seen = (mm_token_type_ids == 1) | (mm_token_type_ids == 2)
    starts = seen.clone()
    starts[:, 1:] &= ~seen[:, :-1]
    return torch.where(seen, starts.cumsum(1) - 1, -1)


def _needs(mask: Mask, coords: Coords, field: str) -> Tensor:
    value = getattr(coords, field)
    if value is None:
        instead = ", or the mm_token_type_ids that tell its images" if field == "block" else ""
        raise ValueError(
            f"{mask} reads the {field} of every token, got coords.{field}=None: pass "
            f"{field}=[B, S] with the batch{instead}."
        )
    return value


def _check_runs(block: Tensor, document: Tensor, border: Tensor) -> None:
    """A block id may stand in one run per document: two runs would be two intervals."""
    for row in range(block.shape[0]):
        starts = border[row] & (block[row] >= 0) & (document[row] >= 0)
        runs = torch.stack((document[row][starts], block[row][starts]), dim=1)
        if runs.shape[0] != runs.unique(dim=0).shape[0]:
            raise ValueError(
                f"BlockBidirectional takes blocks of consecutive tokens, got a block id in "
                f"several runs of row {row}: give each run an id of its own."
            )

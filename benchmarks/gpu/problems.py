"""Attention problems of the campaign: noise under a mask, on one device or one rank of many."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.faults import FAILED
from dtcp.kernels.softmax.api import (
    Keys,
    Queries,
    SavedForward,
    SoftmaxParams,
    attend_once,
    attend_once_backward,
    kernel_choice,
)
from dtcp.kernels.softmax.block_ranges import block_ranges
from dtcp.kernels.softmax.pieces import find_pieces
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import (
    Bidirectional,
    BlockBidirectional,
    Causal,
    Coords,
    Mask,
    SlidingWindow,
)

WINDOW = 1024


class Case(NamedTuple):
    """One line of the results: a name that tells it apart, and what measures it."""

    name: str
    run: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Heads:
    """Query heads, kv heads and their width."""

    queries: int
    keys: int
    width: int

    def __str__(self) -> str:
        return f"{self.queries}:{self.keys} x {self.width}"


class Problem(NamedTuple):
    """The arguments of a call, and how many pairs of a query and a key the mask leaves."""

    queries: Queries
    keys: Keys
    pairs: int

    def without(self, params: SoftmaxParams) -> dict[str, Any] | None:
        """The line of a case whose backend does not compute it; None if it does.

        What a named backend cannot do another one computes, which is not to be measured as it.
        """
        try:
            choice = kernel_choice(self.queries, self.keys, params)
        except ValueError as refused:
            return {"refused": str(refused)}
        if choice.backend.name == params.kernel:
            return None
        reason = dict(choice.passed_over)[params.kernel]
        return {"failed" if FAILED in reason else "refused": reason}

    def forward(self, params: SoftmaxParams, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return attend_once(self.queries, self.keys, params, sink=sink)

    def backward(self, saved: SavedForward, params: SoftmaxParams) -> tuple[Tensor, ...]:
        return attend_once_backward(saved, self.queries, self.keys, params)

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same rounded numbers in another dtype."""
        q, keys = self.queries, self.keys
        return self._replace(
            queries=q._replace(q=q.q.to(dtype)),
            keys=keys._replace(k=keys.k.to(dtype), v=keys.v.to(dtype)),
        )


def lognormal_documents(length: int, *, rows: int = 1, seed: int = 0) -> Documents:
    """Documents of lengths as in text corpora: lognormal, with a median of 700 tokens.

    Shorter ones in a row that a few of those would fill: it is about rows of several documents.
    """
    generator, median = torch.Generator().manual_seed(seed), min(700.0, length / 8)
    lengths: list[tuple[int, ...]] = []
    for _ in range(rows):
        row: list[int] = []
        while sum(row) < length:
            drawn = float(torch.randn((), generator=generator))
            document = int(max(16, median * 2.718281828 ** (1.2 * drawn)))
            row.append(min(document, length - sum(row)))
        lengths.append(tuple(row))
    return Documents(tuple(lengths), length)


def image_blocks(length: int) -> Tensor:
    """Ids of bidirectional blocks: 256 tokens of image after every 768 of text: [1, S]."""
    token = torch.arange(length)[None]
    return torch.where(token % 1024 >= 768, token // 1024, -1)


MASKS: dict[str, Callable[[int], tuple[Mask, Documents]]] = {
    "full": lambda length: (Bidirectional(), Documents.single(1, length)),
    "causal": lambda length: (Causal(), Documents.single(1, length)),
    "documents": lambda length: (Causal(), lognormal_documents(length)),
    "window": lambda length: (
        Causal() & SlidingWindow(WINDOW),
        Documents.single(1, length),
    ),
    "images": lambda length: (Causal() | BlockBidirectional(), Documents.single(1, length)),
}


def intervals_of(mask: str, length: int) -> tuple[Tensor, Tensor]:
    """First and last key of every token: [1, S] each."""
    rule, documents = MASKS[mask](length)
    return rule.intervals(Coords.of(documents, block=image_blocks(length)))


def problem_of(
    intervals: tuple[Tensor, Tensor],
    index: Tensor,
    heads: Heads,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    """Noise for these queries and keys.

    Args:
        intervals: [1, L] each, of the queries.
        index: [K], token index of every key, ascending.
    """
    first, last = (x.contiguous() for x in intervals)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, count, heads.width, device=device, dtype=dtype, generator=generator)
        for tokens, count in (
            (first.shape[1], heads.queries),
            (len(index), heads.keys),
            (len(index), heads.keys),
        )
    )
    index = index.to(torch.int32)
    ranges = block_ranges(first, last, index)
    pieces = find_pieces(first, last, index, tiles=ranges.shape[1])
    pairs = _pairs(first, last, index)
    queries = Queries.of(q, first.to(device), last.to(device))
    return Problem(queries, Keys(k, v, index.to(device), ranges, pieces), pairs)


def whole_problem(mask: str, length: int, heads: Heads, device: str) -> Problem:
    """A whole row on one device."""
    return problem_of(intervals_of(mask, length), torch.arange(length), heads, device)


def _pairs(first: Tensor, last: Tensor, index: Tensor) -> int:
    index = index.to(torch.int64)
    low = torch.searchsorted(index, first.to(torch.int64))
    high = torch.searchsorted(index, last.to(torch.int64), right=True)
    return int((high - low).clamp(min=0).sum())

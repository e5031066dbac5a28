"""Rows that begin alike, put together so that what they have in common is computed once.

One level: each group of rows shares one prompt. In what order rows come does not matter, for those
of one prompt may be apart (all chosen answers, then all rejected ones).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcp.huggingface.documents import documents_of_hf_batch
from dtcp.labels import IGNORED
from dtcp.sequence.batch_documents import DOCUMENT_KEYS

LEAST = 16
"""Tokens that a prompt has at least: a shorter one costs more in small pieces than it saves."""
_READ = ("input_ids", "labels", "attention_mask", "position_ids", *DOCUMENT_KEYS)


@dataclass(frozen=True)
class GroupedRows:
    """Rows that share prompts, as one row of documents, each a prompt and its answers.

    Args:
        rows: what shard_hf_batch reads of it, [1, s] each.
        index: [B, S], the place in it of each token of the rows; -1 for padding.
    """

    rows: Mapping[str, Tensor]
    index: Tensor

    def restored(self, x: Tensor) -> Tensor:
        """What that row has at its tokens, as the rows were; 0 where there is none.

        Args:
            x: [1, s, ...]; or [1, s - 1, ...] of next tokens, of which the last token has none.
        Returns:
            [B, S, ...], with its gradient.
        """
        index = self.index.to(x.device)
        none = (index < 0) | (index >= x.shape[1])
        picked = x[0][index.masked_fill(none, 0)]
        return picked.masked_fill(none.view(*none.shape, *[1] * (picked.ndim - 2)), 0)


@dataclass(frozen=True)
class _Stretch:
    """A document of the rows, by its place in all of their tokens, one row after another.

    Args:
        ids: [length], of one byte order, so that those that begin alike are next to each other when
            they are sorted as bytes.
        free: how many of its tokens, from the start, may be shared: nothing is predicted of them.
    """

    start: int
    ids: NDArray[Any]
    free: int

    def in_common(self, other: "_Stretch") -> int:
        """How many tokens both begin with, none of which has a loss."""
        most = min(self.free, other.free)
        differ = np.flatnonzero(self.ids[:most] != other.ids[:most])
        return int(differ[0]) if len(differ) else most


def grouped_rows(rows: Mapping[str, Any]) -> GroupedRows | None:
    """Rows put together by what they have in common; None where that is nothing.

    Tokens that a label predicts are not shared: each row has its own loss of them.

    Args:
        rows: as shard_hf_batch takes them, on the host; packed documents count as rows.
    Raises:
        ValueError: rows whose documents shard_hf_batch refuses.
    """
    ids = rows.get("input_ids")
    if not isinstance(ids, Tensor) or any(key not in _READ for key in rows):
        return None
    labels = rows.get("labels", ids)
    if not isinstance(labels, Tensor) or labels.shape != ids.shape:
        return None  # for the batch to refuse
    stretches = _stretches(rows, ids)
    groups = _groups(stretches)
    if all(shared == 0 for _, shared in groups):
        return None
    pieces, index = _Pieces(), torch.full((ids.numel(),), -1)
    for members, shared in groups:
        pieces.add_document(members, shared, index)
    source = torch.cat(pieces.source)
    packed = {key: rows[key].reshape(-1)[source] for key in _READ[:2] if key in rows}
    of_tokens = {key: torch.cat(x) for key, x in pieces.of_tokens.items()}
    row = {key: x[None] for key, x in {**packed, **of_tokens}.items()}
    return GroupedRows(row, index.view(ids.shape))


class _Pieces:
    """The tokens of a row that is put together, piece by piece."""

    def __init__(self) -> None:
        self.source: list[Tensor] = []
        self.of_tokens: dict[str, list[Tensor]] = {"document_ids": [], "prefix": [], "block": []}
        self.length = self.documents = 0

    def add_document(self, members: Sequence[_Stretch], shared: int, index: Tensor) -> None:
        """A prompt of `shared` tokens, and the rest of each member as a block."""
        first, prompt = members[0].start, self.length
        self._add(first, shared, shared, -1)
        for number, each in enumerate(members):
            start, rest = each.start, len(each.ids) - shared
            index[start : start + shared] = torch.arange(prompt, prompt + shared)
            index[start + shared : start + shared + rest] = self.length + torch.arange(rest)
            self._add(start + shared, rest, shared, number)
        self.documents += 1

    def _add(self, start: int, length: int, prefix: int, block: int) -> None:
        self.source.append(torch.arange(start, start + length))
        numbers = {"document_ids": self.documents, "prefix": prefix, "block": block}
        for key, number in numbers.items():
            self.of_tokens[key].append(torch.full((length,), number))
        self.length += length


def _stretches(rows: Mapping[str, Any], ids: Tensor) -> list[_Stretch]:
    """The documents of all rows, in their order."""
    documents, labels = documents_of_hf_batch(rows), rows.get("labels")
    found = []
    for row, lengths in enumerate(documents.lengths):
        end = 0
        for length in lengths:
            start, end = end, end + length
            free = length
            if labels is not None:
                # A document's first token is predicted by none.
                predicted = (labels[row, start + 1 : end] != IGNORED).nonzero()
                free = int(predicted[0]) + 1 if len(predicted) else length
            own = np.ascontiguousarray(ids[row, start:end].numpy()).astype(">i8")
            found.append(_Stretch(row * documents.seq_len + start, own, free))
    return found


def _groups(stretches: Sequence[_Stretch]) -> list[tuple[list[_Stretch], int]]:
    """All stretches in groups, and how many tokens the members of each share; 0 for one alone.

    Of all ways to cut the sorted stretches into groups, that of the fewest tokens. The last token
    that members have in common is no part of what they share, for it predicts a token of each.
    """
    ordered = sorted(stretches, key=lambda x: (x.ids.tobytes(), x.start))
    common = [a.in_common(b) for a, b in pairwise(ordered)]
    best, cuts = [0], [(0, 0)]
    for end in range(1, len(ordered) + 1):
        saved, cut = best[end - 1], (end - 1, 0)
        shared = len(ordered[end - 1].ids)
        for first in range(end - 2, -1, -1):
            shared = min(shared, common[first] - 1)
            if shared < LEAST:
                break
            here = best[first] + (end - 1 - first) * shared
            if here > saved:
                saved, cut = here, (first, shared)
        best.append(saved)
        cuts.append(cut)
    groups, end = [], len(ordered)
    while end > 0:
        first, shared = cuts[end]
        groups.append((sorted(ordered[first:end], key=lambda x: x.start), shared))
        end = first
    return sorted(groups, key=lambda group: group[0][0].start)

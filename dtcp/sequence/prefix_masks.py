"""Masks by which all tokens of a document see its start; with others they are several intervals.

Causal() & (SlidingWindow(1024) | FirstTokens(4))      a window, and the first tokens
Causal() & (Prefix() | BlockBidirectional())           a prompt, and several answers to it
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.sequence.arguments import check_ints
from dtcp.sequence.coords import Coords
from dtcp.sequence.interval_sets import Interval
from dtcp.sequence.masks import Mask, token_field


@dataclass(frozen=True)
class PrefixLM(Mask):
    """A token sees what comes before it, and the whole prefix of its document.

    All tokens of a document name the same prefix, as a number of tokens.
    """

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        before = k.token_index[:, None, :] <= q.token_index[:, :, None]
        return before | ((k.token_index - k.start) < token_field(self, k, "prefix"))[:, None, :]

    def _interval(self, coords: Coords) -> Interval:
        prefix = token_field(self, coords, "prefix")
        _check_prefix(self, prefix, coords)
        return coords.start, torch.maximum(coords.token_index, coords.start + prefix - 1)


@dataclass(frozen=True)
class FirstTokens(Mask):
    """A token sees the first `size` tokens of its document.

    `Causal() & (SlidingWindow(W) | FirstTokens(size))` keeps them visible beside a window, like the
    attention sinks of Xiao et al. 2023, section 3, https://arxiv.org/abs/2309.17453, or meta
    tokens.
    """

    size: int

    def __post_init__(self) -> None:
        check_ints("FirstTokens", least=1, size=self.size)

    @property
    def sees_itself(self) -> bool:
        return False

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        seen = k.token_index - k.start < self.size
        return seen[:, None, :].expand(-1, q.token_index.shape[1], -1)

    def _interval(self, coords: Coords) -> Interval:
        return coords.start, coords.start + (self.size - 1)


@dataclass(frozen=True)
class Prefix(Mask):
    """A token sees the prefix of its document, and nothing else.

    `Causal() & (Prefix() | BlockBidirectional())` is a prompt that several answers share, each a
    block: an answer sees the prompt and itself, and the prompt is computed only once. The positions
    of every answer count on from the prompt.

    All tokens of a document name the same prefix, as a number of tokens.
    """

    @property
    def sees_itself(self) -> bool:
        return False

    def _sees(self, q: Coords, k: Coords) -> Tensor:
        seen = k.token_index - k.start < token_field(self, k, "prefix")
        return seen[:, None, :].expand(-1, q.token_index.shape[1], -1)

    def _interval(self, coords: Coords) -> Interval:
        prefix = token_field(self, coords, "prefix")
        _check_prefix(self, prefix, coords)
        return coords.start, coords.start + prefix - 1


def _check_prefix(mask: Mask, prefix: Tensor, coords: Coords) -> None:
    """Refuse a document whose tokens name different prefixes: each would see another one.

    Only whole rows are checked; whoever asks for the intervals of some tokens has them checked.
    """
    if coords.documents is None:
        return
    first = prefix.gather(1, coords.start)
    wrong = ((prefix != first) | (prefix < 0)) & (coords.document >= 0)
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{type(mask).__name__} reads one prefix >= 0 for all tokens of a document, got "
            f"prefix[{row}, {token}]={int(prefix[row, token])} in a document that starts with "
            f"{int(first[row, token])}: give every token its document's number."
        )

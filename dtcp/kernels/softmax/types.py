"""The tensors that attention reads and accumulates, by name, and the contract of a backend."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax.merge import NOTHING_SEEN, add_sink
from dtcp.kernels.softmax.score_bias import ScoreBias

AUTO = "auto"
"""In the place of a backend's name: the fastest that does what a call asks for."""


@dataclass(frozen=True)
class SoftmaxParams:
    """What turns products of queries and keys into scores.

    Args:
        scale: factor on the products.
        softcap: c in c * tanh(score / c); 0 for no cap.
        kernel: the backend that computes it, by its name in `python -m dtcp.kernels`.
        wide: whether results over a part of the keys or queries must be fp32, not rounded.
    """

    scale: float
    softcap: float = 0.0
    kernel: str = AUTO
    wide: bool = False


class Keys(NamedTuple):
    """Keys that are on this rank, in ascending order of their places in the sequence.

    And what the host knows of which of them the queries see that they are given with; for each of
    the intervals of these, where they have several.
    """

    k: Tensor  # [B, K, G, D]
    v: Tensor  # [B, K, G, V]
    token_index: Tensor  # [K]
    block_ranges: Tensor | None = None  # [B, tiles, 6] int64, of block_ranges: plain torch's
    pieces: Tensor | None = None  # of find_pieces; None for any interval mask


class Queries(NamedTuple):
    """Local queries, and the interval of token indices that each of them sees, or several.

    A backend is given one at a time (`each_interval`).
    """

    q: Tensor  # [B, L, H, D]
    first_key: Tensor  # [B, L], or [I, B, L]
    last_key: Tensor  # likewise
    bias: ScoreBias | None = None

    @classmethod
    def of(
        cls, q: Tensor, first_key: Tensor, last_key: Tensor, bias: ScoreBias | None = None
    ) -> "Queries":
        """Check first that the intervals belong to q.

        Raises:
            ValueError: they are those of another batch. Every rank raises, so none is left
                waiting in a collective.
        """
        if first_key.shape[-2] not in (1, q.shape[0]) or first_key.shape[-1] != q.shape[1]:
            raise ValueError(
                f"Attention reads the metadata of its own batch, got some for "
                f"{tuple(first_key.shape[-2:])} queries with q.shape={tuple(q.shape)}: pass those "
                f"made with this batch, and q as [B, L, H, D]."
            )
        return cls(q, first_key, last_key, bias)

    @property
    def are_split(self) -> bool:
        """Whether they see several intervals of keys."""
        return self.first_key.ndim == 3


def each_interval(queries: Queries, keys: Keys) -> list[tuple[Queries, Keys]]:
    """The same, interval by interval: no key is in two, so that results are merged or summed."""
    if not queries.are_split:
        return [(queries, keys)]
    count = len(queries.first_key)
    tables = ([None] * count if x is None else x for x in (keys.block_ranges, keys.pieces))
    return [
        (
            queries._replace(first_key=first, last_key=last),
            keys._replace(block_ranges=ranges, pieces=of),
        )
        for first, last, ranges, of in zip(
            queries.first_key, queries.last_key, *tables, strict=True
        )
    ]


class OnlineSoftmax(NamedTuple):
    """Attention over the keys met so far; starts empty, and is updated in place."""

    out: Tensor  # [B, L, H, V], fp32 (fp64 for fp64)
    lse: Tensor  # [B, L, H], same

    @classmethod
    def empty(cls, q: Tensor, value_dim: int) -> "OnlineSoftmax":
        dtype = accumulation(q.dtype)
        out = q.new_zeros((*q.shape[:-1], value_dim), dtype=dtype)
        return cls(out, q.new_full(q.shape[:-1], NOTHING_SEEN, dtype=dtype))

    def finish(self, sink: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """out in the model's dtype, and lse; both with the sinks' share of the softmax."""
        out, lse = add_sink(self.out, self.lse, sink)
        return out.to(dtype), lse


class GradAccumulators(NamedTuple):
    """Sums of gradients, in fp32 (fp64 for fp64), updated in place."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


class SavedForward(NamedTuple):
    """The finished forward and the gradient of its output: what backward reads beside the inputs.

    `out` and `lse` are over all keys, whichever keys a call of backward is about.
    """

    grad_out: Tensor  # [B, L, H, V]
    out: Tensor  # [B, L, H, V]
    lse: Tensor  # [B, L, H]


class AttentionKernel(Protocol):
    """A backend: forward and backward of local queries over some keys."""

    def attend(
        self, state: OnlineSoftmax, queries: Queries, keys: Keys, params: SoftmaxParams
    ) -> None:
        """Merge the attention of `queries` over `keys` into `state`."""

    def attend_backward(
        self,
        grads: GradAccumulators,
        saved: SavedForward,
        queries: Queries,
        keys: Keys,
        params: SoftmaxParams,
    ) -> None:
        """Add the gradients of `attend` over these keys to `grads`; dk and dv are of `keys`.

        Those of a score bias are summed in `queries.bias`.
        """


@runtime_checkable
class OneGoAttention(Protocol):
    """A backend that returns results in the model's dtype where nothing is to be merged."""

    def attend_once(
        self, queries: Queries, keys: Keys, params: SoftmaxParams
    ) -> tuple[Tensor, Tensor]:
        """out [B, L, H, V] in q's dtype and lse [B, L, H] over these keys and no others."""

    def attend_once_backward(
        self, saved: SavedForward, queries: Queries, keys: Keys, params: SoftmaxParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv over these keys, in any floating dtype."""

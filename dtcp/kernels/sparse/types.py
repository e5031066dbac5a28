"""The tensors that sparse attention reads, by name, and the contract of a backend.

Keys are values too, or their first channels are (a latent and its rotary key), and all query heads
share the one head of keys.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

SPARSE_TILE = 64
"""Queries per tile of `Sight.tiles`, at most."""
NOWHERE = torch.iinfo(torch.int32).max
"""Token index of a place among the entries that holds none: after every query's."""


class Sight(NamedTuple):
    """Which keys and entries each query sees; on the device, except `tiles`.

    A run is a start and a stop, [start, stop); both are 0 where it is empty.
    """

    window_first: Tensor  # [B, L] int32, the first token index in the query's window
    first: Tensor  # [B, L] int32, where the query's document starts
    last: Tensor  # [B, L] int32, the query's own token index; -1 for padding
    key_token_index: Tensor  # [K] int32, -1 where a slot holds no key
    closing: Tensor  # [B, P] int32, token index of an entry's last token; NOWHERE for no entry
    key_run: Tensor  # [B, L, 2] int32, the run of keys that a query reads
    key_readers: Tensor  # [B, K, 2] int32, the run of queries that read a key
    entry_run: Tensor  # [B, L, 2] int32, the run of entries that a query sees
    entry_readers: Tensor  # [B, P, 2] int32, the run of queries that see an entry
    tiles: Tensor  # [B, tiles, 6] int64 on the host: runs of queries, of keys and of entries


class SparseKeys(NamedTuple):
    """All that queries may read: raw keys, compressed entries, and what an indexer selected."""

    keys: Tensor  # [B, K, D]
    entries: Tensor | None  # [B, P, D], in ascending order
    selected: Tensor | None  # [B, L, k] int32, ascending places of entries, then -1
    sight: Sight
    value_dim: int  # V, the channels of a key that are its value, from the first on


class SparseGradients(NamedTuple):
    """Gradients of q in its dtype, of keys and entries in that of `accumulation`, of the sink."""

    q: Tensor
    keys: Tensor
    entries: Tensor | None
    sink: Tensor | None


class SparseKernel(Protocol):
    """A backend: one softmax over the window's keys, the entries and a sink."""

    def forward(
        self, q: Tensor, keys: SparseKeys, sink: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out [B, L, H, V] in q's dtype, and lse [B, L, H]; q is [B, L, H, D], the sink [H]."""

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        keys: SparseKeys,
        sink: Tensor | None,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> SparseGradients:
        """Gradients, with the weights recomputed from lse."""

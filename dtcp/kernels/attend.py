"""Attention of local queries to lined-up keys, tile by tile: what every strategy computes with.

Nothing of size L x K is made: a tile of queries meets its run of keys in at most three calls of
the block kernel, and only the calls at the run's ends carry a mask, built on the spot from the
queries' intervals.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.block import accumulation, block_attention, block_attention_backward
from dtcp.kernels.merge import NOTHING_SEEN, add_sink, merge_into, sink_gradient

MOST_KEYS = 8192
"""Keys a call of the block kernel, which may hold a score for each and each of its queries."""


@dataclass(frozen=True)
class Softmax:
    """What turns scores into weights: `scale`, and a tanh `softcap` (0: none)."""

    scale: float
    softcap: float = 0.0


class Keys(NamedTuple):
    """Keys brought to this rank, by ascending position."""

    k: Tensor  # [B, K, G, D]
    v: Tensor  # [B, K, G, V]
    position: Tensor  # [K]


class Queries(NamedTuple):
    """Local queries and the interval of positions each of them sees."""

    q: Tensor  # [B, L, H, D]
    first_key: Tensor  # [B, L]
    last_key: Tensor  # [B, L]

    @classmethod
    def of(cls, q: Tensor, first_key: Tensor, last_key: Tensor) -> "Queries":
        """Check the tables first: all ranks refuse those of another batch, and none waits."""
        if first_key.shape[0] not in (1, q.shape[0]) or first_key.shape[1] != q.shape[1]:
            raise ValueError(
                f"Attention reads the tables of its own batch, got tables for "
                f"{tuple(first_key.shape)} queries with q.shape={tuple(q.shape)}: pass the "
                f"tables that were made with this batch."
            )
        return cls(q, first_key, last_key)


class Partial(NamedTuple):
    """Attention over the keys met so far; starts empty and is added to in place."""

    out: Tensor  # [B, L, H, V], fp32 (fp64 for fp64)
    lse: Tensor  # [B, L, H], same

    @classmethod
    def empty(cls, q: Tensor, value_dim: int) -> "Partial":
        dtype = accumulation(q.dtype)
        out = q.new_zeros((*q.shape[:-1], value_dim), dtype=dtype)
        return cls(out, q.new_full(q.shape[:-1], NOTHING_SEEN, dtype=dtype))

    def finish(self, sink: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(out in the model's dtype, lse), with the sinks' share taken off."""
        out, lse = add_sink(self.out, self.lse, sink)
        return out.to(dtype), lse


class Gradients(NamedTuple):
    """Gradients met so far, summed in fp32 (fp64 for fp64), in place."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


class Final(NamedTuple):
    """The finished forward and its cotangent: what a backward over any keys reads."""

    grad_out: Tensor  # [B, L, H, V]
    out: Tensor  # [B, L, H, V]
    lse: Tensor  # [B, L, H]


def attend(partial: Partial, queries: Queries, keys: Keys, spans: Tensor, how: Softmax) -> None:
    """Add the attention of `queries` to `keys` to `partial`.

    Args:
        spans: [B, tiles, 6], from key_spans for these queries and keys.
    """
    for rows, at, to, bias in _calls(queries, keys, spans):
        out, lse = block_attention(
            queries.q[rows, at],
            keys.k[rows, to],
            keys.v[rows, to],
            bias,
            scale=how.scale,
            softcap=how.softcap,
        )
        merge_into(partial.out[rows, at], partial.lse[rows, at], out, lse)


def attend_backward(
    grads: Gradients, final: Final, queries: Queries, keys: Keys, spans: Tensor, how: Softmax
) -> None:
    """Add the gradients of `attend` over these keys to `grads` (dk, dv: those of `keys`)."""
    for rows, at, to, bias in _calls(queries, keys, spans):
        dq, dk, dv = block_attention_backward(
            final.grad_out[rows, at],
            queries.q[rows, at],
            keys.k[rows, to],
            keys.v[rows, to],
            final.out[rows, at],
            final.lse[rows, at],
            bias,
            scale=how.scale,
            softcap=how.softcap,
        )
        grads.dq[rows, at] += dq
        grads.dk[rows, to] += dk
        grads.dv[rows, to] += dv


def zeros_for(x: Tensor) -> Tensor:
    """Room to sum gradients of x in."""
    return torch.zeros(x.shape, dtype=accumulation(x.dtype), device=x.device)


def _calls(
    queries: Queries, keys: Keys, spans: Tensor
) -> Iterator[tuple[slice, slice, slice, Tensor | None]]:
    """(batch rows, queries, keys, bias) of every call of the block kernel."""
    alike = bool((spans == spans[:1]).all())
    batch = queries.q.shape[0]
    row_groups = [slice(0, batch)] if alike else [slice(b, b + 1) for b in range(batch)]
    for rows in row_groups:
        for q_start, q_stop, start, full_start, full_stop, stop in spans[rows.start].tolist():
            at = slice(q_start, q_stop)
            if full_start == full_stop:
                pieces = [(start, stop, True)]
            else:
                pieces = [
                    (start, full_start, True),
                    (full_start, full_stop, False),
                    (full_stop, stop, True),
                ]
            for piece_start, piece_stop, masked in pieces:
                for at_key in range(piece_start, piece_stop, MOST_KEYS):
                    to = slice(at_key, min(at_key + MOST_KEYS, piece_stop))
                    bias = _bias(queries, keys.position[to], rows, at) if masked else None
                    yield rows, at, to, bias


def _bias(queries: Queries, position: Tensor, rows: slice, at: slice) -> Tensor:
    """0 where a query sees a key and -inf where not: [B, Q, K], Q at most a tile."""
    first = queries.first_key[rows, at, None]
    last = queries.last_key[rows, at, None]
    hidden = (position < first) | (position > last)
    zeros = hidden.new_zeros(hidden.shape, dtype=accumulation(queries.q.dtype))
    return zeros.masked_fill(hidden, NOTHING_SEEN)


def local_sink_gradient(final: Final, sink: Tensor | None) -> Tensor | None:
    return None if sink is None else sink_gradient(*final, sink)

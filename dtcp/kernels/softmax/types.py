"""What attention is given, and what it adds to: plain tensors, named."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax.merge import NOTHING_SEEN, add_sink


@dataclass(frozen=True)
class SoftmaxParams:
    """What turns scores into weights: `scale`, and a tanh `softcap` (0: none)."""

    scale: float
    softcap: float = 0.0


class Keys(NamedTuple):
    """Keys brought to this rank, by ascending position."""

    k: Tensor  # [B, K, G, D]
    v: Tensor  # [B, K, G, V]
    token_index: Tensor  # [K]


class Queries(NamedTuple):
    """Local queries and the interval of positions each of them sees."""

    q: Tensor  # [B, L, H, D]
    first_key: Tensor  # [B, L]
    last_key: Tensor  # [B, L]

    @classmethod
    def of(cls, q: Tensor, first_key: Tensor, last_key: Tensor) -> "Queries":
        """Check the metadata first: all ranks refuse those of another batch, and none waits."""
        if first_key.shape[0] not in (1, q.shape[0]) or first_key.shape[1] != q.shape[1]:
            raise ValueError(
                f"Attention reads the metadata of its own batch, got some for "
                f"{tuple(first_key.shape)} queries with q.shape={tuple(q.shape)}: pass those "
                f"made with this batch."
            )
        return cls(q, first_key, last_key)


class OnlineSoftmax(NamedTuple):
    """Attention over the keys met so far; starts empty and is added to in place."""

    out: Tensor  # [B, L, H, V], fp32 (fp64 for fp64)
    lse: Tensor  # [B, L, H], same

    @classmethod
    def empty(cls, q: Tensor, value_dim: int) -> "OnlineSoftmax":
        dtype = accumulation(q.dtype)
        out = q.new_zeros((*q.shape[:-1], value_dim), dtype=dtype)
        return cls(out, q.new_full(q.shape[:-1], NOTHING_SEEN, dtype=dtype))

    def finish(self, sink: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(out in the model's dtype, lse), with the sinks' share taken off."""
        out, lse = add_sink(self.out, self.lse, sink)
        return out.to(dtype), lse


class GradAccumulators(NamedTuple):
    """Gradients met so far, summed in fp32 (fp64 for fp64), in place."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


class SavedForward(NamedTuple):
    """The finished forward and its cotangent: what a backward over any keys reads."""

    grad_out: Tensor  # [B, L, H, V]
    out: Tensor  # [B, L, H, V]
    lse: Tensor  # [B, L, H]

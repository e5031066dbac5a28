"""The tensors that gated linear attention reads and differentiates, by name."""

from typing import NamedTuple

from torch import Tensor


class LinearInputs(NamedTuple):
    """What gated linear attention reads: R independent stretches of T tokens."""

    q: Tensor  # [R, T, G, K], scaled
    k: Tensor  # [R, T, G, K]
    v: Tensor  # [R, T, H, V], H a multiple of G
    g: Tensor  # [R, T, H] or [R, T, H, K], log-decay per head or per key channel, at most 0
    starts: Tensor  # [R, T] int32, 1 where a document starts


class LinearGradients(NamedTuple):
    """Gradients of LinearInputs, in their shapes and dtypes; `starts` has none."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor

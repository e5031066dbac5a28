"""The tensors that the delta rule reads and differentiates, by name, and a backend's contract."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Carry = Callable[[Tensor], Tensor]
"""From the summaries of these stretches, [R, H, K, K + V], to the state [R, H, K, V] that enters
each; in backward, to the gradient of the state that leaves each."""


class DeltaInputs(NamedTuple):
    """What the delta rule reads: R independent stretches of T tokens."""

    q: Tensor  # [R, T, G, K], scaled
    k: Tensor  # [R, T, G, K]
    v: Tensor  # [R, T, H, V], H a multiple of G
    g: Tensor  # [R, T, H] or [R, T, H, K], log-decay per head or per key channel, at most 0
    beta: Tensor  # [R, T, H]
    starts: Tensor  # [R, T] int32, 1 where a document starts


class DeltaGradients(NamedTuple):
    """Gradients of DeltaInputs, in their shapes and dtypes; `starts` has none."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


class DeltaKernel(Protocol):
    """A backend: the rule on every stretch. `carry` may communicate; None: no state enters.

    Stretches of one length are in one part. What is carried of all parts is carried at once,
    their stretches one after another.
    """

    def forward(
        self, parts: Sequence[DeltaInputs], carry: Carry | None
    ) -> tuple[list[Tensor], Tensor]:
        """out of each part, [R, T, H, V] in the dtype of v, and the states [all R, H, K, V] that
        entered."""

    def backward(
        self,
        parts: Sequence[DeltaInputs],
        grads_out: Sequence[Tensor],
        state: Tensor,
        carry: Carry | None,
    ) -> list[DeltaGradients]:
        """Gradients of the inputs, with all else recomputed from them and from `state`.

        Args:
            grads_out: of each part, [R, T, H, V].
            state: what entered, as forward returned it.
        """


def carried(carry: Carry | None, summaries: Callable[[], list[Tensor]]) -> list[Tensor] | None:
    """What `carry` makes of the summaries of all parts, by part; None without it."""
    if carry is None:
        return None
    by_part = summaries()
    return list(carry(torch.cat(by_part)).split([len(x) for x in by_part]))

"""The tensors that the delta rule reads and differentiates, by name, and a backend's contract."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

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
    """A backend: the rule on every stretch. `carry` may communicate; None: no state enters."""

    def forward(self, x: DeltaInputs, carry: Carry | None) -> tuple[Tensor, Tensor]:
        """out [R, T, H, V] in the dtype of v, and the state [R, H, K, V] that entered."""

    def backward(
        self, x: DeltaInputs, grad_out: Tensor, state: Tensor, carry: Carry | None
    ) -> DeltaGradients:
        """Gradients of the inputs, with all else recomputed from them and from `state`.

        Args:
            grad_out: [R, T, H, V].
            state: what entered, as forward returned it.
        """

"""fla-core's kernels of the gated delta rule, and the choice between them and the reference."""

from typing import Protocol

from torch import Tensor

from dtcp.kernels import delta_rule
from dtcp.kernels.delta_rule import Carry, InputGradients, Inputs


class DeltaKernel(Protocol):
    """A pair of functions as in delta_rule.py."""

    def forward(self, x: Inputs, carry: Carry | None) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, x: Inputs, grad_out: Tensor, state: Tensor, carry: Carry | None
    ) -> InputGradients: ...


def delta_kernel(x: Inputs) -> DeltaKernel:
    return delta_rule

"""The mean loss of each data-parallel rank's rows, whose parts lie on the ranks of cp.

torchtitan (0.3.0) divides a rank's share of the loss by the tokens of whole rows: its largest loss
of a rank is below the mean of all where rows are shared.
"""

import math
from typing import Any

from dtcp.torchtitan import compat as compat

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed.utils import dist_max, dist_sum


class RowLosses:
    """What the micro-batches of a step add up to on this rank.

    Args:
        dims: torchtitan's `ParallelDims`.
    """

    def __init__(self, dims: Any) -> None:
        self._dims = dims
        self.clear()

    def clear(self) -> None:
        """Begin a step."""
        self._losses: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._of_all: Tensor | None = None

    def add(self, loss: Tensor, labels: Tensor, of_all: Tensor) -> None:
        """Count a micro-batch.

        Args:
            loss: the sum over this rank's tokens, divided by `of_all`.
            labels: [B, S], of whole rows.
            of_all: tokens with a label in the step, on all ranks.
        """
        own = loss.to_local() if isinstance(loss, DTensor) else loss
        self._losses.append(own.detach())
        self._tokens.append((labels != IGNORE_INDEX).sum())
        self._of_all = of_all

    def largest(self) -> float:
        """The largest mean over data-parallel ranks, called by all ranks; NaN if there is none."""
        if self._of_all is None:
            return math.nan
        share = torch.stack(self._losses).sum() * self._of_all
        tokens = torch.stack(self._tokens).sum().to(share.device)
        total = dist_sum(share, self._dims.get_optional_mesh("cp"))
        # Rows may have no token to predict: their mean is none, and no other's maximum.
        mean = torch.where(tokens > 0, total / tokens.clamp(min=1), -math.inf)
        found = dist_max(mean, self._dims.get_optional_mesh("batch"))
        return found if math.isfinite(found) else math.nan

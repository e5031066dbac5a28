"""dtcp's loss as a loss of torchtitan: logits may be sharded in the vocabulary, never copied."""

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.components.loss import BaseLoss
from torchtitan.config import CompileConfig

from dtcp.loss import mtp_loss, token_mean_loss


class TokenLoss(BaseLoss):
    """Summed cross-entropy, which torchtitan divides by the global number of tokens.

    Works in chunks of rows by itself, so it is neither compiled nor wrapped in torchtitan's
    ChunkedLossWrapper, which calls the head in the model's place.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        mtp_weight: float = 0.1
        """Weight of the mean loss of all depths of multi-token prediction, in training."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        self.fn = functools.partial(_summed_loss, mtp_weight=config.mtp_weight)

    def __call__(
        self,
        pred: Tensor | tuple[Tensor, ...],
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As BaseLoss, but a step without a single token that has a loss has the loss 0."""
        if global_valid_tokens is not None:
            global_valid_tokens = global_valid_tokens.clamp(min=1)
        return super().__call__(pred, labels, global_valid_tokens, **kwargs)


def _summed_loss(
    logits: Tensor | tuple[Tensor, ...], labels: Tensor, *, mtp_weight: float = 0.1
) -> Tensor:
    """Cross-entropy summed over this rank's tokens; the mean over one token, that is.

    Args:
        logits: a tuple of a model that predicts several tokens.
        labels: [B, L]; for several tokens [B, 1 + depths, L].
    """
    if isinstance(logits, Tensor):
        return token_mean_loss(logits, labels, 1)
    return mtp_loss(logits, labels[:, 0], labels[:, 1:], 1, weight=mtp_weight)

"""dtcp's loss as a loss of torchtitan: logits may be sharded in the vocabulary, never copied."""

from dataclasses import dataclass

from torch import Tensor
from torchtitan.components.loss import BaseLoss
from torchtitan.config import CompileConfig

from dtcp.loss import token_mean_loss


class TokenLoss(BaseLoss):
    """Summed cross-entropy, which torchtitan divides by the global number of tokens.

    Works in chunks of rows by itself, so it is neither compiled nor wrapped in torchtitan's
    ChunkedLossWrapper, which calls the head in the model's place.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        self.fn = summed_loss


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over this rank's tokens; the mean over one token, that is."""
    return token_mean_loss(logits, labels, 1)

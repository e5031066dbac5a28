"""Leaves the head of a transformers model uncomputed, for a loss that reads the head's input.

The model is called as usual, and its head computes the logits of one token only, to see what the
model does with them: it may scale or cap them. What the config says about that is compared with it
once, in the first call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtcp.autocast import as_autocast_casts
from dtcp.forward import wrap_forward
from dtcp.linear_logits import LinearLogits


class LinearHead:
    """Holds the input of a model's head while the model runs.

    Args:
        model: of parallelize_hf, a language model whose head is one linear layer.
    Raises:
        ValueError: another head, or one that trains more than its weight and bias.
    """

    def __init__(self, model: Any) -> None:
        head = model.get_output_embeddings()
        if not hasattr(head, "weight") or head.weight.ndim != 2:
            raise ValueError(
                f"A loss that computes logits by itself needs a linear head, got "
                f"{type(head).__name__} of {type(model).__name__}: set linear_head=False."
            )
        more = _trained_besides(head)
        if more:
            raise ValueError(
                f"A loss that computes logits by itself reads the weight and the bias of a head, "
                f"got {type(head).__name__} of {type(model).__name__}, which trains {more}, too: "
                f"set linear_head=False."
            )
        self.holding, self.known = False, False
        self.held: LinearLogits | None = None
        self.after = _after_head(model.config.get_text_config())
        self.name = type(model).__name__
        head.dtcp_linear_head = self
        wrap_forward(head, _hold_input)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Inside, the head keeps its input and computes the logits of one token."""
        self.holding, self.held = True, None
        try:
            yield
        finally:
            self.holding = False

    def logits(self, of_one_token: Tensor) -> LinearLogits:
        """What the head would have given for all tokens.

        Args:
            of_one_token: [B, 1, V], what the model gave, of the first one.
        Raises:
            ValueError: they do not follow from the scale and the cap of the config.
        """
        assert self.held is not None
        scale, softcap = self.after
        logits, self.held = replace(self.held, scale=scale, softcap=softcap), None
        if not self.known:
            self._compare(logits, of_one_token)
            self.known = True
        return logits

    @torch.no_grad()
    def _compare(self, logits: LinearLogits, expected: Tensor) -> None:
        expected, weight = _local(expected), _local(logits.weight)
        bias = None if logits.bias is None else _local(logits.bias)
        own = nn.functional.linear(logits.hidden[:, :1], weight, bias) * logits.scale
        if logits.softcap:
            own = logits.softcap * torch.tanh(own / logits.softcap)
        scale = expected.abs().max().clamp(min=1e-6) if expected.numel() else 1.0
        if expected.numel() and float((own - expected).abs().max() / scale) > 2**-6:
            raise ValueError(
                f"A loss computes logits as the model does, got a head of {self.name} whose "
                f"outputs are changed in a way that scale={logits.scale} and softcap="
                f"{logits.softcap} of its config do not tell: set linear_head=False."
            )


def _trained_besides(head: Any) -> list[str]:
    """Parameters of a head besides its weight and bias: adapters, or Dory's scale of each logit.

    They may start as if they were not there, and the first call would show nothing of them.
    """
    read = {id(head.weight), id(getattr(head, "bias", None))}
    return [name for name, p in head.named_parameters() if p.requires_grad and id(p) not in read]


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _hold_input(head: Any, forward: Callable[..., Any], hidden: Tensor) -> Any:
    holder: LinearHead = head.dtcp_linear_head
    if not holder.holding:
        return forward(hidden)
    own = hidden
    if isinstance(hidden, DTensor):
        # As a style of tensor parallelism hands it to the head, the same on every rank.
        own = hidden.to_local(grad_placements=hidden.placements)
    bias = getattr(head, "bias", None)
    # The loss computes outside of autocast.
    own, weight, *biases = as_autocast_casts(own, head.weight, *([] if bias is None else [bias]))
    holder.held = LinearLogits(own, weight, biases[0] if biases else None)
    return forward(hidden[:, :1])


def _after_head(config: Any) -> tuple[float, float]:
    """The factor and the cap of logits, by the names that families have for them."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale *= getattr(config, name)
    if getattr(config, "logits_scaling", None) is not None:
        # Granite divides by it.
        scale /= config.logits_scaling
    return scale, getattr(config, "final_logit_softcapping", None) or 0.0

"""The recurrent seams: mixers in which a token reads a state of what came before it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dtcp.mixer import BatchMetadata, Mixer
from dtcp.recurrent.conv import causal_conv, conv_metadata
from dtcp.recurrent.op import delta_metadata, gated_delta_rule
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.masks import Coords


class RecurrentMixer(Mixer):
    """A mixer in which a token reads what was handed on from segment to segment."""

    inside: type[SequenceLayout] | None = None
    """The layout its tokens lie in, where a style has dealt them anew; None: the batch's."""


class GatedDeltaRule(RecurrentMixer):
    """Linear attention with a forgetting, self-correcting state, one document at a time.

    Where g has a number for each key channel, it is Kimi's (Kimi Delta Attention, 2025,
    https://arxiv.org/abs/2510.26692).

    Args:
        normalize: scale each query and key head to length 1.
        scale: factor on the queries; None for key_dim ** -0.5.
    """

    def __init__(self, *, normalize: bool = True, scale: float | None = None) -> None:
        super().__init__()
        self.normalize, self.scale = normalize, scale
        self.metadata_key = "gated delta rule"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, metadata: BatchMetadata
    ) -> Tensor:
        """Write each token's value under its key, and read the state with its query.

        Args:
            q, k: [B, L, G, K].
            v: [B, L, H, V], H a multiple of G; value head h reads key head h // (H / G).
            g: [B, L, H], log of the share of the state that each token keeps, at most 0; or
                [B, L, H, K], of each row of the state.
            beta: [B, L, H], how much of what its key held a token replaces, 0 to 1.
            metadata: what the batch brings.
        Returns:
            [B, L, H, V].
        """
        return gated_delta_rule(*self.unit(q, k), v, g, beta, metadata[self.metadata_key])

    def alone(self, *args: Any, **kwargs: Any) -> Tensor:
        v: Tensor = args[2]
        return v

    def unit(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k as the rule takes them."""
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return (_unit(q) * scale, _unit(k)) if self.normalize else (q * scale, k)

    def make_metadata(self, coords: Coords, layout: SequenceLayout | None) -> Sequence[Tensor]:
        _refuse_sharded(self, layout)
        return delta_metadata(coords, None)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, scale={self.scale}"


class CausalConv1d(RecurrentMixer):
    """A convolution of each channel with its own taps, over the last w tokens of a document.

    Args:
        width: w, tokens, the token itself included.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.metadata_key = f"causal conv of {width}"

    def forward(self, x: Tensor, weight: Tensor, metadata: BatchMetadata) -> Tensor:
        """x [B, L, C] and weight [C, w], a token's own tap last -> [B, L, C]."""
        return causal_conv(x, weight, metadata[self.metadata_key])

    def make_metadata(self, coords: Coords, layout: SequenceLayout | None) -> Sequence[Tensor]:
        _refuse_sharded(self, layout)
        return conv_metadata(coords, self.width, None)

    def alone(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0]
        return x

    def extra_repr(self) -> str:
        return f"width={self.width}"


def _unit(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def _refuse_sharded(mixer: Mixer, layout: SequenceLayout | None) -> None:
    if layout is not None and layout.num_shards > 1:
        raise ValueError(
            f"A sequence is sharded only where every mixer is claimed by a plan, got an "
            f"unclaimed {mixer} with {layout}: add a style for it to the plan."
        )

"""The recurrent seams: mixers in which a token reads a state of what came before it."""

from typing import Any

import torch
from torch import Tensor

from dtcp.metadata import AttentionMetadata, BatchMetadata
from dtcp.mixer import Mixer
from dtcp.recurrent.conv import causal_conv
from dtcp.recurrent.linear import gated_linear_attention
from dtcp.recurrent.metadata import ConvMetadata, DeltaMetadata, conv_metadata, delta_metadata
from dtcp.recurrent.op import gated_delta_rule
from dtcp.sequence.arguments import FLOATS, check_ints, check_scale, check_tensor
from dtcp.sequence.coords import Coords
from dtcp.sequence.layout import SequenceLayout


class RecurrentMixer(Mixer):
    """A mixer in which a token reads what was handed on from segment to segment."""

    inside: type[SequenceLayout] | None = None
    """The layout its tokens lie in, where RelayoutCP has moved them; None: the batch's."""

    def reads(self) -> tuple[object, ...]:
        return (self.inside,)

    def own_layout(self, layout: SequenceLayout) -> SequenceLayout:
        """The layout its tokens lie in, where the batch's is this one."""
        return layout if self.inside is None else self.inside(layout.seq_len, layout.num_shards)

    def check_setting(self, name: str, value: Any) -> None:
        # A learned one is a factor like any other, outside of the op.
        if name == "scale" and value is not None and not isinstance(value, Tensor):
            check_scale(value)

    def exchange(self, metadata: DeltaMetadata, k: Tensor, v: Tensor) -> dict[str, Any]:
        """How states come from other ranks, as the ops take it; here: none do."""
        return {}

    def forward_without_mixing(self, *args: Any, **kwargs: Any) -> Tensor:
        return args[2]

    def whole_row_metadata(self, coords: Coords) -> AttentionMetadata:
        return delta_metadata(coords, None)


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
        self.set_metadata_key()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, attn_metadata: BatchMetadata
    ) -> Tensor:
        """Write each token's value under its key, and read the state with its query.

        Args:
            q, k: [B, L, G, K].
            v: [B, L, H, V], H a multiple of G; value head h reads key head h // (H / G).
            g: [B, L, H], log of the share of the state that each token keeps, at most 0; or
                [B, L, H, K], of each row of the state.
            beta: [B, L, H], how much of what its key held a token replaces, 0 to 1.
            attn_metadata: what the batch brings.
        Returns:
            [B, L, H, V].
        """
        metadata: DeltaMetadata = self.own(attn_metadata)
        exchange = self.exchange(metadata, k, v)
        return gated_delta_rule(*self.unit(q, k), v, g, beta, metadata, **exchange)

    def unit(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k as the rule takes them."""
        check_tensor("The delta rule", shape="[B, L, G, K]", ndim=4, dtypes=FLOATS, q=q, k=k)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return (_unit(q, scale), _unit(k)) if self.normalize else (q * scale, k)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, scale={self.scale}"


class GatedLinearAttention(RecurrentMixer):
    """Linear attention with a forgetting state, one document at a time.

    Where g has a number for each head, it is that of Mamba-2 (q = C, k = B, v = dt * x, g = dt * A,
    scale=1.0) and of lightning attention (g the head's slope, the same for every token); with a
    number for each key channel, of gated linear attention
    (Yang et al. 2023, https://arxiv.org/abs/2312.06635).

    Args:
        scale: factor on the queries; None for key_dim ** -0.5.
    """

    def __init__(self, *, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.set_metadata_key()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, attn_metadata: BatchMetadata
    ) -> Tensor:
        """Add each token's value under its key, and read the state with its query.

        Args:
            q, k: [B, L, G, K].
            v: [B, L, H, V], H a multiple of G; value head h reads key head h // (H / G). In the
                dtype of q and k, or in fp32 beside smaller ones.
            g: [B, L, H], log of the share of the state that each token keeps, at most 0; or
                [B, L, H, K], of each row of the state.
            attn_metadata: what the batch brings.
        Returns:
            [B, L, H, V], in the dtype of v.
        """
        metadata: DeltaMetadata = self.own(attn_metadata)
        exchange = self.exchange(metadata, k, v)
        return gated_linear_attention(self.scaled(q), k, v, g, metadata, **exchange)

    def scaled(self, q: Tensor) -> Tensor:
        """The queries as the op takes them."""
        check_tensor("Linear attention", shape="[B, L, G, K]", ndim=4, dtypes=FLOATS, q=q)
        return q * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class CausalConv1d(RecurrentMixer):
    """A convolution of each channel with its own taps, over w tokens of a document.

    Args:
        width: w, tokens, the token itself included.
        dilation: d, tokens from one tap to the next: 1 for the last w tokens.
    """

    def __init__(self, width: int, *, dilation: int = 1) -> None:
        super().__init__()
        check_ints("CausalConv1d", least=1, width=width, dilation=dilation)
        self.width, self.dilation = width, dilation
        self.set_metadata_key()

    @property
    def reach(self) -> int:
        """Tokens to its left that a token reads from, (w - 1) * d."""
        return (self.width - 1) * self.dilation

    def forward(
        self, x: Tensor, weight: Tensor, attn_metadata: BatchMetadata, *, bias: Tensor | None = None
    ) -> Tensor:
        """x [B, L, C], weight [C, w], a token's own tap last, and bias [C] -> [B, L, C]."""
        self.check_weight(x, weight, bias)
        metadata: ConvMetadata = self.own(attn_metadata)
        return causal_conv(
            x, weight, metadata, bias=bias, groups=self.groups, dilation=self.dilation
        )

    def check_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Refuse taps of another width than the metadata are of, or of other channels."""
        check_tensor("A convolution", shape="[B, L, C]", ndim=3, dtypes=FLOATS, x=x)
        check_tensor("A convolution", shape="[C, w]", ndim=2, dtypes=FLOATS, weight=weight)
        if weight.shape != (x.shape[-1], self.width):
            raise ValueError(
                f"A convolution of width {self.width} has so many taps per channel, got "
                f"weight.shape={tuple(weight.shape)} with x.shape={tuple(x.shape)}: give [C, w]."
            )
        if bias is not None:
            check_tensor("A convolution", shape="[C]", ndim=1, dtypes=FLOATS, bias=bias)
            if bias.shape != (x.shape[-1],):
                raise ValueError(
                    f"A convolution adds one number to each channel, got bias.shape="
                    f"{tuple(bias.shape)} with x.shape={tuple(x.shape)}: give [C]."
                )

    def reads(self) -> tuple[object, ...]:
        return (*super().reads(), self.reach)

    def whole_row_metadata(self, coords: Coords) -> ConvMetadata:
        return conv_metadata(coords, self.reach + 1, None)

    def forward_without_mixing(self, *args: Any, **kwargs: Any) -> Tensor:
        return args[0]

    def extra_repr(self) -> str:
        return f"width={self.width}, dilation={self.dilation}"


def _unit(x: Tensor, length: float = 1.0) -> Tensor:
    """x with every head of this length, rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt() * length
    return (wide * factor).to(x.dtype)

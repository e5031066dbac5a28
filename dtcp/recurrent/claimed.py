"""What a recurrent mixer becomes once a style has taken it over."""

from typing import Any

from torch import Tensor

from dtcp.metadata import BatchMetadata
from dtcp.mixer import ClaimedMixer
from dtcp.recurrent.conv import causal_conv
from dtcp.recurrent.linear import gated_linear_attention
from dtcp.recurrent.metadata import DeltaMetadata
from dtcp.recurrent.mixer import CausalConv1d, GatedDeltaRule, GatedLinearAttention
from dtcp.recurrent.moves import DeltaShape, LinearShape
from dtcp.recurrent.op import gated_delta_rule


class HandsStatesOn(ClaimedMixer):
    """A mixer whose states come from other ranks."""

    def exchange(self, metadata: DeltaMetadata, shape: DeltaShape) -> dict[str, Any]:
        """How they come, as the ops take it."""
        ranks, segments = metadata.chain.shape
        states = self.style.states
        scan = not metadata.in_stretches and states.scans(ranks, segments, shape.summary)
        return {"scan": scan, "groups": self.groups}


class ContextParallelDeltaRule(HandsStatesOn, GatedDeltaRule):
    """A GatedDeltaRule that a style has taken over."""

    def carry_out(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, attn_metadata: BatchMetadata
    ) -> Tensor:
        metadata: DeltaMetadata = self.own(attn_metadata)
        exchange = self.exchange(metadata, DeltaShape.of(k, v))
        return gated_delta_rule(*self.unit(q, k), v, g, beta, metadata, **exchange)


class ContextParallelLinearAttention(HandsStatesOn, GatedLinearAttention):
    """A GatedLinearAttention that a style has taken over."""

    def carry_out(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, attn_metadata: BatchMetadata
    ) -> Tensor:
        metadata: DeltaMetadata = self.own(attn_metadata)
        exchange = self.exchange(metadata, LinearShape.of(k, v))
        return gated_linear_attention(self.scaled(q), k, v, g, metadata, **exchange)


class ContextParallelConv(ClaimedMixer, CausalConv1d):
    """A CausalConv1d that a style has taken over."""

    def carry_out(
        self,
        x: Tensor,
        weight: Tensor,
        attn_metadata: BatchMetadata,
        *,
        bias: Tensor | None = None,
    ) -> Tensor:
        self.check_weight(x, weight, bias)
        metadata = self.own(attn_metadata)
        options = {"groups": self.groups, "dilation": self.dilation}
        return causal_conv(x, weight, metadata, bias=bias, **options)

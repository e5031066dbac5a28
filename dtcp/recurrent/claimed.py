"""What a recurrent mixer becomes once a style has taken it over."""

from torch import Tensor

from dtcp.metadata import BatchMetadata
from dtcp.mixer import ClaimedMixer
from dtcp.recurrent.conv import causal_conv
from dtcp.recurrent.linear import gated_linear_attention
from dtcp.recurrent.metadata import DeltaMetadata
from dtcp.recurrent.mixer import CausalConv1d, GatedDeltaRule, GatedLinearAttention
from dtcp.recurrent.moves import DeltaShape, LinearShape
from dtcp.recurrent.op import gated_delta_rule


class ContextParallelDeltaRule(ClaimedMixer, GatedDeltaRule):
    """A GatedDeltaRule that a style has taken over."""

    def carry_out(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, attn_metadata: BatchMetadata
    ) -> Tensor:
        metadata: DeltaMetadata = self.own(attn_metadata)
        ranks, segments = metadata.chain.shape
        scan = not metadata.in_stretches and self.style.states.scans(
            ranks, segments, DeltaShape.of(k, v).summary
        )
        parts = (*self.unit(q, k), v, g, beta)
        return gated_delta_rule(*parts, metadata, scan=scan, groups=self.groups)


class ContextParallelLinearAttention(ClaimedMixer, GatedLinearAttention):
    """A GatedLinearAttention that a style has taken over."""

    def carry_out(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, attn_metadata: BatchMetadata
    ) -> Tensor:
        metadata: DeltaMetadata = self.own(attn_metadata)
        ranks, segments = metadata.chain.shape
        scan = not metadata.in_stretches and self.style.states.scans(
            ranks, segments, LinearShape.of(k, v).summary
        )
        parts = (self.scaled(q), k, v, g)
        return gated_linear_attention(*parts, metadata, scan=scan, groups=self.groups)


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

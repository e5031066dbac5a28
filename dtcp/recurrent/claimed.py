"""What a recurrent mixer becomes once a style has taken it over."""

from typing import Any, ClassVar

from torch import Tensor

from dtcp.mixer import ClaimedMixer
from dtcp.recurrent.metadata import DeltaMetadata
from dtcp.recurrent.mixer import CausalConv1d, GatedDeltaRule, GatedLinearAttention, RecurrentMixer
from dtcp.recurrent.moves import DeltaShape, LinearShape


class HandsStatesOn(ClaimedMixer, RecurrentMixer):
    """A mixer whose states come from other ranks."""

    shape: ClassVar[type[DeltaShape]]
    """Sizes of its call."""

    def exchange(self, metadata: DeltaMetadata, k: Tensor, v: Tensor) -> dict[str, Any]:
        ranks, segments = metadata.chain.shape
        states, summary = self.style.states, self.shape.of(k, v).summary
        scan = not metadata.in_stretches and states.scans(ranks, segments, summary)
        return {"scan": scan, "groups": self.groups}


class ContextParallelDeltaRule(HandsStatesOn, GatedDeltaRule):
    """A GatedDeltaRule that a style has taken over."""

    carry_out = GatedDeltaRule.forward
    shape = DeltaShape


class ContextParallelLinearAttention(HandsStatesOn, GatedLinearAttention):
    """A GatedLinearAttention that a style has taken over."""

    carry_out = GatedLinearAttention.forward
    shape = LinearShape


class ContextParallelConv(ClaimedMixer, CausalConv1d):
    """A CausalConv1d that a style has taken over."""

    carry_out = CausalConv1d.forward

"""Recurrent mixers, and how they are carried out on a sharded sequence."""

from dtcp.recurrent.mixer import CausalConv1d, GatedDeltaRule, GatedLinearAttention
from dtcp.recurrent.relayout_mixer import RelayoutCP
from dtcp.recurrent.style import (
    CausalConvCP,
    FewestBytes,
    GatedDeltaCP,
    GatedLinearCP,
    GatherStates,
    ScanStates,
)

__all__ = [
    "CausalConv1d",
    "CausalConvCP",
    "FewestBytes",
    "GatedDeltaCP",
    "GatedDeltaRule",
    "GatedLinearAttention",
    "GatedLinearCP",
    "GatherStates",
    "RelayoutCP",
    "ScanStates",
]

"""Recurrent mixers, and how they are carried out on a sharded sequence."""

from dtcp.recurrent.mixer import CausalConv1d, GatedDeltaRule, GatedLinearAttention
from dtcp.recurrent.relayout_mixer import RelayoutCP
from dtcp.recurrent.state_exchange import FewestBytes, GatherStates, ScanStates
from dtcp.recurrent.style import CausalConvCP, GatedDeltaCP, GatedLinearCP

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

"""Context-parallel softmax attention: one strategy a file, each a ParallelStyle."""

from dtcp.attention.all_gather import AllGatherAttention
from dtcp.attention.brought import BroughtAttention
from dtcp.attention.halo import HaloAttention
from dtcp.attention.hybrid import HybridAttention
from dtcp.attention.ring import RingAttention
from dtcp.attention.ulysses import UlyssesAttention

__all__ = [
    "AllGatherAttention",
    "BroughtAttention",
    "HaloAttention",
    "HybridAttention",
    "RingAttention",
    "UlyssesAttention",
]

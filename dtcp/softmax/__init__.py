"""Context-parallel softmax attention: one strategy a file, each a ParallelStyle."""

from dtcp.softmax.all_gather import AllGatherAttention
from dtcp.softmax.halo import HaloAttention
from dtcp.softmax.hybrid import HybridAttention
from dtcp.softmax.ring import RingAttention
from dtcp.softmax.shared_kv import SharedKVAttention
from dtcp.softmax.ulysses import UlyssesAttention

__all__ = [
    "AllGatherAttention",
    "HaloAttention",
    "HybridAttention",
    "RingAttention",
    "SharedKVAttention",
    "UlyssesAttention",
]

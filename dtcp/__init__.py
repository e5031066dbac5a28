"""Context parallelism for long-sequence training: compiled, byte-minimal, never silently wrong."""

from dtcp.attention import (
    AllGatherAttention,
    HaloAttention,
    HybridAttention,
    RingAttention,
    UlyssesAttention,
)
from dtcp.attention.sdpa import install_sdpa_rules, sequence_layout
from dtcp.batch import BatchPlan, TokenField, shard_batch, shift_labels
from dtcp.compile import EagerIsland, InGraph
from dtcp.documents import Documents
from dtcp.huggingface import causal_lm_loss
from dtcp.layout import BlockBalanced, Contiguous, HeadTail, PerDocument
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.masks import Bidirectional, BlockBidirectional, Causal, PrefixLM, SlidingWindow
from dtcp.mesh import Degrees, ParallelMesh
from dtcp.mixers import SoftmaxAttention, batch_tables
from dtcp.recurrent import CausalConv1d, CausalConvCP, GatedDeltaCP, GatedDeltaRule, RelayoutCP
from dtcp.style import AttentionStyle, apply_plan

__all__ = [
    "AllGatherAttention",
    "AttentionStyle",
    "BatchPlan",
    "Bidirectional",
    "BlockBalanced",
    "BlockBidirectional",
    "Causal",
    "CausalConv1d",
    "CausalConvCP",
    "Contiguous",
    "Degrees",
    "Documents",
    "EagerIsland",
    "GatedDeltaCP",
    "GatedDeltaRule",
    "HaloAttention",
    "HeadTail",
    "HybridAttention",
    "InGraph",
    "ParallelMesh",
    "PerDocument",
    "PrefixLM",
    "RelayoutCP",
    "RingAttention",
    "SlidingWindow",
    "SoftmaxAttention",
    "TokenField",
    "UlyssesAttention",
    "apply_plan",
    "batch_tables",
    "causal_lm_loss",
    "global_token_count",
    "install_sdpa_rules",
    "sequence_layout",
    "shard_batch",
    "shift_labels",
    "token_mean_loss",
]

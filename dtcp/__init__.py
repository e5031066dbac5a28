"""Context parallelism for long-sequence training: compiled, byte-minimal, never silently wrong."""

from dtcp.batch import shard_batch
from dtcp.compile import EagerIsland, InGraph
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import causal_lm_loss
from dtcp.labels import shift_labels
from dtcp.loss import global_token_count, token_log_probs, token_mean_loss
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.recurrent import (
    CausalConv1d,
    CausalConvCP,
    GatedDeltaCP,
    GatedDeltaRule,
    GatedLinearAttention,
    GatedLinearCP,
    RelayoutCP,
)
from dtcp.rows import TokenField
from dtcp.sdpa.aten_rules import install_sdpa_rules
from dtcp.sdpa.sequence_layout import sequence_layout
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import (
    AttentionChunks,
    Bidirectional,
    BlockBidirectional,
    Causal,
    MemoryDocument,
    SlidingWindow,
)
from dtcp.sequence.per_document import PerDocument
from dtcp.sequence.prefix_masks import FirstTokens, Prefix, PrefixLM
from dtcp.sharded_batch import ShardedBatch
from dtcp.softmax import (
    AllGatherAttention,
    HaloAttention,
    HybridAttention,
    RingAttention,
    UlyssesAttention,
)
from dtcp.softmax.distance_bias import alibi_slopes, t5_distance_bias
from dtcp.softmax.mixer import CrossAttention, LatentAttention, SoftmaxAttention
from dtcp.softmax.style import AttentionStyle
from dtcp.token_dropout import TokenDropout

__all__ = [
    "AllGatherAttention",
    "AttentionChunks",
    "AttentionStyle",
    "Bidirectional",
    "BlockBalanced",
    "BlockBidirectional",
    "Causal",
    "CausalConv1d",
    "CausalConvCP",
    "Contiguous",
    "CrossAttention",
    "Degrees",
    "DocumentBalanced",
    "Documents",
    "EagerIsland",
    "FirstTokens",
    "GatedDeltaCP",
    "GatedDeltaRule",
    "GatedLinearAttention",
    "GatedLinearCP",
    "HaloAttention",
    "HeadTail",
    "HybridAttention",
    "InGraph",
    "LatentAttention",
    "MemoryDocument",
    "ParallelMesh",
    "PerDocument",
    "Prefix",
    "PrefixLM",
    "RelayoutCP",
    "RingAttention",
    "ShardedBatch",
    "SlidingWindow",
    "SoftmaxAttention",
    "TokenDropout",
    "TokenField",
    "UlyssesAttention",
    "alibi_slopes",
    "apply_plan",
    "batch_metadata",
    "causal_lm_loss",
    "global_token_count",
    "install_sdpa_rules",
    "sequence_layout",
    "shard_batch",
    "shift_labels",
    "t5_distance_bias",
    "token_log_probs",
    "token_mean_loss",
]

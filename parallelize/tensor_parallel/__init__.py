"""The styles that a tensor-parallel plan needs beside torch's own."""

from dtcp.parallelize.tensor_parallel.distribute import distribute_parameter
from dtcp.parallelize.tensor_parallel.divisible import check_divisible
from dtcp.parallelize.tensor_parallel.group_norm import GroupNormOfParts, gated_norm
from dtcp.parallelize.tensor_parallel.heads_of_layer import (
    WHOLE_FOR_HEADS,
    HeadsOfLayer,
    SumForHeads,
)
from dtcp.parallelize.tensor_parallel.huggingface_experts import (
    HFExpertTensorParallel,
    WholeExperts,
    is_experts,
    joined_view,
    separate_gate_and_up,
    why_not_known,
    why_not_split,
)
from dtcp.parallelize.tensor_parallel.kv_heads import (
    ReplicatedKVHeads,
    kv_projection_style,
    warn_of_replicated_kv_heads,
)
from dtcp.parallelize.tensor_parallel.latent_heads import LatentHeads
from dtcp.parallelize.tensor_parallel.local_params import (
    LocalParams,
    ModuleView,
    local_parameters,
)
from dtcp.parallelize.tensor_parallel.regions import copy_to_region, reduce_from_region
from dtcp.parallelize.tensor_parallel.replicate_input import (
    AllReduceInputGrad,
    ReplicateInput,
    ReplicateInputWithSinks,
    RowwiseOwnOutput,
)
from dtcp.parallelize.tensor_parallel.replicated_params import ReplicatedLinear, ReplicatedParams
from dtcp.parallelize.tensor_parallel.segments import Segment, SegmentRows
from dtcp.parallelize.tensor_parallel.vocab_parallel import (
    ScaledVocabParallelEmbedding,
    VocabParallelEmbedding,
)
from dtcp.parallelize.tensor_parallel.weight_modules import ReplicatedWeight, RowShardedWeight

__all__ = [
    "WHOLE_FOR_HEADS",
    "AllReduceInputGrad",
    "GroupNormOfParts",
    "HFExpertTensorParallel",
    "HeadsOfLayer",
    "LatentHeads",
    "LocalParams",
    "ModuleView",
    "ReplicateInput",
    "ReplicateInputWithSinks",
    "ReplicatedKVHeads",
    "ReplicatedLinear",
    "ReplicatedParams",
    "ReplicatedWeight",
    "RowShardedWeight",
    "RowwiseOwnOutput",
    "ScaledVocabParallelEmbedding",
    "Segment",
    "SegmentRows",
    "SumForHeads",
    "VocabParallelEmbedding",
    "WholeExperts",
    "check_divisible",
    "copy_to_region",
    "distribute_parameter",
    "gated_norm",
    "is_experts",
    "joined_view",
    "kv_projection_style",
    "local_parameters",
    "reduce_from_region",
    "separate_gate_and_up",
    "warn_of_replicated_kv_heads",
    "why_not_known",
    "why_not_split",
]

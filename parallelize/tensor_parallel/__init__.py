"""The styles that a tensor-parallel plan needs beside torch's own."""

from dtcp.parallelize.tensor_parallel.conv1d import Conv1DRows, Conv1DSum, is_conv1d
from dtcp.parallelize.tensor_parallel.distribute import check_divisible, distribute_parameter
from dtcp.parallelize.tensor_parallel.group_norm import GroupNormOfParts, gated_norm
from dtcp.parallelize.tensor_parallel.heads_of_layer import (
    WHOLE_FOR_HEADS,
    ChangedConfig,
    HeadsOfLayer,
    SumForHeads,
    of_config,
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
    reads_its_class,
)
from dtcp.parallelize.tensor_parallel.regions import copy_to_region, reduce_from_region
from dtcp.parallelize.tensor_parallel.replicate_input import (
    MEMORY,
    AllReduceInputGrad,
    ReplicateInput,
    ReplicateInputWithSinks,
    RowwiseOwnOutput,
)
from dtcp.parallelize.tensor_parallel.replicated_params import ReplicatedLinear, ReplicatedParams
from dtcp.parallelize.tensor_parallel.segments import (
    RowRun,
    Segment,
    SegmentRows,
    cut,
    rows_of_heads,
)
from dtcp.parallelize.tensor_parallel.vocab_parallel import (
    ScaledVocabParallelEmbedding,
    VocabParallelEmbedding,
)
from dtcp.parallelize.tensor_parallel.weight_modules import ReplicatedWeight, RowShardedWeight

__all__ = [
    "MEMORY",
    "WHOLE_FOR_HEADS",
    "AllReduceInputGrad",
    "ChangedConfig",
    "Conv1DRows",
    "Conv1DSum",
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
    "RowRun",
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
    "cut",
    "distribute_parameter",
    "gated_norm",
    "is_conv1d",
    "is_experts",
    "joined_view",
    "kv_projection_style",
    "local_parameters",
    "of_config",
    "reads_its_class",
    "reduce_from_region",
    "rows_of_heads",
    "separate_gate_and_up",
    "warn_of_replicated_kv_heads",
    "why_not_known",
    "why_not_split",
]

"""Plans: what each module of a model becomes on a mesh, and the order in which it does."""

if __name__ != "dtcp.parallelize":
    raise ImportError(
        f"The plans are imported as dtcp.parallelize, got {__name__}: write dtcp.parallelize in "
        f"the import, for two names make two copies of every class."
    )

from dtcp.parallelize.activation_checkpoint import (
    ActivationCheckpoint,
    FullCheckpoint,
    NoCheckpoint,
    SelectiveCheckpoint,
)
from dtcp.parallelize.apply import ParallelPlan, parallelize
from dtcp.parallelize.compile import Compile
from dtcp.parallelize.experts import ExpertParallel
from dtcp.parallelize.fsdp import FSDP
from dtcp.parallelize.load_hf import load_hf
from dtcp.parallelize.plans.deepseek_v4 import balance_experts, deepseek_v4_plan
from dtcp.parallelize.plans.gemma4 import gemma4_plan
from dtcp.parallelize.plans.huggingface import parallelize_hf
from dtcp.parallelize.plans.llama import llama_plan
from dtcp.parallelize.plans.qwen3_5 import qwen3_5_plan
from dtcp.parallelize.save_hf import save_hf

__all__ = [
    "FSDP",
    "ActivationCheckpoint",
    "Compile",
    "ExpertParallel",
    "FullCheckpoint",
    "NoCheckpoint",
    "ParallelPlan",
    "SelectiveCheckpoint",
    "balance_experts",
    "deepseek_v4_plan",
    "gemma4_plan",
    "llama_plan",
    "load_hf",
    "parallelize",
    "parallelize_hf",
    "qwen3_5_plan",
    "save_hf",
]

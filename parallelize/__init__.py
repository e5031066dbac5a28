"""Plans: what each module of a model becomes on a mesh, and the order in which it does."""

from parallelize.activation_checkpoint import (
    ActivationCheckpoint,
    FullCheckpoint,
    NoCheckpoint,
    SelectiveCheckpoint,
)
from parallelize.apply import ParallelPlan, parallelize
from parallelize.compile import Compile
from parallelize.deepseek_v4 import balance_experts, deepseek_v4_plan
from parallelize.fsdp import FSDP
from parallelize.gemma4 import gemma4_plan
from parallelize.huggingface import parallelize_hf
from parallelize.huggingface_load import load_hf
from parallelize.llama import llama_plan
from parallelize.qwen3_5 import qwen3_5_plan

__all__ = [
    "FSDP",
    "ActivationCheckpoint",
    "Compile",
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
]

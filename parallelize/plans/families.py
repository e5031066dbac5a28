"""dtcp's model families: a record each, which the planner and the trainer read.

To add one, write its record here and, for pipeline stages, its forward in
torchtitan/stage_forwards.py. `torchtitan.model_spec.spec_of` takes a record from anywhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.mesh import ParallelMesh
from dtcp.models import deepseek_v4, gemma4, llama, qwen3_5
from dtcp.parallelize.apply import ParallelPlan
from dtcp.parallelize.plans.deepseek_v4 import balance_experts, deepseek_v4_plan
from dtcp.parallelize.plans.gemma4 import gemma4_plan
from dtcp.parallelize.plans.llama import llama_plan
from dtcp.parallelize.plans.qwen3_5 import qwen3_5_plan
from dtcp.recurrent import RelayoutCP
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax.style import AttentionStyle

StateDict = dict[str, Any]
MakeAttention = Callable[[], AttentionStyle]
FamilyPlan = Callable[[Any, ParallelMesh, MakeAttention, type[SequenceLayout]], ParallelPlan]
"""Of a model's config, on a mesh, for a strategy, made where it is read, and a layout."""


@dataclass(frozen=True)
class Family:
    """The parts of a model family.

    Args:
        model: built from its config; `init_weights()` draws its weights. The config has
            vocab_size, num_layers, num_heads, head_dim and tied.
        plan: of a config, a mesh, a strategy and a layout.
        model_types: Hugging Face's, of the configs that `config_from_hf` reads.
        config_from_hf: the fields of a `config.json` to a config.
        config_to_hf: the `config.json` that goes with the weights.
        from_hf: a state dict of a Hugging Face checkpoint and the config to the model's names.
        to_hf: the way back.
        mtp_depths: how many tokens further ahead than the next one a config's model predicts; its
            forward then takes `mtp_input_ids` and returns a tuple.
        num_experts: how many each of a config's layers chooses from; 0 for none.
        takes_strategy: whether a run's strategy, boundary, kernel and reduce_dtype are for its
            attention.
        before_step: done before every step of the optimizer, with the model and the axis of all
            ranks that have tokens; None for families with nothing outside of autograd.
    """

    name: str
    model: type[Any]
    plan: FamilyPlan
    model_types: tuple[str, ...]
    config_from_hf: Callable[[Mapping[str, Any]], Any]
    config_to_hf: Callable[[Any], dict[str, Any]]
    from_hf: Callable[[StateDict, Any], StateDict]
    to_hf: Callable[[StateDict, Any], StateDict]
    mtp_depths: Callable[[Any], int] = lambda _: 0
    num_experts: Callable[[Any], int] = lambda _: 0
    takes_strategy: bool = True
    before_step: Callable[[nn.Module, DeviceMesh | None], None] | None = None


def _qwen3_5_plan(
    config: Any, mesh: ParallelMesh, attention: MakeAttention, layout: type[SequenceLayout]
) -> ParallelPlan:
    """Where ranks have many pieces, each with a state of its own, tokens move to another layout."""
    relayout = RelayoutCP() if layout in (PerDocument, BlockBalanced) else None
    return qwen3_5_plan(config, mesh, attention(), relayout=relayout)


LLAMA = Family(
    name="llama",
    model=llama.Llama,
    plan=lambda config, mesh, attention, _: llama_plan(config, mesh, attention()),
    model_types=("llama", "qwen2", "qwen3"),
    config_from_hf=llama.config_from_hf,
    config_to_hf=llama.config_to_hf,
    from_hf=llama.from_hf,
    to_hf=llama.to_hf,
)

GEMMA4 = Family(
    name="gemma4",
    model=gemma4.Gemma4,
    plan=lambda config, mesh, attention, _: gemma4_plan(config, mesh, attention()),
    model_types=("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
    config_from_hf=gemma4.config_from_hf,
    config_to_hf=gemma4.config_to_hf,
    from_hf=gemma4.from_hf,
    to_hf=gemma4.to_hf,
    num_experts=lambda config: config.moe.num_experts if config.moe else 0,
)

QWEN3_5 = Family(
    name="qwen3_5",
    model=qwen3_5.Qwen35,
    plan=_qwen3_5_plan,
    model_types=("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    config_from_hf=qwen3_5.config_from_hf,
    config_to_hf=qwen3_5.config_to_hf,
    from_hf=qwen3_5.from_hf,
    to_hf=qwen3_5.to_hf,
    mtp_depths=lambda config: config.num_mtp_layers,
    num_experts=lambda config: getattr(config.feed_forward, "num_experts", 0),
)

DEEPSEEK_V4 = Family(
    name="deepseek_v4",
    model=deepseek_v4.DeepseekV4,
    # Its mixers have one strategy of their own.
    plan=lambda config, mesh, *_: deepseek_v4_plan(config, mesh),
    model_types=("deepseek_v4",),
    config_from_hf=deepseek_v4.config_from_hf,
    config_to_hf=deepseek_v4.config_to_hf,
    from_hf=deepseek_v4.from_hf,
    to_hf=deepseek_v4.to_hf,
    mtp_depths=lambda config: config.num_mtp_layers,
    num_experts=lambda config: config.num_experts,
    takes_strategy=False,
    before_step=balance_experts,
)

FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (LLAMA, GEMMA4, QWEN3_5, DEEPSEEK_V4)
}

MODEL_TYPES: Mapping[str, Family] = {
    model_type: family for family in FAMILIES.values() for model_type in family.model_types
}
"""The model types of Hugging Face that dtcp's own families implement."""

"""The plans of dtcp's model families, by name and called alike."""

from collections.abc import Callable, Mapping
from typing import Any

from dtcp.distributed.mesh import ParallelMesh
from dtcp.parallelize.apply import ParallelPlan
from dtcp.parallelize.plans.deepseek_v4 import deepseek_v4_plan
from dtcp.parallelize.plans.gemma4 import gemma4_plan
from dtcp.parallelize.plans.llama import llama_plan
from dtcp.parallelize.plans.qwen3_5 import qwen3_5_plan
from dtcp.recurrent import RelayoutCP
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax.style import AttentionStyle

MakeAttention = Callable[[], AttentionStyle]
FamilyPlan = Callable[[Any, ParallelMesh, MakeAttention, type[SequenceLayout]], ParallelPlan]
"""Of a model's config, on a mesh, for a strategy, made where it is read, and a layout."""


def _qwen3_5_plan(
    config: Any, mesh: ParallelMesh, attention: MakeAttention, layout: type[SequenceLayout]
) -> ParallelPlan:
    """Where ranks have many pieces, each with a state of its own, tokens move to another layout."""
    relayout = RelayoutCP() if layout in (PerDocument, BlockBalanced) else None
    return qwen3_5_plan(config, mesh, attention(), relayout=relayout)


FAMILY_PLANS: Mapping[str, FamilyPlan] = {
    "llama": lambda config, mesh, attention, _: llama_plan(config, mesh, attention()),
    "gemma4": lambda config, mesh, attention, _: gemma4_plan(config, mesh, attention()),
    "qwen3_5": _qwen3_5_plan,
    # Its mixers have one strategy of their own.
    "deepseek_v4": lambda config, mesh, *_: deepseek_v4_plan(config, mesh),
}

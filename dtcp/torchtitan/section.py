"""The `dtcp` section of a config: names that a person types, and the classes they stand for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dtcp.compile import Boundary, EagerIsland, InGraph
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention
from dtcp.softmax.default import default_attention
from dtcp.softmax.style import AttentionStyle

LAYOUT_CLASSES: Mapping[str, type[SequenceLayout]] = {
    "contiguous": Contiguous,
    "head_tail": HeadTail,
    "per_document": PerDocument,
    "block_balanced": BlockBalanced,
    "document_balanced": DocumentBalanced,
}

StrategyName = Literal["default", "ring", "all_gather", "ulysses", "hybrid", "auto"]
LayoutName = Literal[
    "contiguous", "head_tail", "per_document", "block_balanced", "document_balanced", "auto"
]
AUTO = "auto"
_OPEN = (
    "What is left to the planner is chosen by train.py where its ranks start, got dtcp.{0}='auto' "
    "of a section that no run has closed: name {1}."
)


@dataclass(kw_only=True, slots=True)
class Section:
    """How attention is carried out over `parallelism.context_parallel_degree` ranks."""

    strategy: StrategyName = "default"
    """Exchange between the ranks of a context-parallel group: "default" is a ring on CPUs and
    all-gather on GPUs, whose kernels round what a ring merges; "auto" is the planner's choice."""

    ulysses_degree: int = 2
    """How many ranks exchange heads in the hybrid strategy; the ring runs between such groups."""

    layout: LayoutName = "document_balanced"
    """Which tokens each rank holds; "auto" is the planner's choice. By default every rank gets as
    many tokens and as much work of the row's documents; a single one is cut head-tail."""

    boundary: Literal["in_graph", "eager_island"] = "in_graph"
    """Collectives inside the compiled block, or one graph break around each attention."""

    reduce_dtype: Literal["model", "float32"] = "model"
    """In which ranks sum what each computed of a key, as training.mixed_precision_reduce says it of
    weights: "float32" for gradients of keys as exact as one device's, by slower kernels."""

    expert_exchange: Literal["auto", "all_to_all", "deep_ep", "hybrid_ep"] = "auto"
    """Under parallelism.expert_parallel_degree, what carries tokens: "auto" for a library of GPU
    kernels where one is installed."""

    expert_tensor_parallel_degree: int = 1
    """1: experts are whole, and spread over tp, too. The degree of tp: tp splits the channels of
    experts, which are spread over ranks of dp and cp alone."""

    ranks_per_node: int = 0
    """Ranks of a machine, to which what several of them read over cp, and tokens for their experts,
    cross once. 0: as torchrun starts them; the world size: exchanges have one tier."""

    kernel: str = "auto"
    """What computes attention, by a name of `python -m dtcp.kernels`; "auto" is the fastest."""

    device: Literal["auto", "cpu", "accelerator"] = "auto"
    """What train.py starts ranks on: "auto" is accelerators where the mesh fits, else the CPU."""

    forecast: bool = False
    """Say at the start what a step should move and hold, and compare each step's bytes with it."""

    verify: int = 0
    """Run this many steps, repeat them on one device, compare losses and the first step's
    gradients, and stop; 0 trains."""

    max_restarts: int = 0
    """How often all ranks are started again after one has failed, where train.py started them."""

    stop_seconds: int = 120
    """How long ranks may take to save on SIGTERM or Ctrl-C before train.py kills them."""

    @property
    def is_open(self) -> bool:
        """Whether the planner is still to choose."""
        return AUTO in (self.strategy, self.layout)

    def sequence_layout(self) -> type[SequenceLayout]:
        if self.layout == AUTO:
            raise ValueError(_OPEN.format("layout", "a layout"))
        return LAYOUT_CLASSES[self.layout]

    def attention_style(self, device_type: str) -> AttentionStyle:
        """The strategy, and for "default" that of such devices: "cpu", "cuda"."""
        match self.strategy:
            case "auto":
                raise ValueError(_OPEN.format("strategy", "a strategy"))
            case "default":
                return default_attention(device_type, **self.style_options)
            case "ring":
                return RingAttention(**self.style_options)
            case "all_gather":
                return AllGatherAttention(**self.style_options)
            case "ulysses":
                return UlyssesAttention(**self.style_options)
            case "hybrid":
                return HybridAttention(inner_ranks=self.ulysses_degree, **self.style_options)

    @property
    def style_options(self) -> dict[str, Any]:
        """What the section says of every strategy; the kernel is named for the whole model."""
        boundary: Boundary = InGraph() if self.boundary == "in_graph" else EagerIsland()
        reduce_dtype = torch.float32 if self.reduce_dtype == "float32" else None
        return {"boundary": boundary, "reduce_dtype": reduce_dtype}

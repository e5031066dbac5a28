"""The plan of a Gemma 4: models/gemma4."""

from dataclasses import fields, replace
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from dtcp.distributed.dtensor_rules import HEADS
from dtcp.distributed.mesh import ParallelMesh
from dtcp.kernels.softmax.backends import takes_heads
from dtcp.kernels.softmax.calls import CallKind
from dtcp.kernels.softmax.types import AUTO
from dtcp.models.gemma4 import Gemma4Config, LayerType
from dtcp.parallelize.apply import ParallelPlan
from dtcp.parallelize.experts import expert_styles
from dtcp.parallelize.tensor_parallel import (
    ReplicatedParams,
    ReplicatedWeight,
    ReplicateInput,
    VocabParallelEmbedding,
    check_divisible,
    kv_projection_style,
    warn_of_replicated_kv_heads,
)
from dtcp.softmax import AllGatherAttention, HaloAttention, SharedKVAttention
from dtcp.softmax.style import AttentionStyle


def gemma4_plan(
    config: Gemma4Config, mesh: ParallelMesh, attention: AttentionStyle
) -> ParallelPlan:
    """Sliding layers fetch a halo, global layers attend by `attention`, shared keys move once.

    Under tp, logits are a DTensor sharded in the vocabulary, which token_mean_loss takes.
    Kv heads that tp does not divide are replicated on all its ranks, with a warning.

    In Gemma 4's global layers a key is its value, scaled and rotated; ranks exchange only values
    and recompute keys on arrival, which halves the traffic.

    Args:
        attention: the strategy of global layers on the axis cp: RingAttention or
            AllGatherAttention where a key is made from its value. Its keyword options are those of
            all layers, and its kernel that of sliding ones, too, if it takes windows and their
            width: libraries take 256 channels or 512, not both.
    Raises:
        ValueError: what tp or ep would split is not a multiple of it.
    """
    tp, ep = _gemma4_expert_plan(config, mesh)
    return ParallelPlan(
        tp={**gemma4_tensor_plan(config, mesh.size("tp")), **tp} if mesh.tp is not None else {},
        ep=ep,
        cp=gemma4_context_plan(config, attention),
        blocks=("layers.*",),
        # A tied weight is gathered once, with the rest of the model.
        fsdp_units=() if config.tied else (("embedding",), ("norm", "lm_head")),
    )


def _gemma4_expert_plan(
    config: Gemma4Config, mesh: ParallelMesh
) -> tuple[dict[str, ParallelStyle], dict[str, ParallelStyle]]:
    """The styles of experts on the axes tp and ep: spread over ep, or else split over tp."""
    if config.moe is None:
        return {}, {}
    return expert_styles(mesh, ["layers.*.moe.experts"], config.moe.num_experts)


def gemma4_context_plan(
    config: Gemma4Config, attention: AttentionStyle
) -> dict[str, ParallelStyle]:
    """The style of every mixer on the axis cp.

    A layer whose keys others share gathers what all of those read, once for all of them.
    """
    ahead = config.longest_vision_block - 1 if config.vision_blocks else 0
    options: dict[str, Any] = {x.name: getattr(attention, x.name) for x in fields(AttentionStyle)}
    sliding, halo = dict(options), HaloAttention(config.window, ahead)
    kind = CallKind.INTERVAL if config.vision_blocks else CallKind.WINDOW
    if not takes_heads(attention.kernel, config.sliding_heads.head_dim, kind):
        sliding["kernel"] = AUTO
    own_kv = {
        LayerType.SLIDING: replace(halo, **sliding),
        LayerType.GLOBAL: attention,
    }
    shared_kv = {
        LayerType.SLIDING: SharedKVAttention(halo, **sliding),
        LayerType.GLOBAL: SharedKVAttention(AllGatherAttention(), **options),
    }
    plan: dict[str, ParallelStyle] = {}
    for layer, layer_type in enumerate(config.layer_types):
        name = f"layers.{layer}.attention"
        gives = config.gives_shared_kv(layer)
        if gives:
            plan[f"{name}.exchange"] = shared_kv[layer_type]
        shared = gives or config.reads_shared_kv(layer)
        plan[f"{name}.mixer"] = (shared_kv if shared else own_kv)[layer_type]
    return plan


def gemma4_tensor_plan(config: Gemma4Config, tp: int) -> dict[str, ParallelStyle]:
    """Megatron's pairs, column-wise, then row-wise: one all-reduce per pair, forward and backward.

    From Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053
    """
    _check_divisible(config, tp)
    plan: dict[str, ParallelStyle] = {
        "embedding": VocabParallelEmbedding(),
        "layers.*.attention*_norm": ReplicatedParams(),
        "layers.*.feed_forward*_norm": ReplicatedParams(),
        "layers.*.feed_forward": ReplicateInput(),
        "layers.*.feed_forward.gate": ColwiseParallel(),
        "layers.*.feed_forward.up": ColwiseParallel(),
        "layers.*.feed_forward.down": RowwiseParallel(),
        "norm": ReplicatedParams(),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for layer in range(config.num_layers):
        plan |= _attention_plan(config, layer, tp)
    if config.moe:
        plan |= {
            "layers.*.moe.*_norm": ReplicatedParams(),
            "layers.*.moe.router.proj": ReplicatedParams(),
            "layers.*.moe.router.*scale": ReplicatedWeight(Replicate()),
        }
    if config.per_layer_dim:
        plan |= {"per_layer.tokens": VocabParallelEmbedding()}
        plan |= {f"per_layer.{part}": ReplicatedParams() for part in ("proj", "norm")}
        plan |= {
            f"layers.*.per_layer.{part}": ReplicatedParams() for part in ("gate", "proj", "norm")
        }
    return plan


def _attention_plan(config: Gemma4Config, layer: int, tp: int) -> dict[str, ParallelStyle]:
    name, kv_heads = f"layers.{layer}.attention", config.heads(layer).num_kv_heads
    plan: dict[str, ParallelStyle] = {
        name: ReplicateInput(),
        f"{name}.q_proj": ColwiseParallel(),
        f"{name}.q_norm": ReplicatedParams(Shard(HEADS)),
        f"{name}.o_proj": RowwiseParallel(),
    }
    if config.reads_shared_kv(layer):
        return plan
    columns = kv_projection_style(config.num_heads, kv_heads, tp)
    plan[f"{name}.k_proj"] = columns
    if config.has_keys_from_values(layer):
        plan[f"{name}.k_norm"] = ReplicatedWeight(Partial())
    else:
        plan |= {f"{name}.v_proj": columns, f"{name}.k_norm": ReplicatedParams(Shard(HEADS))}
    return plan


def _check_divisible(config: Gemma4Config, tp: int) -> None:
    sizes = {name: getattr(config, name) for name in ("num_heads", "hidden_dim", "vocab_size")}
    sizes["per_layer_vocab_size"] = config.per_layer_vocab_size
    check_divisible(sizes, tp)
    for layer_type in dict.fromkeys(config.layer_types):
        kv_heads = config.heads(config.layer_types.index(layer_type)).num_kv_heads
        warn_of_replicated_kv_heads(kv_heads, tp, layer_type.name.lower())

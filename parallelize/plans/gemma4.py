"""The plan of models/gemma4."""

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
)

from dtcp.distributed.dtensor_rules import HEADS
from dtcp.distributed.mesh import ParallelMesh
from dtcp.models.gemma4 import Gemma4Config, Sight
from dtcp.parallelize.apply import ParallelPlan
from dtcp.parallelize.experts import ExpertsSplit
from dtcp.parallelize.tensor_parallel import (
    LocalWeight,
    ReplicatedParams,
    ReplicateInput,
    VocabParallelEmbedding,
    check_divisible,
    kv_columns,
    warn_of_copies,
)
from dtcp.softmax import AllGatherAttention, HaloAttention, SharedKVAttention
from dtcp.softmax.style import AttentionStyle


def gemma4_plan(
    config: Gemma4Config, mesh: ParallelMesh, attention: AttentionStyle
) -> ParallelPlan:
    """Windows by a halo, global layers by `attention`, shared keys brought once.

    Under tp, logits come as a DTensor sharded in the vocabulary: token_mean_loss takes them.
    Kv heads that tp does not divide are copied to every rank of it, with a warning.

    Args:
        attention: the strategy of global layers on the axis cp, RingAttention or
            AllGatherAttention where their keys are made from values. A window fits any layout
            of one or two stretches a rank: Contiguous or HeadTail.
    Raises:
        ValueError: what tp would split is not a multiple of it.
    """
    return ParallelPlan(
        tp=tensor_plan(config, mesh.size("tp")) if mesh.tp is not None else {},
        cp=context_plan(config, attention),
        blocks=("layers.*",),
        # A shared weight is gathered once, with the rest of the model.
        fsdp_units=() if config.tied else (("embedding",), ("norm", "lm_head")),
    )


def context_plan(config: Gemma4Config, attention: AttentionStyle) -> dict[str, ParallelStyle]:
    """The style of every mixer on the axis cp."""
    ahead = config.longest_vision_block - 1 if config.vision_blocks else 0
    window = HaloAttention(config.window, ahead, boundary=attention.boundary)
    alone = {Sight.SLIDING: window, Sight.GLOBAL: attention}
    brought = {
        Sight.SLIDING: SharedKVAttention(window),
        Sight.GLOBAL: SharedKVAttention(AllGatherAttention()),
    }
    plan: dict[str, ParallelStyle] = {}
    for layer, sight in enumerate(config.layers):
        name = f"layers.{layer}.attention"
        gives = config.shared_by_others(layer)
        if gives:
            plan[f"{name}.exchange"] = brought[sight]
        shared = gives or config.shares(layer)
        plan[f"{name}.mixer"] = (brought if shared else alone)[sight]
    return plan


def tensor_plan(config: Gemma4Config, tp: int) -> dict[str, ParallelStyle]:
    """Megatron's pairs: columns, then rows, one all-reduce for each pair and direction.

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
            "layers.*.moe.router.*scale": LocalWeight(Replicate()),
            "layers.*.moe.experts": ExpertsSplit(),
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
    if config.shares(layer):
        return plan
    columns = kv_columns(config.num_heads, kv_heads, tp)
    plan[f"{name}.k_proj"] = columns
    if config.makes_keys_from_values(layer):
        plan[f"{name}.k_norm"] = LocalWeight(Partial())
    else:
        plan |= {f"{name}.v_proj": columns, f"{name}.k_norm": ReplicatedParams(Shard(HEADS))}
    return plan


def _check_divisible(config: Gemma4Config, tp: int) -> None:
    sizes = {name: getattr(config, name) for name in ("num_heads", "hidden_dim", "vocab_size")}
    sizes["per_layer_vocab_size"] = config.per_layer_vocab_size
    check_divisible(sizes, tp)
    for sight in dict.fromkeys(config.layers):
        kv_heads = config.heads(config.layers.index(sight)).num_kv_heads
        warn_of_copies(kv_heads, tp, sight.name.lower())

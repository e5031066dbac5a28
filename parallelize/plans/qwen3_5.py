"""The plan of a Qwen3.5: models/qwen3_5."""

from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from dtcp.distributed.dtensor_rules import HEADS
from dtcp.distributed.mesh import ParallelMesh
from dtcp.models.qwen3_5 import MoEConfig, Qwen35Config
from dtcp.parallelize.apply import ParallelPlan
from dtcp.parallelize.experts import expert_styles
from dtcp.parallelize.tensor_parallel import (
    ReplicatedParams,
    ReplicateInput,
    RowShardedWeight,
    VocabParallelEmbedding,
    check_divisible,
    kv_projection_style,
    warn_of_replicated_kv_heads,
)
from dtcp.recurrent import CausalConvCP, GatedDeltaCP, RelayoutCP
from dtcp.softmax.style import AttentionStyle

GATED_DELTA = GatedDeltaCP()


def qwen3_5_plan(
    config: Qwen35Config,
    mesh: ParallelMesh,
    attention: AttentionStyle,
    *,
    delta: GatedDeltaCP = GATED_DELTA,
    relayout: RelayoutCP | None = None,
) -> ParallelPlan:
    """Split heads, experts' channels and vocabulary over tp, the sequence over cp, experts over ep.

    With an axis ep experts are whole, each on ranks of its own, and tp does not split them.

    Kv heads that tp does not divide are replicated on all its ranks, with a warning.
    HeadTail is the layout to shard long documents with, DocumentBalanced that for packed ones:
    they balance full attention, and the delta rule takes them as they are, at the price of a few
    states per rank rather than one.

    Args:
        attention: the strategy of full attention on the axis cp.
        delta: that of the gated delta rule; its ranks_per_node is the convolutions', too.
        relayout: move the tokens to contiguous shards before each layer of the delta rule, and
            back after it; None to leave every token where it is.
    Raises:
        ValueError: what tp or ep would split is not a multiple of it.
    """
    blocks = ["layers.*"] if config.num_layers else []
    blocks += ["ahead.layers.*"] if config.num_mtp_layers else []
    conv = CausalConvCP(ranks_per_node=delta.ranks_per_node)
    cp: dict[str, ParallelStyle] = {}
    for index in range(config.num_layers):
        if config.attends(index):
            cp[f"layers.{index}.attention.mixer"] = attention
        else:
            cp[f"layers.{index}.delta.conv"] = conv
            cp[f"layers.{index}.delta.mixer"] = delta
            if relayout is not None:
                cp[f"layers.{index}.delta"] = relayout
    if config.num_mtp_layers:
        cp["ahead.layers.*.attention.mixer"] = attention
    tp, ep = _expert_plan(config, mesh, blocks)
    return ParallelPlan(
        tp={**_tensor_plan(config, mesh), **tp},
        cp=cp,
        ep=ep,
        blocks=tuple(blocks),
        # A weight that is used twice is gathered once, with the rest of the model.
        fsdp_units=()
        if config.tied or config.num_mtp_layers
        else (("embedding",), ("norm", "lm_head")),
        # Decays multiply along a document, and the rounding error of a rate with them.
        keep_dtype=tuple(
            f"layers.{index}.delta.{name}.weight"
            for index in range(config.num_layers)
            if not config.attends(index)
            for name in ("log_rate", "step_bias")
        ),
    )


def _expert_plan(
    config: Qwen35Config, mesh: ParallelMesh, blocks: list[str]
) -> tuple[dict[str, ParallelStyle], dict[str, ParallelStyle]]:
    """The styles of experts on the axes tp and ep."""
    if not isinstance(config.feed_forward, MoEConfig):
        return {}, {}
    names = [f"{block}.feed_forward.experts" for block in blocks]
    return expert_styles(mesh, names, config.feed_forward.num_experts)


def _tensor_plan(config: Qwen35Config, mesh: ParallelMesh) -> dict[str, ParallelStyle]:
    """Column-wise, then row-wise, in attention and feed-forward: one all-reduce each, both ways."""
    tp = mesh.size("tp")
    check_divisible(_sizes(config, splits_experts=mesh.ep is None or mesh.degrees.etp > 1), tp)
    warn_of_replicated_kv_heads(config.num_kv_heads, tp, "attention")
    plan: dict[str, ParallelStyle] = {
        "embedding": VocabParallelEmbedding(),
        "norm": ReplicatedParams(),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for index in range(config.num_layers):
        plan |= _block_plan(f"layers.{index}", config, tp, attends=config.attends(index))
    if config.num_mtp_layers:
        plan |= _block_plan("ahead.layers.0", config, tp, attends=True)
        names = ("embedding_norm", "hidden_norm", "join", "norm")
        plan |= {f"ahead.{name}": ReplicatedParams() for name in names}
    return plan


def _block_plan(
    block: str, config: Qwen35Config, tp: int, *, attends: bool
) -> dict[str, ParallelStyle]:
    parts: dict[str, ParallelStyle] = {
        "mixer_norm": ReplicatedParams(),
        "feed_forward_norm": ReplicatedParams(),
    }
    if attends:
        parts |= {
            "attention": ReplicateInput(),
            "attention.q_proj": ColwiseParallel(),
            "attention.[kv]_proj": kv_projection_style(config.num_heads, config.num_kv_heads, tp),
            "attention.[qk]_norm": ReplicatedParams(Shard(HEADS)),
            "attention.o_proj": RowwiseParallel(),
        }
    else:
        parts |= {
            "delta": ReplicateInput(),
            "delta.[qkvzab]_proj": ColwiseParallel(),
            "delta.[qkv]_taps": RowShardedWeight(),
            "delta.log_rate": RowShardedWeight(),
            "delta.step_bias": RowShardedWeight(),
            "delta.norm": ReplicatedParams(Shard(HEADS)),
            "delta.o_proj": RowwiseParallel(),
        }
    mlp = "feed_forward"
    if isinstance(config.feed_forward, MoEConfig):
        mlp = "feed_forward.shared"
        parts |= {
            "feed_forward.router": ReplicatedParams(),
            "feed_forward.shared_gate": ReplicatedParams(),
        }
    parts |= {
        mlp: ReplicateInput(),
        f"{mlp}.gate": ColwiseParallel(),
        f"{mlp}.up": ColwiseParallel(),
        f"{mlp}.down": RowwiseParallel(),
    }
    return {f"{block}.{name}": style for name, style in parts.items()}


def _sizes(config: Qwen35Config, *, splits_experts: bool) -> dict[str, int]:
    """What the plan splits over tp."""
    delta, shape = config.delta, config.feed_forward
    sizes = {
        "vocab_size": config.vocab_size,
        "num_heads": config.num_heads,
        "delta.key_heads": delta.key_heads,
        "delta.value_heads": delta.value_heads,
    }
    if isinstance(shape, MoEConfig):
        if splits_experts:
            sizes["feed_forward.hidden_dim"] = shape.hidden_dim
        sizes["feed_forward.shared_hidden_dim"] = shape.shared_hidden_dim
    else:
        sizes["feed_forward"] = shape
    return sizes

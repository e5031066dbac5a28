"""The plan of models/qwen3_5."""

from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
)

from dtcp.distributed.dtensor_rules import HEADS
from dtcp.distributed.mesh import ParallelMesh
from dtcp.models.qwen3_5 import ExpertsConfig, Qwen35Config
from dtcp.parallelize.apply import ParallelPlan
from dtcp.parallelize.experts import ExpertsSplit
from dtcp.parallelize.tensor_parallel import (
    ReplicatedParams,
    ReplicateInput,
    RowShardedWeight,
    VocabParallelEmbedding,
    check_divisible,
    kv_columns,
    warn_of_copies,
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
    """Split heads, experts' channels and vocabulary over tp, the sequence over cp.

    Kv heads that tp does not divide are copied to every rank of it, with a warning.
    HeadTail is the layout to shard batches with: it balances full attention, and the delta rule
    reads it as it lies, for two states a rank rather than one.

    Args:
        attention: the strategy of full attention on the axis cp.
        delta: that of the gated delta rule.
        relayout: deal the tokens of its layers anew, to shards of one stretch, and back; None to
            leave every token where it is.
    Raises:
        ValueError: what tp would split is not a multiple of it.
    """
    blocks = ["layers"] * bool(config.num_layers) + ["ahead.layers"] * config.num_mtp_layers
    cp: dict[str, ParallelStyle] = {}
    for index in range(config.num_layers):
        if config.attends(index):
            cp[f"layers.{index}.attention.mixer"] = attention
        else:
            cp[f"layers.{index}.delta.conv"] = CausalConvCP()
            cp[f"layers.{index}.delta.mixer"] = delta
            if relayout is not None:
                cp[f"layers.{index}.delta"] = relayout
    if config.num_mtp_layers:
        cp["ahead.layers.*.attention.mixer"] = attention
    return ParallelPlan(
        tp=tensor_plan(config, mesh.size("tp")),
        cp=cp,
        blocks=tuple(f"{name}.*" for name in blocks),
        # What is used twice is gathered once, with the rest of the model.
        fsdp_units=()
        if config.tied or config.num_mtp_layers
        else (("embedding",), ("norm", "lm_head")),
        # Decays multiply along a document, and with them what rounding does to a rate.
        islands=tuple(
            f"layers.{index}.delta.{name}.weight"
            for index in range(config.num_layers)
            if not config.attends(index)
            for name in ("log_rate", "step_bias")
        ),
    )


def tensor_plan(config: Qwen35Config, tp: int) -> dict[str, ParallelStyle]:
    """Columns, then rows, in every part of a block: one all-reduce for each and direction."""
    check_divisible(_sizes(config), tp)
    warn_of_copies(config.num_kv_heads, tp, "attention")
    plan: dict[str, ParallelStyle] = {
        "embedding": VocabParallelEmbedding(),
        "norm": ReplicatedParams(),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    kinds = [config.attends(index) for index in range(config.num_layers)]
    for index, attends in enumerate(kinds):
        plan |= _block_plan(f"layers.{index}", config, tp, attends=attends)
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
            "attention.[kv]_proj": kv_columns(config.num_heads, config.num_kv_heads, tp),
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
    dense = "feed_forward"
    if isinstance(config.feed_forward, ExpertsConfig):
        dense = "feed_forward.shared"
        parts |= {
            "feed_forward.router": ReplicatedParams(),
            "feed_forward.experts": ExpertsSplit(),
            "feed_forward.shared_gate": ReplicatedParams(),
        }
    parts |= {
        dense: ReplicateInput(),
        f"{dense}.gate": ColwiseParallel(),
        f"{dense}.up": ColwiseParallel(),
        f"{dense}.down": RowwiseParallel(),
    }
    return {f"{block}.{name}": style for name, style in parts.items()}


def _sizes(config: Qwen35Config) -> dict[str, int]:
    """What the plan splits over tp."""
    delta, shape = config.delta, config.feed_forward
    sizes = {
        "vocab_size": config.vocab_size,
        "num_heads": config.num_heads,
        "delta.key_heads": delta.key_heads,
        "delta.value_heads": delta.value_heads,
    }
    if isinstance(shape, ExpertsConfig):
        sizes["feed_forward.hidden_dim"] = shape.hidden_dim
        sizes["feed_forward.shared_hidden_dim"] = shape.shared_hidden_dim
    else:
        sizes["feed_forward"] = shape
    return sizes

"""The plan of a Llama: models/llama."""

from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from dtcp.distributed.dtensor_rules import HEADS
from dtcp.distributed.mesh import ParallelMesh
from dtcp.models.llama import LlamaConfig
from dtcp.parallelize.apply import ParallelPlan
from dtcp.parallelize.tensor_parallel import (
    ReplicatedParams,
    ReplicateInput,
    VocabParallelEmbedding,
    check_divisible,
)
from dtcp.softmax.style import AttentionStyle


def llama_plan(config: LlamaConfig, mesh: ParallelMesh, attention: AttentionStyle) -> ParallelPlan:
    """Split heads, feed-forward channels and vocabulary over tp, the sequence over cp.

    Under tp, logits are a DTensor sharded in the vocabulary, which token_mean_loss takes.

    Args:
        attention: the strategy on the axis cp.
    Raises:
        ValueError: what tp would split is not a multiple of it.
    """
    names = ("num_heads", "num_kv_heads", "hidden_dim", "vocab_size")
    check_divisible({name: getattr(config, name) for name in names}, mesh.size("tp"))
    return ParallelPlan(
        tp=_tensor_plan(config),
        cp={"layers.*.attention.mixer": attention},
        blocks=("layers.*",),
        # A tied weight is gathered once, with the rest of the model.
        fsdp_units=() if config.tied else (("embedding",), ("norm", "lm_head")),
    )


def _tensor_plan(config: LlamaConfig) -> dict[str, ParallelStyle]:
    """Megatron's pairs, column-wise, then row-wise: one all-reduce per pair, forward and backward.

    From Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053
    """
    plan: dict[str, ParallelStyle] = {
        "embedding": VocabParallelEmbedding(),
        "layers.*.attention_norm": ReplicatedParams(),
        "layers.*.attention": ReplicateInput(),
        "layers.*.attention.[qkv]_proj": ColwiseParallel(),
        "layers.*.attention.o_proj": RowwiseParallel(),
        "layers.*.feed_forward_norm": ReplicatedParams(),
        "layers.*.feed_forward": ReplicateInput(),
        "layers.*.feed_forward.gate": ColwiseParallel(),
        "layers.*.feed_forward.up": ColwiseParallel(),
        "layers.*.feed_forward.down": RowwiseParallel(),
        "norm": ReplicatedParams(),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    if config.qk_norm:
        plan["layers.*.attention.[qk]_norm"] = ReplicatedParams(Shard(HEADS))
    return plan

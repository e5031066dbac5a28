"""The plan of a DeepSeek-V4: models/deepseek_v4."""

from collections.abc import Mapping

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from dtcp.distributed.mesh import ParallelMesh
from dtcp.models.deepseek_v4 import DeepseekV4Config, TopKRouter
from dtcp.parallelize.apply import ParallelPlan
from dtcp.parallelize.experts import expert_styles
from dtcp.parallelize.tensor_parallel import (
    AllReduceInputGrad,
    LocalParams,
    ReplicateInput,
    VocabParallelEmbedding,
    check_divisible,
)
from dtcp.sparse import CompressedSparseCP

SPARSE = CompressedSparseCP()


def deepseek_v4_plan(
    config: DeepseekV4Config, mesh: ParallelMesh, attention: ParallelStyle = SPARSE
) -> ParallelPlan:
    """Split heads with their output groups, experts' channels and vocabulary over tp.

    With an axis ep experts are whole, each on ranks of its own, and tp does not split them.

    Under tp, logits are a DTensor sharded in the vocabulary, which token_mean_loss takes.

    Args:
        attention: how compressed sparse attention is carried out on the axis cp.
    Raises:
        ValueError: what tp or ep would split is not a multiple of it.
    """
    # The shared expert has as many channels as each of the others.
    split = ("num_heads", "output_groups", "hidden_dim", "vocab_size")
    check_divisible({name: getattr(config, name) for name in split}, mesh.size("tp"))
    names = ["layers.*", *(["mtp.*.block"] if config.num_mtp_layers else [])]
    experts = [f"{name}.mixture.experts" for name in names]
    tp, ep = expert_styles(mesh, experts, config.num_experts)
    return ParallelPlan(
        tp={**_tensor_plan(config), **tp},
        cp={f"{name}.attention.mixer": attention for name in names},
        ep=ep,
        blocks=tuple(names),
        # Multi-token prediction reads the embedding and the head again, after the blocks.
        fsdp_units=() if config.num_mtp_layers else (("embedding",), ("head", "norm", "lm_head")),
        keep_dtype=deepseek_v4_keep_dtype(config),
    )


def balance_experts(model: nn.Module, axis: DeviceMesh | None, *, speed: float = 1e-3) -> None:
    """Move the bias of every router by the loads of all ranks; call before an optimizer step.

    Runs outside of autograd, with the same result on every rank.

    Args:
        axis: the ranks whose tokens make up a batch, ParallelMesh.loss; None for this rank only.

    Traffic per rank: one all-reduce of the loads.
    """
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    if not routers:
        return  # a pipeline stage without layers, or of those that choose experts by token id
    loads = torch.stack([router.load for router in routers])
    if axis is not None:
        dist.all_reduce(loads, group=axis.get_group())
    for router, load in zip(routers, loads, strict=True):
        router.balance(load, speed)


def _tensor_plan(config: DeepseekV4Config) -> dict[str, ParallelStyle]:
    """Heads are split; what all of them read, every rank computes whole: the one kv head,
    compressed entries, the indexer, low-rank queries. So are residual streams and routers."""
    plan: dict[str, ParallelStyle] = {
        "embedding": VocabParallelEmbedding(),
        "head": LocalParams(),
        "norm": LocalParams(),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    if config.num_mtp_layers:
        replicated = ("token_norm", "token_proj", "stream_norm", "stream_proj", "head", "norm")
        plan |= {f"mtp.*.{name}": LocalParams() for name in replicated}
    # Spelt out for each block: torch warns where a pattern matches in some blocks only.
    for block, ratio in _blocks(config):
        parts = {**BLOCK, **_compression_plan(config, ratio)}
        plan |= {f"{block}.{name}": style for name, style in parts.items()}
    return plan


def deepseek_v4_keep_dtype(config: DeepseekV4Config) -> tuple[str, ...]:
    """What the published model never rounds: hyper-connections, sinks, the compressor's position
    bias, and norms. The bias of routers is a buffer, which FSDP leaves as it is."""
    names = ["head.*", "norm.weight"]
    if config.num_mtp_layers:
        names += [f"mtp.*.{name}" for name in ("head.*", "norm.weight", "*_norm.weight")]
    for block, ratio in _blocks(config):
        parts = ["*_streams.*", "*_norm.weight", "attention.*_norm.weight", "attention.sink.weight"]
        if ratio:
            parts += ["attention.compressor.place.weight", "attention.compressor.norm.weight"]
        if ratio == config.sparse_ratio:
            parts += [f"attention.indexer.compressor.{part}.weight" for part in ("place", "norm")]
        names += [f"{block}.{part}" for part in parts]
    return tuple(names)


BLOCK: Mapping[str, ParallelStyle] = {
    "*_streams": LocalParams(),
    "*_norm": LocalParams(),
    "attention.q_a_proj": LocalParams(),
    "attention.kv_proj": LocalParams(),
    "attention.*_norm": LocalParams(),
    "attention.rotate": AllReduceInputGrad(),
    "attention.sink": LocalParams(Shard(0)),
    "attention.q_b_proj": ColwiseParallel(),
    "attention.o_a_proj": LocalParams(Shard(0)),
    "attention.o_b_proj": RowwiseParallel(),
    "mixture.router": LocalParams(),
    "mixture.shared": ReplicateInput(),
    "mixture.shared.gate": ColwiseParallel(),
    "mixture.shared.up": ColwiseParallel(),
    "mixture.shared.down": RowwiseParallel(),
}


def _compression_plan(config: DeepseekV4Config, ratio: int) -> dict[str, ParallelStyle]:
    """Styles for what only layers with compressed entries have."""
    parts = ("*_proj", "place", "norm")
    plan: dict[str, ParallelStyle] = {}
    if ratio:
        plan |= {f"attention.compressor.{part}": LocalParams() for part in parts}
        plan["attention.compressor.rotate"] = AllReduceInputGrad()
    if ratio == config.sparse_ratio:
        plan["attention.indexer.*_proj"] = LocalParams()
        plan |= {f"attention.indexer.compressor.{part}": LocalParams() for part in parts}
    return plan


def _blocks(config: DeepseekV4Config) -> list[tuple[str, int]]:
    """The names of all blocks, and the compress ratio of each."""
    names = [f"layers.{layer}" for layer in range(config.num_layers)]
    names += [f"mtp.{depth}.block" for depth in range(config.num_mtp_layers)]
    return list(zip(names, config.compress_ratios, strict=True))

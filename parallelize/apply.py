"""Turn a single-device model into a parallel one, in the one order that is right.

1. Styles, tensor then context: they change what modules compute, so they come first.
2. Activation checkpointing and compile, block by block. Where a block is one graph, the graph
   holds the checkpoint, so the partitioner sees what is kept; where it breaks at an eager
   island, the checkpoint goes around the compiled parts, since a break inside a checkpoint
   would leave the whole block uncompiled, without a word.
3. FSDP, whose hooks gather and free parameters outside of the graphs.

All of it replaces `forward` of a block and nothing else: modules keep their names, so do
checkpoints, and dynamo guards what it compiles.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from dtcp.compile import EagerIsland
from dtcp.distributed.mesh import ParallelMesh
from dtcp.parallelize.activation_checkpoint import ActivationCheckpoint, Forward, NoCheckpoint
from dtcp.parallelize.compile import Compile
from dtcp.parallelize.fsdp import FSDP, shard_parameters
from dtcp.parallelize.keep_dtype import find_islands
from dtcp.parallelize.tied_parameters import check_ties, find_ties, restore_ties
from dtcp.plan import apply_plan, find, matches
from dtcp.softmax.style import AttentionStyle

KEEP_ALL = NoCheckpoint()
PLAIN_FSDP = FSDP()


@dataclass(frozen=True)
class ParallelPlan:
    """What a model's modules become on each axis; a name may hold patterns: `layers.*.norm`.

    Args:
        tp: styles on the axis tp, by module name.
        cp: styles of the mixers on the axis cp, by module name.
        blocks: the repeated parts, each compiled, checkpointed and sharded on its own.
        fsdp_units: parts outside the blocks whose parameters are gathered together, in the order of
            their use. A shared parameter must lie in one of them, or in none.
        islands: parameters, by name, that mixed precision leaves in their own dtype.
    """

    tp: Mapping[str, ParallelStyle]
    cp: Mapping[str, ParallelStyle]
    blocks: tuple[str, ...]
    fsdp_units: tuple[tuple[str, ...], ...] = ()
    islands: tuple[str, ...] = ()


def parallelize(
    model: nn.Module,
    mesh: ParallelMesh,
    plan: ParallelPlan,
    *,
    activation_checkpoint: ActivationCheckpoint = KEEP_ALL,
    compile: Compile | None = None,
    fsdp: FSDP = PLAIN_FSDP,
) -> nn.Module:
    """Parallelize a model in place.

    On the meta device too: then `to_empty` and `init_weights` follow.

    Args:
        compile: None to stay eager.
    Returns:
        The model. Its gradients are sums over ranks: divide losses by the global token count.
    Raises:
        ValueError: a name in the plan that matches no module or parameter, a mixer without a
            style, or a shared parameter that styles place differently or units gather apart.
    """
    blocks = find(model, plan.blocks)
    fsdp_units = [find(model, names) for names in plan.fsdp_units]
    find(model, tuple(plan.tp))
    islands = find_islands(model, plan.islands)
    ties = find_ties(model)
    check_ties(ties, [*([name] for name in blocks), *map(list, fsdp_units)])

    if mesh.tp is not None:
        parallelize_module(model, mesh.tp, dict(plan.tp))
        restore_ties(model, ties)
    apply_plan(model, mesh.cp, plan.cp)

    for name, block in blocks.items():
        island = mesh.cp is not None and _has_island(name, block, plan.cp)
        block.forward = _prepared(block.forward, activation_checkpoint, compile, island=island)

    if mesh.hsdp is not None:
        parts = [list(unit.values()) for unit in fsdp_units]
        shard_parameters(
            model, mesh.hsdp, fsdp, blocks=list(blocks.values()), fsdp_units=parts, islands=islands
        )
    return model


def _prepared(
    forward: Forward, checkpoint: ActivationCheckpoint, compile: Compile | None, *, island: bool
) -> Forward:
    """Checkpoint and compile a block's forward, the one in the other as its graph allows."""
    if compile is None:
        return checkpoint.wrap(forward)
    if island:
        return checkpoint.wrap(compile.around_islands(forward))
    return compile.whole(checkpoint.wrap(forward))


def _has_island(name: str, block: nn.Module, plan: Mapping[str, ParallelStyle]) -> bool:
    inside = [f"{name}.{part}" for part, _ in block.named_modules() if part]
    return any(
        isinstance(style, AttentionStyle) and isinstance(style.boundary, EagerIsland)
        for key, style in plan.items()
        if any(matches(part, key) for part in inside)
    )

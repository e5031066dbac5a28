"""Turn a single-device model into a parallel one, in the one order that is right.

1. Styles, tensor parallel, then context parallel: they change what modules compute, so they come
   first.
2. Activation checkpointing and compile, block by block. Where a block is one graph, the graph
   holds the checkpoint, so the partitioner sees what is kept. Where it breaks at an eager
   island, the checkpoint goes around the compiled parts: a break inside a checkpoint would
   leave the whole block uncompiled, without a word.
3. FSDP, whose hooks gather and free parameters outside of the graphs.

Checkpointing and compile replace a block's `forward` and nothing else: modules keep their names,
so do checkpoints, and dynamo guards what it compiles.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.compile import EagerIsland
from dtcp.distributed.mesh import ParallelMesh, check_parallel_mesh
from dtcp.distributed.refused_alike import refused_alike
from dtcp.experts import RouterLoss
from dtcp.mixer import Mixer
from dtcp.mixer_plan import apply_plan, apply_styles, find, matching, on_nodes
from dtcp.parallelize.activation_checkpoint import (
    KINDS,
    ActivationCheckpoint,
    Forward,
    NoCheckpoint,
)
from dtcp.parallelize.compile import Compile
from dtcp.parallelize.earlier_optimizers import EarlierWeights
from dtcp.parallelize.fsdp import FSDP, shard_parameters
from dtcp.parallelize.keep_dtype import keep_dtype_names
from dtcp.parallelize.tied_parameters import (
    check_tied_parameters,
    find_tied_parameters,
    restore_tied_parameters,
)
from dtcp.sequence.arguments import check_kind
from dtcp.style import MixerStyle
from dtcp.token_dropout import SCOPE, DropoutScope, ForwardOnBatch, calls_again

KEEP_ALL = NoCheckpoint()
PLAIN_FSDP = FSDP()


@dataclass(frozen=True)
class ParallelPlan:
    """What a model's modules become on each axis; a name may hold patterns: `layers.*.norm`.

    Args:
        tp: styles on the axis tp, by module name.
        cp: styles of the mixers on the axis cp, by module name.
        ep: styles of experts on the axis ep, by module name.
        blocks: the repeated modules, each compiled, checkpointed and sharded on its own.
        fsdp_units: modules whose parameters are gathered together, outside of blocks and in the
            order of their use, or parts of blocks that share them. A shared parameter must be in
            one of them, or in none.
        keep_dtype: parameters, by name, that mixed precision leaves in their own dtype.
    """

    tp: Mapping[str, ParallelStyle]
    cp: Mapping[str, ParallelStyle]
    blocks: tuple[str, ...]
    fsdp_units: tuple[tuple[str, ...], ...] = ()
    keep_dtype: tuple[str, ...] = ()
    ep: Mapping[str, ParallelStyle] = field(default_factory=dict)


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

    A model on the meta device is parallelized too; `to_empty` and `init_weights` follow.

    Args:
        compile: None to stay eager.
    Returns:
        The model. Its gradients are sums over ranks: divide losses by the global token count.
    Raises:
        ValueError: a name in the plan that matches no module or parameter, a mixer without a
            style, a shared parameter that styles place in two ways or two units gather, an axis ep
            for a model without experts, or an optimizer or hooks of its earlier parameters.
    """
    check_kind("parallelize", nn.Module, model=model)
    check_parallel_mesh("parallelize", mesh)
    check_kind("parallelize", ParallelPlan, plan=plan)
    check_kind("parallelize", KINDS, activation_checkpoint=activation_checkpoint)
    check_kind("parallelize", (Compile, type(None)), compile=compile)
    check_kind("parallelize", FSDP, fsdp=fsdp)
    blocks = find(model, plan.blocks)
    fsdp_units = [find(model, names) for names in plan.fsdp_units]
    find(model, (*plan.tp, *plan.ep))
    keep_dtype = keep_dtype_names(model, plan.keep_dtype)
    units = [*([name] for name in blocks), *map(list, fsdp_units)]
    check_tied_parameters(find_tied_parameters(model), units)

    mesh = _with_weights_axis(mesh, model, fsdp)
    earlier = EarlierWeights(model)
    _apply_styles(model, mesh, plan)
    for name, block in blocks.items():
        routes = mesh.ep is not None and bool(_styles_inside(name, block, plan.ep))
        block.forward = _checkpointed_and_compiled(
            block,
            activation_checkpoint.keeping_routes() if routes else activation_checkpoint,
            compile.with_data_sizes() if routes and compile else compile,
            has_island=_has_eager_island(name, block, plan.cp if mesh.cp is not None else {})
            or (mesh.hsdp is not None and _is_gathered_in_parts(name, fsdp_units)),
        )
    if mesh.hsdp is not None:
        shard_parameters(
            model,
            mesh,
            fsdp,
            blocks=list(blocks.values()),
            fsdp_units=[list(unit.values()) for unit in fsdp_units],
            keep_dtype=keep_dtype,
        )
    with refused_alike("A model is parallelized", mesh.device_mesh):
        earlier.check_no_hooks(model)
        earlier.check_no_optimizer(model)
    return model


def _with_weights_axis(mesh: ParallelMesh, model: nn.Module, fsdp: FSDP) -> ParallelMesh:
    """The mesh with an axis for fully_shard, where more than sharding is asked of it.

    By its options, or under tp by torch 2.11: its `clip_grad_norm_` leaves gradients that are sums
    yet to be made as they are, without a word, and fully_shard makes them.

    Raises:
        ValueError: there is no axis for it.
    """
    unclipped = mesh.tp is not None and torch.__version__ < "2.12"
    if mesh.hsdp is not None or not (unclipped or fsdp.is_needed(model)):
        return mesh
    if mesh.narrow is not None:
        return replace(mesh, hsdp=mesh.narrow)
    if unclipped:
        raise ValueError(
            f"torch before 2.12 clips gradients only once fully_shard has summed them over tp, got "
            f"torch {torch.__version__} and a mesh without an axis of fully_shard's: add dp_shard, "
            f"of size 1, or use a newer torch."
        )
    raise ValueError(
        f"Weights are cast and offloaded by fully_shard, got {fsdp} for a mesh without an axis "
        f"of theirs: add dp_shard, of size 1, or leave the option out."
    )


def _apply_styles(model: nn.Module, mesh: ParallelMesh, plan: ParallelPlan) -> None:
    """The styles of all axes, and losses of routers over the tokens of all ranks."""
    if mesh.tp is not None:
        tied = find_tied_parameters(model)
        apply_styles(model, mesh.tp, plan.tp)
        restore_tied_parameters(model, tied)
    for module in model.modules():
        if isinstance(module, RouterLoss):
            module.axis = mesh.loss
    _warn_of_no_mixer(model, mesh)
    apply_plan(model, mesh.cp, on_nodes(plan.cp, mesh.cp_ranks_per_node()))
    _spread_experts(model, mesh, plan)
    _warn_of_weights_without_tp(model, mesh)


def _warn_of_weights_without_tp(model: nn.Module, mesh: ParallelMesh) -> None:
    """Say that weights of no tp style have a gradient per rank, and no norm with the others."""
    if mesh.size("tp") == 1:
        return
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    without = [name for name, parameter in named if not isinstance(parameter, DTensor)]
    if without:
        warnings.warn(
            f"Weights are placed on tp, got {len(without)} of {len(named)} that no style places, "
            f"{without[0]!r} first: clip_grad_norm_ fails on two kinds of mesh, and behind a split "
            f"layer a rank's gradient is that of its own heads. Name their modules in the plan, "
            f"with ReplicatedParams() of dtcp.parallelize.tensor_parallel, or "
            f"ReplicatedParams(Shard(2)) where ranks have their own heads [B, L, H, D].",
            stacklevel=4,
        )


def _warn_of_no_mixer(model: nn.Module, mesh: ParallelMesh) -> None:
    """Say that nothing in a model brings tokens of other ranks; stages of one may have no layer."""
    if mesh.size("cp") == 1 or mesh.pp is not None:
        return
    if not any(isinstance(module, Mixer) for module in model.modules()):
        warnings.warn(
            f"Tokens of several ranks meet in mixers, got cp={mesh.size('cp')} and a "
            f"{type(model).__name__} without one: each rank attends to its own tokens alone, but "
            f"where the model runs inside local_shards or a context of dtcp.cp_utils. "
            f"python -m dtcp.check names the modules where tokens meet.",
            stacklevel=4,
        )


def _checkpointed_and_compiled(
    block: nn.Module,
    checkpoint: ActivationCheckpoint,
    compile: Compile | None,
    *,
    has_island: bool,
) -> Forward:
    """Checkpoint and compile a block's forward, one inside the other as its graph allows.

    Dropouts inside learn of their batch outside of graphs; and a graph that recomputes its block
    would have to forget how often it had called one.
    """
    scope, forward = vars(block).get(SCOPE), block.forward
    if compile is None:
        return checkpoint.wrap(_noting(scope, forward))
    if has_island:
        return checkpoint.wrap(_noting(scope, compile.around_islands(forward)))
    if calls_again(block):
        block.register_forward_pre_hook(_refuse_own_checkpoint)
        return checkpoint.wrap(_noting(scope, compile.whole(forward)))
    return _noting(scope, compile.whole(checkpoint.wrap(forward)))


def _refuse_own_checkpoint(block: nn.Module, _: object) -> None:
    """Refuse a checkpoint inside of a graph that would have to forget which dropout it called."""
    if block.training and getattr(block, "gradient_checkpointing", False):
        raise ValueError(
            f"A compiled block that calls one dropout several times is recomputed from outside, "
            f"got a {type(block).__name__} with gradient_checkpointing=True: leave "
            f"gradient_checkpointing_enable() out, and pass "
            f"activation_checkpoint=FullCheckpoint() to parallelize_hf."
        )


def _noting(scope: DropoutScope | None, forward: Forward) -> Forward:
    return forward if scope is None else ForwardOnBatch(scope, forward)


def _spread_experts(model: nn.Module, mesh: ParallelMesh, plan: ParallelPlan) -> None:
    """Experts to ranks of their own."""
    # Of pipeline stages some may have no experts.
    if mesh.ep is None or (mesh.pp is not None and not plan.ep):
        return
    if not plan.ep:
        raise ValueError(
            f"Ranks of ep have different experts, got ep={mesh.size('ep')} for a "
            f"{type(model).__name__} whose plan names no experts: set ep to 1."
        )
    apply_styles(model, mesh.ep, plan.ep)


def _styles_inside(
    name: str, block: nn.Module, plan: Mapping[str, ParallelStyle]
) -> list[ParallelStyle]:
    """Those that a plan has for modules of a block."""
    submodules = {f"{name}.{part}" for part, _ in block.named_modules() if part}
    return [x for key, x in plan.items() if matching(submodules, key)]


def _is_gathered_in_parts(name: str, units: Sequence[Mapping[str, nn.Module]]) -> bool:
    """Whether FSDP has hooks inside of a block, which are no part of its graph."""
    return any(part.startswith(f"{name}.") for unit in units for part in unit)


def _has_eager_island(name: str, block: nn.Module, plan: Mapping[str, ParallelStyle]) -> bool:
    return any(
        isinstance(style, MixerStyle) and isinstance(style.boundary, EagerIsland)
        for style in _styles_inside(name, block, plan)
    )

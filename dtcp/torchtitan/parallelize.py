"""torchtitan's parallelize_fn for our models and for its own.

torchtitan passes its sections and its ParallelDims; the `dtcp` section is bound by our Trainer.
The order of application is not decided here: ours is in `parallelize`, its own in torchtitan.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dtcp.torchtitan.attention import add_mixers
from dtcp.torchtitan.latents import exchange_latents_of
from dtcp.torchtitan.section import Section

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor, Shard
from torchtitan.config import TORCH_DTYPE_MAP, CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.config.override import derive
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import (
    ActivationCheckpointing,
    ActivationCheckpointingConfig,
    FullAC,
    MemoryBudgetAC,
    SelectiveAC,
)
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.distributed.full_dtensor import resolve_fsdp_mesh
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.linear import ScaledBiasRowwiseLinear

from dtcp._torch.dtensor import wait_for_shard
from dtcp.distributed.mesh import ParallelMesh
from dtcp.distributed.ops import selective_checkpoint_save_ops
from dtcp.forward import wrap_forward
from dtcp.mixer_plan import apply_plan, on_nodes
from dtcp.parallelize import (
    FSDP,
    ActivationCheckpoint,
    Compile,
    FullCheckpoint,
    NoCheckpoint,
    SelectiveCheckpoint,
    parallelize,
)
from dtcp.parallelize.expert_exchange import with_exchange
from dtcp.parallelize.plans.families import FamilyPlan
from dtcp.parallelize.stage_plan import plan_of_stage
from dtcp.softmax.default import device_type_of
from dtcp.softmax.mixer import name_kernel


def mesh_with_section(dims: ParallelDims, section: Section) -> ParallelMesh:
    """torchtitan's meshes, with what the section adds to them."""
    return ParallelMesh.from_parallel_dims(
        dims, etp=section.expert_tensor_parallel_degree, ranks_per_node=section.ranks_per_node
    )


def parallelize_plain(
    model: nn.Module,
    *,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    compile_config: CompileConfig,
    ac_config: ActivationCheckpointingConfig,
    dump_folder: str,
    section: Section,
    plan: FamilyPlan,
) -> nn.Module:
    """A model of ours, by its family's plan."""
    mesh = mesh_with_section(parallel_dims, section)
    name_kernel(model, section.kernel)
    attention = partial(section.attention_style, device_type_of(mesh.cp))
    styles = plan(model.config, mesh, attention, section.sequence_layout())
    if getattr(model, "stage", None) is not None:
        styles = plan_of_stage(styles, model)
    return parallelize(
        model,
        mesh,
        replace(styles, ep=with_exchange(styles.ep, section.expert_exchange)),
        **options_of(training, parallelism, compile_config, ac_config),
    )


def options_of(
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    compile_config: CompileConfig,
    ac_config: ActivationCheckpointingConfig,
) -> dict[str, Any]:
    """What torchtitan's sections say, as the options of parallelize and of parallelize_hf.

    Raises:
        ValueError: a policy of recomputation that we do not have.
    """
    return {
        "activation_checkpoint": checkpoint_of(ac_config),
        "compile": compile_of(compile_config),
        "fsdp": _fsdp_of(training, parallelism),
    }


def compile_of(config: CompileConfig) -> Compile | None:
    """torchtitan's compile section as ours."""
    compiled = config.enable and "model" in config.components
    return Compile(config.backend) if compiled else None


def _fsdp_of(training: TrainingConfig, parallelism: ParallelismConfig) -> FSDP:
    """What torchtitan's sections say of sharded weights, as ours."""
    # As torchtitan has it: stages gather weights once for all micro-batches.
    staged = parallelism.pipeline_parallel_degree > 1
    return FSDP(
        mixed_precision=MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        ),
        offload=CPUOffloadPolicy() if training.enable_cpu_offload else OffloadPolicy(),
        reshard_after_forward=parallelism.fsdp_reshard_after_forward != "never" and not staged,
    )


def checkpoint_of(config: ActivationCheckpointingConfig) -> ActivationCheckpoint:
    """torchtitan's policy of recomputation as ours.

    Raises:
        ValueError: one that we do not have.
    """
    match config:
        case None:
            return NoCheckpoint()
        case FullAC.Config():
            return FullCheckpoint()
        case SelectiveAC.Config():
            return SelectiveCheckpoint()
    raise ValueError(checkpoint_refusal(config))


def checkpoint_refusal(config: ActivationCheckpointingConfig, *, ours: bool = True) -> str:
    """Why blocks are not recomputed this way, or nothing.

    Args:
        ours: whether the model is one of dtcp's, whose plan carries out torchtitan's two policies
            itself; a decoder of torchtitan's takes any policy that wraps blocks.
    """
    taken = (type(None), FullAC.Config, SelectiveAC.Config)
    if isinstance(config, MemoryBudgetAC.Config):
        why = "the compiler's memory budget knows nothing of what an op communicates"
    elif ours and type(config) not in taken:
        why = "blocks of dtcp's models are recomputed in full, selectively or not at all"
    else:
        return ""
    return (
        f"Blocks are recomputed in full or selectively, got activation_checkpoint="
        f"{type(config).__qualname__}: {why}; choose activation_checkpoint:selective, :full or "
        f":none."
    )


class SelectiveCommunicatedAC(SelectiveAC):
    """torchtitan's selective policy, which also saves what our strategies communicated."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set:
        return super().get_save_ops() | set(selective_checkpoint_save_ops())


def parallelize_decoder(
    model: Decoder,
    *,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    compile_config: CompileConfig,
    ac_config: ActivationCheckpointingConfig,
    dump_folder: str,
    section: Section,
) -> nn.Module:
    """A decoder of torchtitan with our attention: its own TP, AC, compile and FSDP around it."""
    mesh = ParallelMesh.from_parallel_dims(parallel_dims, ranks_per_node=section.ranks_per_node)
    add_mixers(model)
    style = section.attention_style(device_type_of(mesh.cp))
    if mesh.cp is not None and not parallel_dims.tp_enabled:
        exchange_latents_of(model, style)
    name_kernel(model, section.kernel)
    # Inside torchtitan's local_map the mixer sees local heads, so cp is the only axis it knows.
    plan = {"layers.*.attention.inner_attention.mixer": style} if len(model.layers) else {}
    apply_plan(model, mesh.cp, on_nodes(plan, mesh.cp_ranks_per_node()))
    if parallel_dims.tp_enabled or parallel_dims.ep_enabled:
        _shard_by_torchtitan(model, parallel_dims)
        head: Any = model.lm_head  # None in a stage without it
        if parallel_dims.spmd_backend == "spmd_types" and mesh.tp is not None and head is not None:
            # There a shard of the vocabulary is a plain tensor, which a loss could not tell.
            head.register_forward_hook(partial(_vocabulary_shards, mesh.tp))
    if ac_config is not None:
        _activation_checkpointing(ac_config, dump_folder).apply(model)
    if compile_config.enable and "model" in compile_config.components:
        apply_compile(model, compile_config=compile_config, parallel_dims=parallel_dims)
        if model.tok_embeddings is not None:
            # What enters the first block is computed outside of the graphs.
            model.tok_embeddings.register_forward_hook(_wait_for_output)
    apply_fsdp_to_decoder(
        model,
        **_fsdp_meshes(parallel_dims, mesh),
        ep_degree=parallel_dims.ep,
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        pp_enabled=parallel_dims.pp_enabled,
        cpu_offload=training.enable_cpu_offload,
        reshard_after_forward_policy=parallelism.fsdp_reshard_after_forward,
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A divide factor of 1 becomes PREMUL_SUM, which gloo does not have. A sum is the same.
            module.set_force_sum_reduction_for_comms(True)
    return model


def _shard_by_torchtitan(model: Decoder, dims: ParallelDims) -> None:
    """Its own tp and ep; what was frozen still is, though spmd_types makes parameters anew."""
    frozen = [name for name, each in model.named_parameters() if not each.requires_grad]
    for module in model.modules():
        # Of its adapted or frozen ones, which are of classes of their own, nobody trains the bias.
        if type(module) is ScaledBiasRowwiseLinear and module.bias is not None:
            wrap_forward(module, _with_gradient_of_bias)
    model.parallelize(dims)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)


def _with_gradient_of_bias(module: Any, _: Any, x: Tensor) -> Tensor:
    """As torchtitan's (0.3.0), which adds a part of the bias on each rank of tp.

    Every rank has the gradient of the sum, and that of its part would be too small by their number.
    """
    weight, bias = (
        each.to_local() if isinstance(each, DTensor) else each
        for each in (module.weight, module.bias)
    )
    part = bias / module.tp_degree
    # Adds 0, and to the gradient what the division has taken from it.
    part = part + (1 - 1 / module.tp_degree) * (bias - bias.detach())
    return nn.functional.linear(x, weight, part)


def _fsdp_meshes(dims: ParallelDims, mesh: ParallelMesh) -> dict[str, Any]:
    """What FSDP shards weights over, and those of experts.

    Parameters that spmd_types has sharded over tp bring annotations of all axes, and FSDP gets as
    many. Without tp they are plain ones under either backend.
    """
    if dims.spmd_backend == "spmd_types" and dims.tp_enabled:
        return dict(zip(("dp_mesh", "dp_mesh_dims"), resolve_fsdp_mesh(dims), strict=True))
    return {"dp_mesh": mesh.hsdp or mesh.narrow, "edp_mesh": mesh.expert_hsdp}


def _vocabulary_shards(tp: DeviceMesh, module: nn.Module, args: Any, logits: Tensor) -> DTensor:
    """A head's logits [B, L, V / tp] as partial_dtensor has them, for losses to know the rest."""
    return DTensor.from_local(logits, tp, [Shard(-1)], run_check=False)


def _wait_for_output(module: nn.Module, args: Any, output: Tensor) -> None:
    wait_for_shard(output)


def _activation_checkpointing(
    config: ActivationCheckpointing.Config, dump_folder: str
) -> ActivationCheckpointing:
    if type(config) is SelectiveAC.Config:
        config = derive(config, SelectiveCommunicatedAC.Config)
    return config.build(dump_folder=dump_folder)

"""Parameters sharded over ranks, gradients summed over them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from dtcp._torch.fsdp import has_param_meshes, param_mesh
from dtcp.distributed.mesh import ParallelMesh
from dtcp.huggingface.quantized import weights_kept_whole
from dtcp.parallelize.keep_dtype import gather_in_own_dtype
from dtcp.sequence.arguments import check_kind


@dataclass(frozen=True)
class FSDP:
    """Options of torch's fully_shard.

    Args:
        mixed_precision: its cast of inputs is done once, where they enter the model.
        reshard_after_forward: free a block's parameters after its forward pass and gather them
            again for its backward pass.
    """

    mixed_precision: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)
    offload: OffloadPolicy = field(default_factory=OffloadPolicy)
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        check_kind("FSDP", MixedPrecisionPolicy, mixed_precision=self.mixed_precision)
        check_kind("FSDP", OffloadPolicy, offload=self.offload)
        check_kind("FSDP", bool, reshard_after_forward=self.reshard_after_forward)

    def is_needed(self, model: nn.Module) -> bool:
        """Whether it changes a model that no axis shards: by a cast, or by offloading."""
        policy = self.mixed_precision
        whole = weights_kept_whole(model)
        weights = {p.dtype for p in model.parameters() if p not in whole and p.is_floating_point()}
        casts = policy.param_dtype is not None and weights != {policy.param_dtype}
        return casts or policy.output_dtype is not None or type(self.offload) is not OffloadPolicy


def shard_parameters(
    model: nn.Module,
    mesh: ParallelMesh,
    options: FSDP,
    *,
    blocks: Sequence[nn.Module],
    fsdp_units: Sequence[Sequence[nn.Module]],
    keep_dtype: Sequence[str] = (),
) -> None:
    """Shard a model's parameters: one gather per block, one per unit, one for the rest.

    Quantized weights, which are frozen, every rank keeps whole.

    Args:
        mesh: weights lie on its hsdp, those that are spread over ep on its expert_hsdp.
        fsdp_units: modules of which each unit is gathered together: parts that blocks share, and
            modules outside of blocks. The last one of these stays gathered after forward, for
            backward starts with it.
        keep_dtype: names of parameters that are gathered in their own dtype.
    """
    whole = weights_kept_whole(model)
    for parameter in model.parameters():
        if parameter not in whole and not parameter.is_contiguous():
            # fully_shard flattens weights; those of averaged adapters are views of others.
            parameter.data = parameter.data.contiguous()
    shared: dict[str, Any] = {
        "mesh": mesh.hsdp,
        "offload_policy": options.offload,
        # Mixed precision would cast them, and what computes with them looks for their class.
        "ignored_params": whole,
    }
    if mesh.experts is not None and mesh.expert_hsdp is not None:
        shared["shard_placement_fn"] = _ExpertPlacement(mesh.experts, mesh.expert_hsdp)
    # What a model hands to its own modules is in the dtype it has chosen: angles are in fp32.
    uncast = replace(options.mixed_precision, cast_forward_inputs=False)
    reshard = options.reshard_after_forward
    in_blocks = {module for block in blocks for module in block.modules()}
    inner = [unit for unit in fsdp_units if in_blocks.issuperset(unit)]
    outer = [unit for unit in fsdp_units if unit not in inner]
    for unit in inner:
        fully_shard(list(unit), **shared, mp_policy=uncast, reshard_after_forward=reshard)
    for block in blocks:
        fully_shard(block, **shared, mp_policy=uncast, reshard_after_forward=reshard)
    for index, unit in enumerate(outer):
        is_last = index == len(outer) - 1
        reshard = options.reshard_after_forward and not is_last
        fully_shard(list(unit), **shared, mp_policy=uncast, reshard_after_forward=reshard)
    fully_shard(model, **shared, mp_policy=options.mixed_precision)
    kept = [model.get_parameter(name) for name in keep_dtype]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            gather_in_own_dtype(module, kept)
            _sum_gradients(module)
            _leave_forward(type(module))


def _leave_forward(kind: type) -> None:
    """Let a class that fully_shard has made have the forward of the class it was made of.

    transformers (5.24) gives each subclass of its layers a forward that checkpoints, if it is the
    class's own: a block's, which was put on the block before, would checkpoint nothing.
    """
    if "forward" in vars(kind):
        del kind.forward  # type: ignore[attr-defined]


class _ExpertPlacement:
    """Where FSDP shards a parameter: what is spread over ep lies on a mesh of its own.

    The first dim is that of experts, which ep shards already. Where each of its ranks has fewer of
    them than there are ranks to shard them on, the next dim is sharded, without padding.
    """

    def __init__(self, experts: DeviceMesh, expert_hsdp: DeviceMesh) -> None:
        if not has_param_meshes():
            raise NotImplementedError(
                f"Experts on ranks of their own are sharded on a mesh of their own, which FSDP of "
                f"this torch does not know, got torch {torch.__version__}: use torch 2.13, or ep=1."
            )
        self.experts, self.ranks = experts, expert_hsdp.shape[-1]
        self.sharded_by = param_mesh(expert_hsdp)

    def __call__(self, parameter: nn.Parameter) -> Any:
        if not isinstance(parameter, DTensor) or parameter.device_mesh != self.experts:
            return None
        own = parameter.to_local().shape
        uneven = own[0] % self.ranks and len(own) > 1
        dim = 1 if uneven and own[1] % self.ranks == 0 else 0
        return self.sharded_by(Shard(dim))


def _sum_gradients(module: FSDPModule) -> None:
    """Sum gradients: the loss is divided by the global token count already.

    The sum is forced since gloo has no reduction that scales.
    """
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)

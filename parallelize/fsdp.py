"""Parameters sharded over ranks, gradients summed over them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

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


def shard_parameters(
    model: nn.Module,
    mesh: DeviceMesh,
    options: FSDP,
    *,
    blocks: Sequence[nn.Module],
    fsdp_units: Sequence[Sequence[nn.Module]],
    keep_dtype: Sequence[str] = (),
) -> None:
    """Shard a model's parameters: one gather per block, one per unit, one for the rest.

    Args:
        mesh: ParallelMesh.hsdp.
        fsdp_units: modules outside the blocks, each unit gathered together; the last one stays
            gathered after forward, for backward starts with it.
        keep_dtype: names of parameters that are gathered in their own dtype.
    """
    shared: dict[str, Any] = {"mesh": mesh, "offload_policy": options.offload}
    # What a model hands to its own modules is in the dtype it has chosen: angles are in fp32.
    uncast = replace(options.mixed_precision, cast_forward_inputs=False)
    for block in blocks:
        reshard = options.reshard_after_forward
        fully_shard(block, **shared, mp_policy=uncast, reshard_after_forward=reshard)
    for index, unit in enumerate(fsdp_units):
        is_last = index == len(fsdp_units) - 1
        reshard = options.reshard_after_forward and not is_last
        fully_shard(list(unit), **shared, mp_policy=uncast, reshard_after_forward=reshard)
    fully_shard(model, **shared, mp_policy=options.mixed_precision)
    kept = [model.get_parameter(name) for name in keep_dtype]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            gather_in_own_dtype(module, kept)
            _sum_gradients(module)


def _sum_gradients(module: FSDPModule) -> None:
    """Sum gradients: the loss is divided by the global token count already.

    The sum is forced since gloo has no reduction that scales.
    """
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)

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

from dtcp.parallelize.keep_dtype import keep_apart


@dataclass(frozen=True)
class FSDP:
    """Options of torch's fully_shard.

    Args:
        mixed_precision: inputs are cast, if asked for, where they enter the model.
        reshard_after_forward: gather a block's parameters again for its backward pass, rather
            than keep them.
    """

    mixed_precision: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)
    offload: OffloadPolicy = field(default_factory=OffloadPolicy)
    reshard_after_forward: bool = True


def shard_parameters(
    model: nn.Module,
    mesh: DeviceMesh,
    options: FSDP,
    *,
    blocks: Sequence[nn.Module],
    fsdp_units: Sequence[Sequence[nn.Module]],
    islands: Sequence[str] = (),
) -> None:
    """Shard a model's parameters: one gather a block, one a unit, one for what is left.

    Args:
        mesh: ParallelMesh.hsdp.
        fsdp_units: modules outside the blocks, gathered together; the last one stays gathered
            after forward, for backward starts with it.
        islands: names of parameters that no unit gathers in another dtype than their own.
    """
    shared: dict[str, Any] = {"mesh": mesh, "offload_policy": options.offload}
    # What a model hands to its own parts is in the dtype it has chosen: angles are in fp32.
    inside = replace(options.mixed_precision, cast_forward_inputs=False)
    for block in blocks:
        again = options.reshard_after_forward
        fully_shard(block, **shared, mp_policy=inside, reshard_after_forward=again)
    for index, unit in enumerate(fsdp_units):
        last = index == len(fsdp_units) - 1
        again = options.reshard_after_forward and not last
        fully_shard(list(unit), **shared, mp_policy=inside, reshard_after_forward=again)
    fully_shard(model, **shared, mp_policy=options.mixed_precision)
    kept = [model.get_parameter(name) for name in islands]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            keep_apart(module, kept)
            _sum_gradients(module)


def _sum_gradients(module: FSDPModule) -> None:
    """The loss is over the global token count already, so nothing is left to divide by.

    The sum is forced since gloo has none that scales.
    """
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)

"""Whether ranks that a row is cut for have the same weights, where nothing else keeps them so.

Weights that every rank of the axis has (of `apply_plan` by itself, or in FSDP over dp_shard alone)
start from other numbers where ranks are seeded apart, and drift apart where nobody sums their
gradients. The loss looks well.
"""

import inspect
import warnings

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from dtcp._torch.ddp import is_fsdp1
from dtcp.distributed.same_rows import numbers_of_ranks
from dtcp.sequence.host import on_host

READ = 256
"""Entries of a weight that are compared: an optimizer's step changes nearly all of them."""
_BATCHES = "batches_with_weights_compared"


def warn_of_other_weights(model: nn.Module, axis: DeviceMesh | None) -> None:
    """Say that ranks of an axis have other weights, at the model's batches 1, 2, 4, 8, and so on.

    Of weights that are DTensors on some of these ranks, or in FullyShardedDataParallel, each rank
    has its own, and nothing is said. All ranks of the axis call this together; a run of N batches
    exchanges log2(N) times.

    Traffic per rank: 2 numbers from each rank of the axis; if they differ, one for each weight. On
    a group of NCCL alone the host waits for what the device has in hand.
    """
    batch = vars(model).get(_BATCHES, 0) + 1
    vars(model)[_BATCHES] = batch
    if axis is not None and axis.size() > 1 and batch & (batch - 1) == 0:
        _compare(model, axis)


@on_host
def _compare(model: nn.Module, axis: DeviceMesh) -> None:
    weights = _alike_on_ranks(model, axis)
    sums = _sums([*weights.values()])
    totals = numbers_of_ranks(torch.stack((torch.tensor(len(weights)), sums.sum())), [axis])
    if bool((totals == totals[0]).all()):
        return
    which = ""
    if bool((totals[:, 0] == totals[0, 0]).all()):
        of_ranks = numbers_of_ranks(sums, [axis])
        places = (of_ranks != of_ranks[0]).any(0).nonzero().flatten().tolist()
        which = f" for {[*weights][places[0]]!r} and {len(places) - 1} more" if places else ""
    warnings.warn(
        f"Ranks that a row is cut for have the same weights, got others{which}: start them from "
        f"one seed or checkpoint, and sum gradients over the ranks of ParallelMesh.loss before an "
        f"optimizer's step, as dtcp.parallelize.parallelize does.",
        stacklevel=_frames_of_ours(),
    )


def _frames_of_ours() -> int:
    """How far up a warning of the function that asks finds the line that called dtcp: a batch is
    made by functions of several floors."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith("dtcp."):
        frame, level = frame.f_back, level + 1
    return level


def _alike_on_ranks(model: nn.Module, axis: DeviceMesh) -> dict[str, Tensor]:
    """This rank's part of each weight that is to be the same on all ranks, by name."""
    if any(is_fsdp1(module) for module in model.modules()):
        return {}
    ranks, own = set(axis.mesh.flatten().tolist()), {dist.get_rank()}
    made = {name: x.detach() for name, x in model.named_parameters() if not is_lazy(x)}
    alike = {}
    for name, local in made.items():
        if isinstance(local, DTensor):
            if ranks & set(local.device_mesh.mesh.flatten().tolist()) - own:
                continue  # each rank's is its own
            local = local.to_local()
        # Quantized ones are of classes of their own, whose bits nobody reads.
        plain = type(local) is Tensor and local.layout is torch.strided
        if plain and local.numel() and local.device.type != "meta":
            alike[name] = local
    return alike


def _sums(weights: list[Tensor]) -> Tensor:
    """The bits of each weight's first entries, summed: [weights] int64, on the host."""
    if not weights:
        return torch.zeros(0, dtype=torch.int64)
    sums = [_bits(x.flatten()[:READ]).long().sum() for x in weights]
    return torch.stack([x.to(sums[0].device) for x in sums]).cpu()


def _bits(x: Tensor) -> Tensor:
    x = torch.view_as_real(x).flatten() if x.is_complex() else x
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(bits[x.element_size()])

"""Whether the gradients of a model are summed over ranks, as shares of a loss have to be.

A share is divided by the tokens of all ranks. Where gradients of shares are averaged, as by DDP and
by FSDP2 until set otherwise, they come out too small by the number of ranks: hidden by Adam, but
not by clipping, weight decay, or a run that goes on from another mesh.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dtcp._torch.ddp import (
    averaging_ranks_of_ddp,
    averaging_ranks_of_fsdp1,
    averaging_ranks_of_replicated,
    running_ddp,
)
from dtcp._torch.fsdp import averaging_ranks, fsdp_param_groups, param_groups_behind, reducing_ranks
from dtcp.distributed.mesh import ParallelMesh

_SUM = (
    "use dtcp.parallelize.parallelize, or call set_gradient_divide_factor(1.0) of each FSDPModule "
    "in the model (under gloo set_force_sum_reduction_for_comms(True), too); a loss that makes up "
    "for the average is taken as such once that factor is set to any number"
)
_SUM_FSDP1 = "use dtcp.parallelize.parallelize, or fully_shard on ParallelMesh.hsdp"
_SUM_BY_DDP = "use dtcp.parallelize.parallelize, or a hook that sums (register_comm_hook)"


def check_gradients_summed(model: nn.Module, mesh: ParallelMesh) -> None:
    """Refuse a model, about to be trained by shares of a loss, whose gradients are averaged.

    An FSDP module to which somebody has named a factor to divide by is taken at its word. One that
    reduces gradients over fewer ranks than the loss has is warned of: somebody may sum the rest.

    Raises:
        ValueError: names the module; the same on every rank.
    """
    if not torch.is_grad_enabled():
        return
    _check_running_ddp()
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            _refuse_ddp(module)
        _refuse(averaging_ranks_of_replicated(module), "a model in `replicate`", _SUM_BY_DDP)
        _refuse(averaging_ranks_of_fsdp1(module), "FullyShardedDataParallel", _SUM_FSDP1)
        if not isinstance(module, FSDPModule):
            continue
        subject = f"FSDP of {name or type(model).__name__!r}"
        for group in fsdp_param_groups(module):
            _refuse(averaging_ranks(group), subject, _SUM)
            # Experts on ranks of their own are reduced over those that hold the same ones.
            if mesh.ep is None and 0 < reducing_ranks(group) < mesh.size("loss"):
                _warn_of_few(subject, reducing_ranks(group), mesh)


def check_output_summed(output: Tensor) -> None:
    """Refuse what a model gave whose gradients are averaged, where that shows.

    It shows in eager mode, of what the root module of FSDP gave, as it gave it, and inside of DDP.

    Raises:
        ValueError: the same on every rank.
    """
    if torch.compiler.is_compiling() or not (isinstance(output, Tensor) and output.requires_grad):
        return
    _check_running_ddp()
    for group in param_groups_behind(output):
        _refuse(averaging_ranks(group), "FSDP of a model", _SUM)


def warn_of_ddp(model: nn.Module | None) -> None:
    """Say what a model in DDP is not to be trained by, where its loss is not known."""
    if not isinstance(model, DistributedDataParallel) or not torch.is_grad_enabled():
        return
    ranks = averaging_ranks_of_ddp(model)
    if ranks > 1:
        warnings.warn(
            f"A loss that is divided by global_token_count has gradients that are summed over "
            f"ranks, got DistributedDataParallel, which averages over {ranks} ranks and makes them "
            f"{ranks} times too small: {_SUM_BY_DDP}.",
            stacklevel=2,
        )


def _check_running_ddp() -> None:
    """Refuse to be part of the forward pass of a DDP that averages gradients."""
    ddp = running_ddp()
    if ddp is not None:
        _refuse_ddp(ddp)


def _refuse_ddp(ddp: DistributedDataParallel) -> None:
    _refuse(averaging_ranks_of_ddp(ddp), "DistributedDataParallel", _SUM_BY_DDP)


def _refuse(ranks: int, subject: str, remedy: str) -> None:
    if ranks > 1:
        raise ValueError(
            f"A loss that is divided by the tokens of all ranks has gradients that are summed over "
            f"them, got {subject}, which averages over {ranks} ranks: {remedy}."
        )


def _warn_of_few(subject: str, ranks: int, mesh: ParallelMesh) -> None:
    warnings.warn(
        f"Gradients are summed over all ranks whose tokens a loss is of, got {subject}, which "
        f"reduces them over {ranks} of {mesh.size('loss')} ranks: call fully_shard with "
        f"mesh=ParallelMesh.hsdp, or sum them over the others before each step.",
        stacklevel=2,
    )

"""Experts over ranks: a slice of every expert's hidden channels each, or experts of their own."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.distributed.mesh import ParallelMesh
from dtcp.experts import RoutedTokens, TokenExchange
from dtcp.models.moe import Experts
from dtcp.parallelize.expert_exchange import LOAD, SpreadStyle, check_experts, copied, exchanged
from dtcp.parallelize.tensor_parallel import distribute_parameter, reduce_from_region

HIDDEN_CHANNELS: Mapping[str, Placement] = {"gate": Shard(1), "up": Shard(1), "down": Shard(2)}
"""The dim of the channels between the projections, in each weight."""


@dataclass
class ExpertTensorParallel(ParallelStyle):
    """Split the hidden channels of all experts over the axis, as Megatron splits one MLP.

    Every rank sees every token and makes the same choice, so no token is sent to an expert: one
    all-reduce of the output, one of the gradients of the inputs. If the experts themselves were
    sharded, ranks whose experts a router does not choose would idle.

    Raises:
        TypeError: a module that is no dtcp.models.moe.Experts.
        ValueError: a number of channels that the axis does not divide.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Experts):
            raise TypeError(
                f"{self} splits a dtcp.models.moe.Experts, got a {type(module).__name__}: name the "
                f"experts themselves in the plan."
            )
        _check_channels(module, device_mesh.size())
        for name, placement in HIDDEN_CHANNELS.items():
            distribute_parameter(module, name, device_mesh, placement)
        module.__class__ = _TensorParallelExperts
        cast(_TensorParallelExperts, module).mesh = device_mesh
        return module


def _check_channels(experts: Experts, tp: int) -> None:
    """Refuse a number of hidden channels that the ranks of tp cannot share equally."""
    channels = experts.gate.shape[1]
    if channels % tp:
        raise ValueError(
            f"Tensor parallelism splits an expert's channels into equal parts, got "
            f"hidden_dim={channels} with tp={tp}: choose a tp that divides it."
        )


class _TensorParallelExperts(Experts):
    """Experts that a style has split. Made by the style, never built directly."""

    mesh: DeviceMesh

    def mix(self, tokens: RoutedTokens, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        part, other = super().mix(copied(tokens, self.mesh), real)
        return reduce_from_region(part, self.mesh), other

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = (
            cast(DTensor, getattr(self, name)).to_local(grad_placements=[placement])
            for name, placement in HIDDEN_CHANNELS.items()
        )
        return gate, up, down


@dataclass
class ExpertParallel(SpreadStyle):
    """Give each rank of ep experts of its own, E / n in the order of their numbers.

    Tokens travel to the experts that their router chose, and the results back. Gradients of an
    expert are sums over the tokens of all ranks of ep: FSDP sums them over the ranks that hold the
    same expert.

    Args:
        shared_by, ranks_per_node, exchange, split_over: as of SpreadStyle.

    Raises:
        TypeError: a module that is no dtcp.models.moe.Experts.
        ValueError: what SpreadStyle.token_exchange refuses, or channels that etp does not divide.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Experts):
            raise TypeError(
                f"ExpertParallel spreads a dtcp.models.moe.Experts, got a {type(module).__name__}: "
                f"name the experts themselves in the plan."
            )
        exchange = self.token_exchange(module.num_experts, device_mesh)
        mesh = device_mesh if self.split_over is None else self.split_over
        if mesh.ndim > 1:
            _check_channels(module, mesh.size(1))
        for name, channels in HIDDEN_CHANNELS.items():
            distribute_parameter(module, name, mesh, *(Shard(0), channels)[: mesh.ndim])
        module.__class__ = _SpreadExperts
        cast(_SpreadExperts, module).claim(exchange, self.shared_by)
        return module


def expert_styles(
    mesh: ParallelMesh, names: Iterable[str], num_experts: int
) -> tuple[dict[str, ParallelStyle], dict[str, ParallelStyle]]:
    """The styles of experts on the axes tp and ep: spread over ep, or else split over tp.

    Args:
        names: of the modules, or patterns.
    Raises:
        ValueError: a number of experts that ep does not divide.
    """
    if mesh.ep is None:
        return {name: ExpertTensorParallel() for name in names}, {}
    check_experts(num_experts, mesh.size("ep"))
    style = ExpertParallel(
        mesh.tp, mesh.ep_ranks_per_node, split_over=mesh.experts if mesh.degrees.etp > 1 else None
    )
    return {}, {name: replace(style) for name in names}


class _SpreadExperts(Experts):
    """Experts that a style has spread over ranks. Made by the style, never built directly."""

    exchange: TokenExchange
    shared_by: DeviceMesh | None

    def claim(self, exchange: TokenExchange, shared_by: DeviceMesh | None) -> None:
        """Take this rank's experts, on the axis ep."""
        self.exchange, self.shared_by = exchange, shared_by

    def mix(self, tokens: RoutedTokens, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return exchanged(self.exchange, tokens, self.compute, real=real, shared_by=self.shared_by)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = (
            weight.to_local(grad_placements=[Shard(0), channels][: weight.device_mesh.ndim])
            for name, channels in HIDDEN_CHANNELS.items()
            if isinstance(weight := getattr(self, name), DTensor)
        )
        return gate, up, down


@torch.no_grad()
def largest_load(parts: Iterable[nn.Module], axis: DeviceMesh | None) -> float | None:
    """How uneven routing was: tokens of the most loaded expert over the mean, in the worst layer.

    Of all tokens in training that are no padding since it was asked last. All ranks call it.

    Args:
        axis: the ranks whose tokens make up a batch, ParallelMesh.loss; None for this rank only.
    Returns:
        1.0 where all experts had equally many; None for a model without experts or tokens.

    Traffic per rank: one all-reduce of the loads.
    """
    modules = [module for part in parts for module in part.modules()]
    loads_of_layers = [module.load for module in modules if isinstance(module, Experts)]
    loads_of_layers += [vars(module)[LOAD] for module in modules if LOAD in vars(module)]
    if not loads_of_layers:
        return None
    loads = torch.stack(loads_of_layers)
    if axis is not None and axis.size() > 1:
        dist.all_reduce(loads, group=axis.get_group())
    for load in loads_of_layers:
        load.zero_()
    ratios = loads.amax(1) / loads.mean(1)
    return float(ratios.max()) if loads.any() else None

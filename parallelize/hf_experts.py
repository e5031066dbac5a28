"""Experts of a model of transformers on ranks of their own."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.distributed.mesh import ParallelMesh
from dtcp.experts import RoutedTokens, TokenExchange
from dtcp.experts.libraries import AUTO
from dtcp.forward import wrap_forward
from dtcp.kernels.grouped_linear import grouped_linear
from dtcp.metadata import BatchMetadata
from dtcp.models.moe import add_load, real_tokens
from dtcp.parallelize.expert_exchange import LOAD, SpreadStyle, check_experts, exchanged
from dtcp.parallelize.plans.adapters import adapted
from dtcp.parallelize.tensor_parallel import (
    distribute_parameter,
    is_experts,
    joined_view,
    local_parameters,
    why_not_known,
)


def hf_expert_plan(
    model: nn.Module, mesh: ParallelMesh, exchange: str = "auto"
) -> dict[str, ParallelStyle]:
    """The style of every module of experts on the axis ep; nothing where there is no such axis.

    Args:
        exchange: as of SpreadStyle.
    Raises:
        ValueError: experts whose weights are not known, or that ep does not divide.
    """
    if mesh.ep is None:
        if exchange != AUTO:
            raise ValueError(
                f"Tokens travel to experts on other ranks, got expert_exchange={exchange!r} for a "
                f"mesh without ep: leave it out, or give the mesh an ep."
            )
        return {}
    if mesh.degrees.etp > 1:
        raise ValueError(
            f"Experts of transformers are whole under ep, got etp={mesh.degrees.etp}: set etp to "
            f"1, and ep takes ranks of tp, too."
        )
    experts = {name: module for name, module in model.named_modules() if is_experts(module)}
    for name, module in experts.items():
        reason = why_not_known(module)
        if reason:
            raise ValueError(
                f"Experts go to ranks of their own by their weights, got {name} of a "
                f"{type(module).__name__}: {reason}; set ep to 1."
            )
        check_experts(module.num_experts, mesh.size("ep"))
    return {name: HFExpertParallel(mesh.tp, mesh.ep_ranks_per_node, exchange) for name in experts}


def check_experts_without_adapters(model: nn.Module) -> None:
    """Refuse adapters on experts: peft adds them to weights in the form of transformers' files.

    Raises:
        ValueError: naming the experts.
    """
    for name, module in model.named_modules():
        if is_experts(module) and adapted(name)[1]:
            raise ValueError(
                f"Experts are computed by their weights alone, got adapters on {name}: leave "
                f"experts out of target_parameters of LoRA, and adapt attention."
            )


@dataclass
class HFExpertParallel(SpreadStyle):
    """Give each rank of ep experts of its own, as ExpertParallel does.

    Products are those of dtcp's own grouped_linear, whatever the model's experts_implementation.

    Args:
        shared_by, ranks_per_node, exchange: as of SpreadStyle.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        experts: Any = module
        exchange = self.token_exchange(experts.num_experts, device_mesh)
        for name, _ in list(module.named_parameters(recurse=False)):
            distribute_parameter(module, name, device_mesh, Shard(0))
        setattr(module, REAL, None)
        # No buffer: load_hf has transformers fill buffers that no checkpoint holds.
        device = device_mesh.device_type
        setattr(module, LOAD, torch.zeros(experts.num_experts, device=device))
        wrap_forward(module, _Spread(exchange, self.shared_by))
        return module


REAL, EXPERTS = "dtcp_real_tokens", "dtcp_experts_inside"
"""Where experts find which tokens are no padding, and a layer its modules of experts."""


def tell_experts_of_padding(
    model: nn.Module, blocks: Iterable[str], experts: Iterable[str]
) -> None:
    """Let layers tell the experts inside them which tokens are padding, each time they run.

    transformers hands a layer's keyword arguments to its attention alone. What a layer tells is
    of its own call, so that one that is recomputed tells the same.

    Args:
        blocks, experts: names of layers, and of modules of experts that a style spreads.
    """
    names = list(experts)
    for block in blocks:
        inside = [name.removeprefix(f"{block}.") for name in names if name.startswith(f"{block}.")]
        if inside:
            layer = model.get_submodule(block)
            vars(layer)[EXPERTS] = inside
            wrap_forward(layer, _telling)


def _telling(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    metadata = [x for x in (*args, *kwargs.values()) if isinstance(x, BatchMetadata)]
    real = real_tokens(metadata[0]) if metadata else None
    for name in getattr(layer, EXPERTS):
        setattr(layer.get_submodule(name), REAL, real)
    return forward(*args, **kwargs)


@dataclass(frozen=True)
class _Spread:
    """What runs in the place of the forward of a module of experts."""

    exchange: TokenExchange
    shared_by: DeviceMesh | None

    def __call__(
        self,
        experts: Any,
        _: Any,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        tokens = RoutedTokens(hidden_states, top_k_index, top_k_weights)
        real = getattr(experts, REAL)
        if experts.training:
            add_load(getattr(experts, LOAD), top_k_index, real)
        compute = partial(_compute, experts, joined_view(experts, local_parameters(experts)))
        out, _ = exchanged(self.exchange, tokens, compute, real=real, shared_by=self.shared_by)
        return out


def _compute(experts: Any, weights: Mapping[str, Tensor], rows: Tensor, ends: Tensor) -> Tensor:
    """This rank's experts for rows [R, D] that are sorted by expert: [R, D]."""
    places = torch.arange(rows.shape[0], device=rows.device)
    expert = torch.searchsorted(ends, places, right=True)

    def project(x: Tensor, name: str) -> Tensor:
        weight = weights[name].to(x.dtype)
        out = grouped_linear(x, weight.transpose(1, 2) if experts.is_transposed else weight, ends)
        return out + weights[f"{name}_bias"].to(x.dtype)[expert] if experts.has_bias else out

    hidden = project(rows, "gate_up_proj" if experts.has_gate else "up_proj")
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    return project(hidden, "down_proj")

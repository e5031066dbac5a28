"""Experts of a model of transformers on ranks of their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.distributed.mesh import ParallelMesh
from dtcp.experts import TokenExchange
from dtcp.forward import wrap_forward
from dtcp.kernels.grouped_linear import grouped_linear
from dtcp.parallelize.experts import check_experts, token_exchange
from dtcp.parallelize.tensor_parallel import (
    copy_to_region,
    distribute_parameter,
    is_experts,
    joined_view,
    local_parameters,
    reduce_from_region,
    why_not_known,
)


def hf_expert_plan(model: nn.Module, mesh: ParallelMesh) -> dict[str, ParallelStyle]:
    """The style of every module of experts on the axis ep; nothing where there is no such axis.

    Raises:
        ValueError: experts whose weights are not known, or that ep does not divide.
    """
    if mesh.ep is None:
        return {}
    found = {name: module for name, module in model.named_modules() if is_experts(module)}
    for name, module in found.items():
        reason = why_not_known(module)
        if reason:
            raise ValueError(
                f"Experts go to ranks of their own by their weights, got {name} of a "
                f"{type(module).__name__}: {reason}; set ep to 1."
            )
        check_experts(module.num_experts, mesh.size("ep"))
    return {name: HFExpertParallel(mesh.tp) for name in found}


@dataclass
class HFExpertParallel(ParallelStyle):
    """Give each rank of ep experts of its own, as ExpertParallel does.

    Products are those of dtcp's own grouped_linear, whatever the model's experts_implementation.

    Args:
        shared_by: the axis tp, whose ranks hold the same tokens: each sends a part of them.
    """

    shared_by: DeviceMesh | None = None

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        experts: Any = module
        exchange = token_exchange(experts.num_experts, device_mesh, shared_by=self.shared_by)
        for name, _ in list(module.named_parameters(recurse=False)):
            distribute_parameter(module, name, device_mesh, Shard(0))
        wrap_forward(module, _Spread(exchange, self.shared_by))
        return module


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
        x, weight = hidden_states, top_k_weights
        if self.shared_by is not None:
            x, weight = (copy_to_region(y, self.shared_by) for y in (x, weight))
        compute = partial(_compute, experts, joined_view(experts, local_parameters(experts)))
        out, _ = self.exchange(x, top_k_index, weight, compute)
        return out if self.shared_by is None else reduce_from_region(out, self.shared_by)


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

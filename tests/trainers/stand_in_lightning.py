"""What a LightningModule meets of Lightning 2.6, with its `ModelParallelStrategy`, on CPUs.

In its order: ranks, configure_model (several times), rows by the axis `data_parallel` of a mesh of
two axes, the optimizer, and steps of the mean loss of several batches, clipped.
"""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler


class LightningModule(nn.Module):
    """A model with its own step."""

    device_mesh: DeviceMesh

    def log(self, name: str, value: Any) -> None:
        self.trainer.callback_metrics[name] = value.detach()


class ModelParallelStrategy:
    """The sizes of the two axes."""

    def __init__(self, data_parallel_size: int, tensor_parallel_size: int) -> None:
        self.sizes = (data_parallel_size, tensor_parallel_size)


class Trainer:
    """The loop, without epochs."""

    def __init__(
        self,
        *,
        strategy: ModelParallelStrategy,
        max_steps: int,
        accumulate_grad_batches: int,
        gradient_clip_val: float,
        **_: Any,
    ) -> None:
        self.strategy, self.steps, self.clip = strategy, max_steps, gradient_clip_val
        self.accumulated, self.callback_metrics = accumulate_grad_batches, {}

    def fit(self, module: Any, loader: DataLoader) -> None:
        dist.init_process_group("gloo")
        axes = ("data_parallel", "tensor_parallel")
        module.device_mesh = init_device_mesh("cpu", self.strategy.sizes, mesh_dim_names=axes)
        module.trainer = self
        for _ in range(2):
            module.configure_model()
        optimizer = module.configure_optimizers()
        batches = self._batches(module, loader)
        for _ in range(self.steps):
            for index in range(self.accumulated):
                batch = module.transfer_batch_to_device(next(batches), torch.device("cpu"), 0)
                (module.training_step(batch, index) / self.accumulated).backward()
            nn.utils.clip_grad_norm_(module.parameters(), self.clip)
            optimizer.step()
            optimizer.zero_grad()

    def _batches(self, module: Any, loader: DataLoader) -> Iterator[Any]:
        dealt = module.device_mesh["data_parallel"]
        rows = loader.dataset
        sampler = DistributedSampler(rows, dealt.size(), dealt.get_local_rank(), shuffle=True)
        yield from DataLoader(rows, loader.batch_size, sampler=sampler)


def install() -> None:
    """Let this be imported as Lightning."""
    modules = {x: ModuleType(x) for x in ("lightning", "lightning.pytorch")}
    modules["lightning.pytorch.strategies"] = strategies = ModuleType("strategies")
    modules["lightning"].LightningModule = LightningModule
    modules["lightning"].Trainer = Trainer
    strategies.ModelParallelStrategy = ModelParallelStrategy
    sys.modules.update(modules)

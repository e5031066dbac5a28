"""accelerate's Accelerator, to which the ranks of a cp and tp group are one process."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.data import RandomSampler

from dtcp.distributed.mesh import ParallelMesh
from dtcp.huggingface.whole_rows import WholeRows
from dtcp.trainers.optimizer_trial import check_steps_shards


class MeshAccelerator(Accelerator):
    """Deals rows to batch ranks, leaves models as they are, and sums gradients as FSDP does.

    Rows stay on the host: shard_hf_batch reads them there, and moves this rank's part.
    """

    mesh: ParallelMesh
    rows_of: Callable[[nn.Module], WholeRows]
    """Wraps a model so that a loop can call it with whole rows."""
    look_at: Callable[[Any], None]
    """Called with each batch as soon as its loader has it, a step before the loop does."""

    @classmethod
    def adopt(
        cls,
        accelerator: Accelerator,
        mesh: ParallelMesh,
        rows_of: Callable[[nn.Module], WholeRows],
        look_at: Callable[[Any], None],
    ) -> None:
        """Turn an accelerator that a Trainer has made into one of this class.

        The Trainer looks its class up in its own module and makes it from a dozen settings: making
        another one would take a copy of that code.
        """
        accelerator.__class__ = cls
        accelerator.mesh, accelerator.rows_of, accelerator.look_at = mesh, rows_of, look_at

    @property
    def num_processes(self) -> int:
        return self.mesh.size("batch")

    @property
    def process_index(self) -> int:
        return self.mesh.rank("batch")

    def prepare_data_loader(
        self, data_loader: Any, device_placement: Any = None, slice_fn_for_dispatch: Any = None
    ) -> Any:
        loader = super().prepare_data_loader(data_loader, False, slice_fn_for_dispatch)
        if isinstance(loader, DataLoaderShard):
            _show_batches(loader.base_dataloader, self.look_at)
            if self.num_processes > 1 and _draws_own_order(data_loader.sampler):
                # Take the first rank's state: collators may have drawn more numbers on some ranks.
                loader.rng_types = ["torch"]
        return loader

    def prepare_model(
        self, model: nn.Module, device_placement: Any = None, evaluation_mode: bool = False
    ) -> nn.Module:
        return model if isinstance(model, WholeRows) else self.rows_of(model)

    def prepare_optimizer(self, optimizer: Any, device_placement: Any = None) -> Any:
        """Try an optimizer on shards first, whoever has made it."""
        if not isinstance(optimizer, AcceleratedOptimizer):  # in a second train(): tried before
            check_steps_shards(optimizer)
        return super().prepare_optimizer(optimizer, device_placement)

    def unwrap_model(self, model: Any, *_: Any, **__: Any) -> Any:
        return model.module if isinstance(model, WholeRows) else model

    def gather(self, tensor: Any) -> Any:
        """The values of all batch ranks, one after the other in dim 0."""
        return recursively_apply(self._gather_one, tensor, error_on_other_type=True)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """The values of all batch ranks, lists of objects too, without what a loader repeats."""
        if not use_gather_object and _has_tensors_alone(input_data):
            return super().gather_for_metrics(input_data)
        parts: list[Any] = [input_data] * self.num_processes
        if self.mesh.batch is not None:
            dist.all_gather_object(parts, input_data, group=self.mesh.batch.get_group())
        objects = [x for part in parts for x in part]
        state = self.gradient_state
        left = state.remainder if state.end_of_dataloader else 0
        return objects[:left] if left > 0 else objects

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Reduce over batch ranks, each counted once; `scale` only matters on XLA."""

        def of_all(x: Tensor) -> Tensor:
            parts = self._gather_one(x[None])
            if reduction == "max":
                return parts.amax(0)
            return parts.sum(0) / (self.num_processes if reduction == "mean" else 1)

        return recursively_apply(of_all, tensor, error_on_other_type=True)

    def _gather_one(self, x: Tensor) -> Tensor:
        x = (x[None] if x.ndim == 0 else x).contiguous().to(self.device)
        if self.mesh.batch is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self.mesh.batch.size())]
        dist.all_gather(parts, x, group=self.mesh.batch.get_group())
        return torch.cat(parts)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Divide the loss: loops average over processes, while gradients here are sums."""
        super().backward(loss / self.mesh.size("batch"), **kwargs)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        norm = super().clip_grad_norm_(parameters, max_norm, norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _has_tensors_alone(data: Any) -> bool:
    try:
        recursively_apply(lambda x: x, data, error_on_other_type=True)
    except TypeError:
        return False
    return True


def _draws_own_order(sampler: Any) -> bool:
    """Whether a sampler draws from torch's generator and accelerate does not seed it by epoch."""
    return getattr(sampler, "generator", ...) is None and not isinstance(sampler, RandomSampler)


def _show_batches(loader: Any, look_at: Callable[[Any], None]) -> None:
    """Call `look_at` with each batch as soon as a loader has it: accelerate asks for one ahead."""

    def __iter__(self: Any) -> Iterator[Any]:
        for batch in kind.__iter__(self):
            look_at(batch)
            yield batch

    kind = type(loader)
    loader.__class__ = type(kind.__name__, (kind,), {"__iter__": __iter__})

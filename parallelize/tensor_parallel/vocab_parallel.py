"""Embeddings split by vocabulary over tp."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F

from dtcp.forward import wrap_forward
from dtcp.parallelize.tensor_parallel.distribute import distribute_parameter
from dtcp.parallelize.tensor_parallel.regions import reduce_from_region


@dataclass
class VocabParallelEmbedding(ParallelStyle):
    """Split the rows of an embedding over the axis; each rank looks up the tokens of its rows.

    torch's RowwiseParallel does the same, but makes the gradient of the whole vocabulary on
    every rank before it takes its part (2.13). The vocabulary is a multiple of the axis. An id that
    it does not have gives NaN: one device would raise, and zeros would not be noticed.

    Traffic per rank: forward, an all-reduce of the embeddings.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute_parameter(module, "weight", device_mesh, Shard(0))
        embedding = cast(nn.Embedding, module)
        padding_idx, size = embedding.padding_idx, embedding.num_embeddings

        def look_up(module: nn.Module, _: Any, input_ids: Tensor) -> Tensor:
            weight = cast(DTensor, module.weight).to_local(grad_placements=[Shard(0)])
            row = input_ids - device_mesh.get_local_rank() * len(weight)
            is_local = (row >= 0) & (row < len(weight))
            known = (input_ids >= 0) & (input_ids < size)
            nothing = torch.where(known, 0.0, torch.nan).to(weight.dtype)[..., None]
            part = F.embedding(row.where(is_local, 0), weight)
            part = part.where(is_local[..., None], nothing)
            if padding_idx is not None:
                # The padding token's row is not trained.
                part = part.where((input_ids != padding_idx)[..., None], part.detach())
            # Copied, for FSDP warns of modules that return views.
            return reduce_from_region(part, device_mesh).clone()

        wrap_forward(module, look_up)
        return module


@dataclass
class ScaledVocabParallelEmbedding(ParallelStyle):
    """VocabParallelEmbedding for an embedding that does more in its forward than look up.

    The forward runs as it is, on DTensors.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute_parameter(module, "weight", device_mesh, Shard(0))
        replicated = [Replicate()]
        for name, buffer in list(module.named_buffers(recurse=False)):
            placed = distribute_tensor(buffer, device_mesh, replicated)
            module.register_buffer(name, placed, persistent=False)

        def look_up(_: nn.Module, forward: Callable[..., Any], input_ids: Tensor) -> Tensor:
            x = forward(DTensor.from_local(input_ids, device_mesh, replicated, run_check=False))
            # Waited for and copied, as VocabParallelEmbedding does.
            x = x.redistribute(placements=replicated, async_op=False)
            local: Tensor = x.to_local(grad_placements=replicated).clone()
            return local

        wrap_forward(module, look_up)
        return module

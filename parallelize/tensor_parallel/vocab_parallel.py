"""Embeddings split by vocabulary over tp."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F

from dtcp.forward import RefusesPickle, wrap_forward
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

        def look_up(module: nn.Module, _: Any, input_ids: Tensor) -> Tensor:
            return _looked_up(cast(nn.Embedding, module), input_ids, device_mesh)

        wrap_forward(module, look_up)
        return module


@dataclass
class ScaledVocabParallelEmbedding(ParallelStyle):
    """VocabParallelEmbedding for a subclass, whose forward does more than `super().forward(ids)`.

    That call looks tokens up as VocabParallelEmbedding does, and the rest runs on plain tensors: of
    DTensors, torch (2.13) takes a sum's product with a number for one with a tensor of one element,
    or the reverse, where the process has seen the other first.

    Raises:
        TypeError: a forward that does not call its base class's.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        kind = type(module)
        if not isinstance(module, nn.Embedding) or "__class__" not in _names_read(kind.forward):
            raise TypeError(
                f"{type(self).__name__} splits an embedding whose forward calls that of "
                f"nn.Embedding by super(), got {kind.__name__}: set tp=1 and give the ranks to cp."
            )
        distribute_parameter(module, "weight", device_mesh, Shard(0))

        class OverVocabulary(_OfOneModule):
            def forward(self, input_ids: Tensor) -> Tensor:
                return _looked_up(self, input_ids, device_mesh)

        # In the order of classes it stands between the module's own and nn.Embedding.
        module.__class__ = type(kind.__name__, (kind, OverVocabulary), {})
        return module


class _OfOneModule(nn.Embedding):
    """A module of a class that was made for it, and that pickle would not find."""

    def __reduce_ex__(self, _: Any) -> Any:
        return RefusesPickle().__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


def _looked_up(module: nn.Embedding, input_ids: Tensor, mesh: DeviceMesh) -> Tensor:
    """The embeddings of tokens, of a module that has a part of the rows."""
    weight = cast(DTensor, module.weight).to_local(grad_placements=[Shard(0)])
    row = input_ids - mesh.get_local_rank() * len(weight)
    is_local = (row >= 0) & (row < len(weight))
    known = (input_ids >= 0) & (input_ids < module.num_embeddings)
    nothing = torch.where(known, 0.0, torch.nan).to(weight.dtype)[..., None]
    part = F.embedding(row.where(is_local, 0), weight)
    part = part.where(is_local[..., None], nothing)
    if module.padding_idx is not None:
        # The padding token's row is not trained.
        part = part.where((input_ids != module.padding_idx)[..., None], part.detach())
    # Copied, for FSDP warns of modules that return views.
    return reduce_from_region(part, mesh).clone()


def _names_read(forward: Any) -> tuple[str, ...]:
    """What a function reads of where it was defined: super() reads the class."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return () if code is None else code.co_freevars

"""Tensors: nested in containers, sharing memory, written to in place."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_unflatten

flat_leaves, put_back = tree_flatten, tree_unflatten
"""Nested lists, tuples and dicts, taken apart into leaves and put together (2.11-2.15)."""


def storage_key(storage: torch.UntypedStorage) -> int:
    """One number for all views of a piece of memory, fake ones included (2.11-2.15)."""
    return storage._cdata


def weak_storage(x: Tensor) -> StorageWeakRef:
    """Equal for views of one piece of memory; keeps its name, not the memory (2.11-2.15)."""
    return StorageWeakRef(x.untyped_storage())


def changes_of(x: Tensor) -> int:
    """How often a tensor has been written to in place (2.11-2.15)."""
    return x._version


def base_of(x: Tensor) -> Tensor:
    """The tensor that one is a view of, or itself (2.11-2.15)."""
    return x if x._base is None else x._base

"""A load planner that unpickles values only, of the kinds that the state has now."""

import io
import pickle
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from dtcp._torch.checkpoint import set_nested
from dtcp.checkpoint.metadata import nested_pickles, refuse_code


class SafeLoadPlanner(DefaultLoadPlanner):
    """torch's DefaultLoadPlanner with weights_only=True for every entry that is no tensor.

    Raises:
        ValueError: while loading, where an entry holds code, or is of another kind than what the
            state has in its place.
    """

    def create_local_plan(self) -> LoadPlan:
        saved = {} if self.metadata is None else self.metadata.state_dict_metadata
        for name, value in self.state_dict.items():
            if name in saved and isinstance(value, Tensor) != isinstance(
                saved[name], TensorStorageMetadata
            ):
                kinds = ("another value", "a tensor")
                has = kinds[isinstance(value, Tensor)]
                raise ValueError(
                    f"A checkpoint has the entries of the state, got {kinds[has == kinds[0]]} for "
                    f"{name} where the state has {has}: it is of another model, or damaged."
                )
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        loaded = _plain(name, value)
        _refuse_other_kind(name, loaded, self.state_dict.get(name))
        if self.flatten_state_dict:
            set_nested(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


def _plain(name: str, value: io.BytesIO) -> Any:
    try:
        loaded = torch.load(value, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"A checkpoint holds data and no code, got an entry {name} that torch refuses to read "
            f"as data: nothing of it was run; do not use this folder unless you know where it "
            f"comes from."
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"The entry {name} of a checkpoint is damaged ({error})") from error
    # torchtitan's data loaders unpickle the bytes of their state once more.
    for inner in nested_pickles(loaded):
        refuse_code(inner, f"an entry {name} with a pickle in it")
    return loaded


def _refuse_other_kind(name: str, loaded: Any, current: Any) -> None:
    """Refuse text in the place of a number, say, which an object may take and go wrong later."""
    kind = type(current)
    if kind not in (bool, int, float, str, bytes) or loaded is None:
        return
    accepted = (int, float) if kind in (int, float) else (kind,)
    if type(loaded) not in accepted:
        raise ValueError(
            f"A checkpoint has the entries of the state, got a {type(loaded).__name__} for {name} "
            f"where the state has a {kind.__name__}: it is of another version, or forged."
        )

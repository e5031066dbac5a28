"""A pipeline stage's part of a model: its layers, how its weights are drawn, and what is copied."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Placement

from dtcp.parallelize.tied_parameters import TiedParameters
from dtcp.sequence.masks import Mask

Copied = tuple[Mapping[int, str], ...]
"""Of each weight that several stages hold, its name in each of them."""


@dataclass(frozen=True)
class Sharded:
    """How a DTensor lies on the axis tp."""

    device_mesh: DeviceMesh
    placements: tuple[Placement, ...]

    @property
    def ranks(self) -> int:
        """Of the axis."""
        return self.device_mesh.size()


@dataclass(frozen=True)
class StagePart:
    """What a stage knows of the model that it is a part of.

    Args:
        index: of the stage.
        layers: the numbers of its own.
        masks: of all layers of the model, with their number: what balanced layouts balance.
        whole: the model on the meta device, in whose order weights are drawn.
        reads_ids: whether it is called with token ids besides.
        sharded: how what it hands on is sharded over tp; None for a plain tensor.
        random: the state that all stages draw from, which makes weights those of one device; None
            where each stage draws by itself.
        tied: the names of each weight of the model that has several.
        copied: of each weight that several stages hold, its name there, by the stage's index.
    """

    index: int
    layers: range
    masks: Mapping[Mask, int]
    whole: Any
    reads_ids: bool
    sharded: "Sharded | None"
    random: Tensor | None
    tied: TiedParameters
    copied: Copied

    @property
    def copies(self) -> tuple[str, ...]:
        """Weights of the stage that another one trains."""
        own = (names.get(self.index) for names in self.copied if self.index > min(names))
        return tuple(name for name in own if name is not None)

    def init_weights(self, stage: Any, **options: Any) -> None:
        """Draw all weights and keep a stage's; in the place of its own method.

        Where each stage draws by itself, copies become equal later (dtcp.copied_weights).
        """
        if self.random is None:
            with _stand_ins(stage, self.tied):
                type(stage).init_weights(stage, **options)
            return
        # The modules of other stages, for as long as this takes.
        whole = copy.deepcopy(self.whole).to_empty(device="cpu")
        for name, child in stage.named_children():
            if name != "layers":
                setattr(whole, name, child)
        for number, layer in stage.layers.named_children():
            setattr(whole.layers, number, layer)
        _place_tied(whole, stage, self.tied)
        torch.set_rng_state(self.random)
        whole.init_weights(**options)


def _place_tied(model: nn.Module, stage: nn.Module, tied: TiedParameters) -> None:
    """Give a model a stage's weights by all names that they have in the whole one."""
    own = dict(stage.named_parameters(remove_duplicate=False))
    for names in tied:
        held = (own[name] for name in names if name in own)
        weight = next(held, None)
        for name in names if weight is not None else ():
            module, _, last = name.rpartition(".")
            model.get_submodule(module).register_parameter(last, weight)


@contextmanager
def _stand_ins(stage: nn.Module, tied: TiedParameters) -> Iterator[None]:
    """Inside, a stage has a module of every name of a tied weight: its model ties as it draws."""
    modules = {name.partition(".")[0] for names in tied for name in names}
    missing = [module for module in sorted(modules) if getattr(stage, module) is None]
    for module in missing:
        stand_in = nn.Module()
        stand_in.register_parameter("weight", None)
        setattr(stage, module, stand_in)
    _place_tied(stage, stage, tied)
    try:
        yield
    finally:
        for module in missing:
            setattr(stage, module, None)

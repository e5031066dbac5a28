"""Parameter names, ours and those of a published checkpoint, each mapped to the other."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

LAYER = "{i}"


@dataclass(frozen=True)
class NameMap:
    """Pairs of our name and theirs; `{i}` stands for the index of a layer.

    Weights are renamed, not changed: both sides hold the same tensors, so a sharded state dict
    is mapped as it is.
    """

    pairs: tuple[tuple[str, str], ...]

    def theirs(self, name: str) -> str:
        """Their name of a parameter that we call `name`.

        Raises:
            ValueError: a name that is in no pair.
        """
        return _translate(name, self.pairs)

    def ours(self, name: str) -> str:
        """Our name of a parameter that they call `name`.

        Raises:
            ValueError: a name that is in no pair.
        """
        return _translate(name, tuple((theirs, ours) for ours, theirs in self.pairs))

    def to_theirs(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename all of our state dict."""
        return {self.theirs(name): tensor for name, tensor in state_dict.items()}

    def to_ours(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename all of their state dict."""
        return {self.ours(name): tensor for name, tensor in state_dict.items()}


def _translate(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for source, target in pairs:
        match = re.fullmatch(re.escape(source).replace(re.escape(LAYER), r"(\d+)"), name)
        if match:
            return target.replace(LAYER, match[1]) if LAYER in target else target
    raise ValueError(
        f"A name map knows every parameter of its model, got name={name}: the checkpoint is of "
        f"another model, or the map lacks a pair."
    )

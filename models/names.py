"""Two names for each parameter, ours and a published checkpoint's, and the way between them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

LAYER = "{i}"


@dataclass(frozen=True)
class NameMap:
    """Pairs of a name of ours and one of theirs; `{i}` stands for the number of a layer.

    Weights are renamed, not changed: both sides hold the same tensors, so a sharded state dict
    is mapped as it is.
    """

    pairs: tuple[tuple[str, str], ...]

    def theirs(self, name: str) -> str:
        """Their name for a parameter of ours."""
        return _translate(name, self.pairs)

    def ours(self, name: str) -> str:
        """Our name for a parameter of theirs."""
        return _translate(name, tuple((theirs, ours) for ours, theirs in self.pairs))

    def to_theirs(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a whole state dict of ours."""
        return {self.theirs(name): tensor for name, tensor in state_dict.items()}

    def to_ours(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a whole state dict of theirs."""
        return {self.ours(name): tensor for name, tensor in state_dict.items()}


def _translate(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for source, target in pairs:
        number = re.fullmatch(re.escape(source).replace(re.escape(LAYER), r"(\d+)"), name)
        if number:
            return target.replace(LAYER, number[1]) if LAYER in target else target
    raise ValueError(
        f"A name map knows every parameter of its model, got name={name}: the checkpoint is of "
        f"another model, or the map lacks a pair."
    )

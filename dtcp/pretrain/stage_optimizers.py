"""Optimizers of pipeline stages: of a config's groups of weights each stage has some."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import dtcp.torchtitan  # noqa: F401

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from dtcp.pretrain.staged import of_all_stages


@contextmanager
def groups_of_stages() -> Iterator[dict[str, None]]:
    """Inside, optimizers are built of the groups that a stage has weights of.

    torchtitan (0.3.0) ends on the ranks of a stage without any, as of a group of embeddings.

    Returns:
        the patterns of those that this rank's stages have, once they are built.
    """
    found: dict[str, None] = {}
    whole = OptimizersContainer._build_param_groups

    def of_stage(stage: nn.Module, groups: Sequence[ParamGroupConfig], options: Any) -> Any:
        own = list(_held(stage, groups))
        found.update(dict.fromkeys(group.pattern for group in own))
        return whole(stage, own, options)

    OptimizersContainer._build_param_groups = staticmethod(of_stage)
    try:
        yield found
    finally:
        OptimizersContainer._build_param_groups = staticmethod(whole)


def check_groups(
    groups: Sequence[ParamGroupConfig], found: dict[str, None], pp: DeviceMesh | None
) -> None:
    """Refuse a group that no stage has weights of, on the ranks of all.

    Args:
        found: the patterns of those that this rank's stages have.
    Raises:
        ValueError: naming its pattern.
    """
    of_all = of_all_stages(found, pp)
    for group in groups:
        if group.pattern not in of_all:
            raise ValueError(
                f"A group of the optimizer has weights, got pattern={group.pattern!r}, which "
                f"matches none of any stage that groups before it leave: correct it, or leave the "
                f"group out."
            )


def _held(stage: nn.Module, groups: Sequence[ParamGroupConfig]) -> Iterator[ParamGroupConfig]:
    """Those that a stage has weights of; a weight is in the first group that matches it."""
    left = {name for name, weight in stage.named_parameters() if weight.requires_grad}
    for group in groups:
        own = {name for name in left if re.search(group.pattern, name)}
        left -= own
        if own:
            yield group

"""Optimizers' settings, which stay those of the config when a state is loaded.

A state dict of an optimizer has them too (lr, betas, weight decay), and loading it would put back
what the checkpoint was made with: "lower the learning rate and start again" would do nothing in the
first step, and a changed weight decay nothing at all.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

NOT_SETTINGS = ("params", "param_names")


class Hyperparameters:
    """What the groups of some optimizers are set to, to be restored."""

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        # By optimizer: loading a state gives it other groups.
        self._saved = [(each, list(map(_settings, each.param_groups))) for each in optimizers]

    def restore(self, schedulers: Iterable[LRScheduler]) -> None:
        """Set the groups to what they were, and the learning rates to where the schedules stand."""
        for optimizer, groups in self._saved:
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(values)
        for scheduler in schedulers:
            rates = zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True)
            for group, rate in rates:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in NOT_SETTINGS}

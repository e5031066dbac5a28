"""Optimizers and hooks of a model's weights from before it was parallelized: of weights that nobody
reads any more."""

import gc
import weakref
from typing import Any

from torch import nn

from dtcp._torch.gradient_hooks import has_gradient_hooks


class EarlierWeights:
    """The weights of a model before styles and FSDP put others in their places."""

    def __init__(self, model: nn.Module) -> None:
        # Without keeping them alive.
        self._weights = [weakref.ref(parameter) for parameter in model.parameters()]
        self._hooked = {
            name: weakref.ref(parameter)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and has_gradient_hooks(parameter)
        }

    def check_no_hooks(self, model: nn.Module) -> None:
        """Refuse hooks of weights that the model has no longer: they would not be called.

        Raises:
            ValueError: naming the first weight.
        """
        now = {id(parameter) for parameter in model.parameters()}
        lost = [name for name, ref in self._hooked.items() if id(ref()) not in now]
        if lost:
            raise ValueError(
                f"Weights of a parallel model take the places of those it had, got hooks of "
                f"gradients on {len(lost)} of these, {lost[0]} first, which would not be called: "
                f"change their gradients after backward, before the optimizer's step."
            )

    def check_no_optimizer(self, model: nn.Module) -> None:
        """Refuse an optimizer that holds weights which the model has no longer.

        It would train nothing: gradients arrive at the weights that took their places.

        Raises:
            ValueError: naming the model.
        """
        now = {id(parameter) for parameter in model.parameters()}
        left = [x for ref in self._weights if (x := ref()) is not None and id(x) not in now]
        # Mostly nobody holds any; to look for who does is to look through all objects.
        held = sum(_is_an_optimizers(x) for x in gc.get_referrers(*left)) if left else 0
        if held:
            raise ValueError(
                f"An optimizer is made of the parameters of a parallel model, got one with {held} "
                f"parameter groups of this {type(model).__name__} from before: make it afterwards."
            )


def _is_an_optimizers(holder: Any) -> bool:
    """Whether a list is that of a parameter group."""
    return type(holder) is list and any(
        type(group) is dict and group.get("params") is holder and "lr" in group
        for group in gc.get_referrers(holder)
    )

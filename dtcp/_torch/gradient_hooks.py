"""Whether somebody looks at the gradient of a weight (2.11-2.15): torch has no public reader."""

from torch import nn


def has_gradient_hooks(weight: nn.Parameter) -> bool:
    """Whether register_hook, or register_post_accumulate_grad_hook, was called of it."""
    return bool(weight._backward_hooks) or bool(weight._post_accumulate_grad_hooks)

"""Losses that modules keep as attributes for a trainer to add: of balance, of routers."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def auxiliary_losses(model: nn.Module) -> dict[str, Tensor]:
    """What the last forward left on modules: single numbers with a gradient, by their names."""
    return {
        f"auxiliary loss {name}": loss
        for part, module in model.named_modules()
        for key, value in vars(module).items()
        # Parameters, buffers and submodules, which are no losses.
        if not key.startswith(("_parameters", "_buffers", "_modules"))
        for name, loss in _losses(f"{part}.{key}".lstrip("."), value)
    }


def _losses(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.grad_fn is not None and value.numel() == 1 and value.is_floating_point():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            yield name, whole.reshape(())
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _losses(f"{name}[{key!r}]", part)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _losses(f"{name}[{index}]", part)

"""Losses that modules keep as attributes for a trainer to add, as routers do for balance."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def auxiliary_losses(model: nn.Module, before: Collection[Tensor] = ()) -> dict[str, Tensor]:
    """Losses that a forward left on modules: single numbers with a gradient, by name.

    Args:
        before: losses that earlier forwards left, as where a module appends to a list.
    """
    known, plain = {id(loss) for loss in before}, vars(nn.Module()).keys()
    return {
        f"auxiliary loss {name}": loss
        for part, module in model.named_modules()
        for key, value in vars(module).items()
        # What every module has (parameters, buffers, submodules) is not a loss.
        if key not in plain
        for name, loss in _losses(f"{part}.{key}".lstrip("."), value, known)
    }


def _losses(name: str, value: Any, known: Collection[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if id(value) not in known and value.grad_fn is not None and value.numel() == 1:
            yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _losses(f"{name}[{key!r}]", part, known)
    elif isinstance(value, list | tuple):
        new = [part for part in value if id(part) not in known]
        for index, part in enumerate(new):
            yield from _losses(f"{name}[{index}]", part, known)


def whole(loss: Tensor) -> Tensor:
    """A loss as a number: [], the same on all ranks of tp."""
    return (loss.full_tensor() if isinstance(loss, DTensor) else loss).reshape(())

"""Put a DTensor in the place of a module's parameter, and refuse what has no equal parts."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, distribute_tensor


def distribute_parameter(
    module: nn.Module,
    name: str,
    mesh: DeviceMesh,
    *placements: Placement,
    value: Tensor | None = None,
) -> None:
    """Distribute a parameter over the axes of a mesh; it stays frozen if it was.

    Args:
        placements: one for each axis.
        value: what to distribute in its stead, the same numbers in another shape.
    """
    parameter = module.get_parameter(name)
    whole = parameter if value is None else value
    placed = distribute_tensor(whole.detach(), mesh, list(placements))
    module.register_parameter(name, nn.Parameter(placed, parameter.requires_grad))


def check_divisible(sizes: Mapping[str, int], tp: int) -> None:
    """Check that tp divides what a plan splits.

    Args:
        sizes: what the plan splits, by the names of the model's config.
    Raises:
        ValueError: a size that tp does not divide.
    """
    for name, size in sizes.items():
        if size % tp:
            raise ValueError(
                f"Tensor parallelism splits {name} into equal parts, got {name}={size} with "
                f"tp={tp}: choose a tp that divides it, and give the ranks to cp instead."
            )

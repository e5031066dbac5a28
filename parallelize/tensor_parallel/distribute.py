"""Put a DTensor in the place of a module's parameter."""

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

"""How the axes of a device mesh become what a run asks of it: one axis of several, FSDP's mesh."""

from collections.abc import Sequence

from torch.distributed.device_mesh import DeviceMesh

from dtcp._torch.mesh import concatenated, flattened, unflattened

SPARSE_AXES = ("dp_shard", "cp", "tp")
"""What the axes of experts, edp_shard and ep, are carved out of."""


def one_axis(device_mesh: DeviceMesh, axes: Sequence[str], name: str) -> DeviceMesh | None:
    """The axes of more than one rank as one axis; None if there are none."""
    names = device_mesh.mesh_dim_names or ()
    wide = tuple(axis for axis in axes if axis in names and device_mesh[axis].size() > 1)
    if not wide:
        return None
    return device_mesh[wide[0]] if len(wide) == 1 else flattened(device_mesh[wide], name)


def check_places(device_mesh: DeviceMesh, axes: Sequence[str]) -> None:
    """Refuse a mesh on which ranks that differ on other axes disagree about their places on these.

    A process group counts its ranks upwards, in whatever order a mesh lists them: two ranks of tp
    could hold other tokens than each other, or two of cp read other rows.

    Args:
        axes: of one view; those that the mesh lacks have one rank.
    Raises:
        ValueError: the same on every rank.
    """
    names = device_mesh.mesh_dim_names or ()
    dims = [names.index(axis) for axis in axes if axis in names]
    if not dims:
        return
    kept = device_mesh.ndim - len(dims)
    ranks = device_mesh.mesh.movedim(dims, tuple(range(kept, device_mesh.ndim))).flatten(kept)
    places = ranks.reshape(-1, ranks.shape[-1]).argsort(1).argsort(1)
    if (places != places[0]).any():
        raise ValueError(
            f"Process groups count ranks upwards, so a mesh lists them in one order along "
            f"{' and '.join(axes)}, got {device_mesh.mesh.tolist()} on {names}: list ranks upwards "
            f"along each axis."
        )


def narrow_axis(device_mesh: DeviceMesh) -> DeviceMesh | None:
    """An axis of weights that has one rank; None if there is none."""
    names = device_mesh.mesh_dim_names or ()
    narrow = (axis for axis in ("dp_shard", "cp") if axis in names)
    return next((device_mesh[axis] for axis in narrow if device_mesh[axis].size() == 1), None)


def weights_mesh(
    device_mesh: DeviceMesh, fsdp: DeviceMesh | None, *, needed: bool
) -> DeviceMesh | None:
    """The mesh of `fully_shard`.

    Args:
        needed: also where no axis of dense weights has ranks; it is then one of one rank.
    Raises:
        ValueError: it is needed, and there is no axis for it.
    """
    replicate = one_axis(device_mesh, ("dp_replicate",), "dp_replicate")
    if replicate is None and (fsdp is not None or not needed):
        return fsdp
    if fsdp is None:
        fsdp = narrow_axis(device_mesh)
        if fsdp is None:
            raise ValueError(
                f"Weights need an axis to be sharded on, got "
                f"mesh_dim_names={device_mesh.mesh_dim_names}: add dp_shard, of size 1."
            )
    if replicate is None:
        return fsdp
    # The root mesh stays the same, as fully_shard wants it of its mesh and the tp mesh.
    return concatenated([replicate, fsdp])


def expert_axes(device_mesh: DeviceMesh, ep: int, etp: int) -> DeviceMesh | None:
    """The axes (edp_shard, ep) over the ranks of dp_shard, cp and tp, with etp; None without ep."""
    if ep == 1:
        return None
    whole = one_axis(device_mesh, SPARSE_AXES, "sparse")
    # There are ranks: ep divides them and is more than 1.
    assert whole is not None
    sizes, names = (whole.size() // ep // etp, ep, etp), ("edp_shard", "ep", "etp")
    kept = 3 if etp > 1 else 2
    return unflattened(whole, sizes[:kept], names[:kept])


def expert_weights_mesh(device_mesh: DeviceMesh, expert_axes: DeviceMesh) -> DeviceMesh:
    """What `fully_shard` gets for experts: edp_shard, or (dp_replicate, edp_shard)."""
    replicate = one_axis(device_mesh, ("dp_replicate",), "dp_replicate")
    shard = expert_axes["edp_shard"]
    return shard if replicate is None else concatenated([replicate, shard])

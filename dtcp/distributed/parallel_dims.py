"""What we read of torchtitan's `ParallelDims`, without importing it."""

from typing import Protocol

from torch.distributed.device_mesh import DeviceMesh

from dtcp._torch.mesh import unflattened


class ParallelDims(Protocol):
    """torchtitan's meshes, by the names of their axes."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int
    spmd_backend: str

    @property
    def world_mesh(self) -> DeviceMesh: ...

    def get_optional_mesh(
        self, dims: str | list[str], *, include_singleton_axes: bool = False
    ) -> DeviceMesh | None: ...


def axes_with_etp(dims: ParallelDims, etp: int) -> tuple[DeviceMesh, DeviceMesh, DeviceMesh]:
    """The meshes ep, (ep, etp), and what `fully_shard` gets for experts.

    torchtitan (0.3.0) has no axis etp: it is added beside its own.
    """
    edp = dims.dp_shard * dims.cp * dims.tp // dims.ep // etp
    names = ("pp", "dp_replicate", "edp_shard", "ep", "etp")
    axes = unflattened(dims.world_mesh, (dims.pp, dims.dp_replicate, edp, dims.ep, etp), names)
    replicated = axes["dp_replicate", "edp_shard"]
    return (
        axes["ep"],
        axes["ep", "etp"],
        replicated if dims.dp_replicate > 1 else axes["edp_shard"],
    )


def one_rank_fsdp(dims: ParallelDims) -> DeviceMesh | None:
    """torchtitan's fsdp axis of one rank, where experts have several to be sharded on."""
    several = dims.ep > 1 and dims.dp_shard * dims.cp * dims.tp > dims.ep
    return dims.get_optional_mesh("fsdp") if several else None

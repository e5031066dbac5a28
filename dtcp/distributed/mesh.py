"""The axes of a run: which ranks split a sequence, which a weight, which the batch.

One device mesh has the axes dp_replicate, dp_shard, cp and tp, the last one fastest. What a
person asks of it is a 1-D view: `fsdp` for what shards weights, `batch` for who reads which
sample, `loss` for who has a share in the mean over tokens. The views are attributes, so that a
typing error is found where it is made.

    dp_shard=2, cp=2, tp=1      global rank:  0  1  2  3
                                batch rank:   0  0  1  1      ranks of one cp group read one row
                                cp rank:      0  1  0  1
                                fsdp rank:    0  1  2  3

Experts are laid over the same ranks in another way: `ep` is carved out of dp_shard x cp x tp, its
ranks next to each other, and edp_shard is what is left of the three.

    dp_shard=2, cp=2, ep=2      ep rank:      0  1  0  1      which experts a rank holds
                                edp rank:     0  0  1  1      which part of each of them

In front of them stands `pp`, whose ranks hold the layers of different stages: each of its ranks has
the other axes to itself, and all of them read the same rows.
"""

from dataclasses import asdict, dataclass, field

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dtcp.distributed.mesh_views import (
    check_places,
    expert_axes,
    expert_weights_mesh,
    narrow_axis,
    one_axis,
    weights_mesh,
)
from dtcp.distributed.nodes import check_same_nodes, even_neighbours, neighbours_on_axis
from dtcp.distributed.parallel_dims import ParallelDims, axes_with_etp, one_rank_fsdp
from dtcp.sequence.arguments import check_ints, check_kind

AXES = ("dp_replicate", "dp_shard", "cp", "tp")
"""What the ranks of one stage are laid out over."""
STAGED_AXES = ("pp", *AXES)
VIEWS = ("cp", "tp", "fsdp", "batch", "loss", "ep", "pp")


@dataclass(frozen=True)
class Degrees:
    """How many ranks each axis has; the product of all but ep is the world size.

    Args:
        ep: ranks that have different experts, out of dp_shard * cp * tp; 1: each has all.
        etp: tp where it splits the channels of experts beside ep, which is then carved out of
            dp_shard * cp alone; 1: ep takes ranks of tp, too.
        pp: ranks that hold different stages of the model.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for name, degree in asdict(self).items():
            check_ints("A mesh", **{name: degree})
            if degree < 1:
                raise ValueError(
                    f"A degree counts ranks, got {name}={degree}: give 1 to leave the axis out."
                )
        if self.etp > 1 and (self.etp != self.tp or self.ep == 1):
            raise ValueError(
                f"Ranks that split experts beside ep are those of tp, got etp={self.etp} with "
                f"tp={self.tp} and ep={self.ep}: give 1, or tp with an ep of 2 or more."
            )
        if self.etp > 1 and self.sparse // self.etp % self.ep:
            raise ValueError(
                f"Beside etp, ranks of ep are carved out of dp_shard * cp, got ep={self.ep} with "
                f"dp_shard={self.dp_shard} * cp={self.cp}: choose an ep that divides it."
            )
        if self.sparse % self.ep:
            raise ValueError(
                f"Ranks of ep are carved out of dp_shard * cp * tp, got ep={self.ep} with "
                f"dp_shard={self.dp_shard} * cp={self.cp} * tp={self.tp} = {self.sparse}: choose "
                f"an ep that divides it."
            )

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.pp * self.dp_replicate * self.sparse

    @property
    def sparse(self) -> int:
        """Ranks that experts may be spread over: edp_shard * ep * etp."""
        return self.dp_shard * self.cp * self.tp

    def __str__(self) -> str:
        axes = STAGED_AXES if self.pp > 1 else AXES
        dense = " * ".join(f"{name}={getattr(self, name)}" for name in axes)
        if self.ep == 1:
            return dense
        return f"{dense} (ep={self.ep}{f', etp={self.etp}' if self.etp > 1 else ''})"


@dataclass(frozen=True, eq=False)
class ParallelMesh:
    """A device mesh and its views, each None where it would have one rank.

    Build it with a classmethod. The flattened views are kept here: torch deprecates slicing them
    off their root mesh.
    """

    degrees: Degrees
    device_mesh: DeviceMesh = field(repr=False)
    cp: DeviceMesh | None
    tp: DeviceMesh | None
    fsdp: DeviceMesh | None
    """dp_shard x cp: what shards weights."""
    batch: DeviceMesh | None
    """dp_replicate x dp_shard: who reads which sample."""
    loss: DeviceMesh | None
    """dp_replicate x dp_shard x cp: whose tokens one mean is taken over."""
    hsdp: DeviceMesh | None
    """What `fully_shard` gets: (dp_replicate, fsdp) if weights are replicated, else fsdp."""
    attention: DeviceMesh | None
    """What q, k and v are DTensors on: (cp, tp), or the one of the two that has ranks."""
    ep: DeviceMesh | None = None
    """Whose ranks have different experts."""
    expert_hsdp: DeviceMesh | None = None
    """What `fully_shard` gets for experts: edp_shard, or (dp_replicate, edp_shard)."""
    experts: DeviceMesh | None = None
    """What weights of experts are DTensors on: ep, or (ep, etp)."""
    narrow: DeviceMesh | None = None
    """An axis of one rank: what `fully_shard` gets where `hsdp` is None, and weights are to be cast
    or offloaded all the same."""
    ranks_per_node: int = 0
    """Ranks of one machine, neighbours by their global ranks; 0: nobody has said."""
    pp: DeviceMesh | None = None
    """Whose ranks hold different stages; a schedule's `PipelineStage` gets its group."""

    @classmethod
    def from_degrees(
        cls, degrees: Degrees, device_type: str, *, ranks_per_node: int = 0
    ) -> "ParallelMesh":
        """Lay all ranks out; the default process group must be there.

        Args:
            ranks_per_node: ranks that a launcher starts on each machine, LOCAL_WORLD_SIZE under
                torchrun: what several of them read then crosses to their machine once. 0: nobody
                has said.
        Raises:
            ValueError: the degrees do not multiply to the world size, or this process has no
                device of that type.
        """
        check_kind("A ParallelMesh", Degrees, degrees=degrees)
        check_kind("A ParallelMesh", str, device_type=device_type)
        _check_devices(device_type)
        if not dist.is_initialized():
            raise ValueError(
                f"A ParallelMesh lays out the ranks of the default process group, got {degrees} "
                f"and no group: call torch.distributed.init_process_group first."
            )
        world_size = dist.get_world_size()
        if degrees.world != world_size:
            raise ValueError(
                f"The degrees multiply to the world size, got {degrees} = {degrees.world} with "
                f"world_size={world_size}: change a degree, or start {degrees.world} ranks."
            )
        axes = STAGED_AXES if degrees.pp > 1 else AXES
        shape = tuple(getattr(degrees, name) for name in axes)
        device_mesh = init_device_mesh(device_type, shape, mesh_dim_names=axes)
        return cls.from_device_mesh(
            device_mesh, ep=degrees.ep, etp=degrees.etp, ranks_per_node=ranks_per_node
        )

    @classmethod
    def from_device_mesh(
        cls, device_mesh: DeviceMesh, *, ep: int = 1, etp: int = 1, ranks_per_node: int = 0
    ) -> "ParallelMesh":
        """Read the axes of an existing mesh by name; an axis that it lacks has one rank.

        Args:
            ep: ranks that have different experts, carved out of dp_shard x cp x tp.
            etp: as of Degrees.
            ranks_per_node: as of from_degrees.
        Raises:
            ValueError: an axis has another name, the axes come in another order, ranks are listed
                so that others of a group would be at other places, or ep does not divide them.
        """
        check_kind("A ParallelMesh", DeviceMesh, device_mesh=device_mesh)
        check_ints("A ParallelMesh", least=0, ranks_per_node=ranks_per_node)
        names = device_mesh.mesh_dim_names or ()
        if not names or list(names) != [name for name in STAGED_AXES if name in names]:
            raise ValueError(
                f"A mesh has axes out of {STAGED_AXES}, in this order, got mesh_dim_names={names}: "
                f"name the axes so, or build the mesh with ParallelMesh.from_degrees."
            )
        for axes in (("pp",), ("dp_replicate", "dp_shard"), ("cp",), ("tp",)):
            check_places(device_mesh, axes)
        sizes = dict(zip(names, device_mesh.shape, strict=True))
        degrees = Degrees(**sizes, ep=ep, etp=etp)
        fsdp = one_axis(device_mesh, ("dp_shard", "cp"), "fsdp")
        cp, tp = one_axis(device_mesh, ("cp",), "cp"), one_axis(device_mesh, ("tp",), "tp")
        sparse = expert_axes(device_mesh, ep, etp)
        # Then fully_shard is needed for the experts, and takes the other weights along.
        spread = sparse is not None and sparse["edp_shard"].size() > 1
        return cls(
            degrees=degrees,
            device_mesh=device_mesh,
            cp=cp,
            tp=tp,
            fsdp=fsdp,
            batch=one_axis(device_mesh, ("dp_replicate", "dp_shard"), "batch"),
            loss=one_axis(device_mesh, ("dp_replicate", "dp_shard", "cp"), "loss"),
            hsdp=weights_mesh(device_mesh, fsdp, needed=spread),
            attention=device_mesh["cp", "tp"] if cp and tp else cp or tp,
            ep=sparse and sparse["ep"],
            expert_hsdp=sparse and expert_weights_mesh(device_mesh, sparse),
            experts=sparse and (sparse["ep", "etp"] if etp > 1 else sparse["ep"]),
            narrow=narrow_axis(device_mesh),
            ranks_per_node=ranks_per_node,
            pp=one_axis(device_mesh, ("pp",), "pp"),
        )

    @classmethod
    def of_sequence(cls, axis: DeviceMesh) -> "ParallelMesh":
        """The sequence's axis alone, whatever its name: for a caller that has no more to give."""
        check_kind("A ParallelMesh", DeviceMesh, axis=axis)
        if axis.ndim != 1:
            raise ValueError(
                f"A sequence is sharded over one axis, got {axis}: slice it, as in mesh['cp']."
            )
        cp = axis if axis.size() > 1 else None
        return cls(
            degrees=Degrees(cp=axis.size()),
            device_mesh=axis,
            cp=cp,
            tp=None,
            fsdp=cp,
            batch=None,
            loss=cp,
            hsdp=cp,
            attention=cp,
            narrow=axis if cp is None else None,
        )

    @classmethod
    def from_parallel_dims(
        cls, dims: ParallelDims, *, etp: int = 1, ranks_per_node: int = 0
    ) -> "ParallelMesh":
        """Take over the meshes that torchtitan has built, so that groups are made once.

        Args:
            etp: as of Degrees; torchtitan (0.3.0) has no such axis, and one is added.
            ranks_per_node: as of from_degrees.
        Raises:
            ValueError: a backend of torchtitan whose parameters are DTensors on all axes.
        """
        check_ints("A ParallelMesh", least=0, ranks_per_node=ranks_per_node)
        if dims.spmd_backend == "spmd_types":
            # Its dense mesh has these axes, none of them merged.
            names = STAGED_AXES if dims.pp > 1 else AXES
            dense = dims.get_optional_mesh(list(names), include_singleton_axes=True)
            assert dense is not None
            return cls.from_device_mesh(dense, ep=dims.ep, etp=etp, ranks_per_node=ranks_per_node)
        if dims.spmd_backend != "partial_dtensor":
            raise ValueError(
                f"ParallelMesh has the axes of two of torchtitan's backends, got "
                f"spmd_backend={dims.spmd_backend!r}: set parallelism.spmd_backend to "
                f"'spmd_types' or 'partial_dtensor'."
            )

        def view(*names: str) -> DeviceMesh | None:
            mesh = dims.get_optional_mesh(list(names))
            return None if mesh is None or mesh.size() == 1 else mesh

        cp, tp, fsdp = view("cp"), view("tp"), view("fsdp")
        # Not `view`: beside dp_replicate an fsdp axis of one rank is kept.
        replicated = dims.get_optional_mesh(["dp_replicate", "fsdp"])
        edp = ["dp_replicate", "efsdp"] if dims.dp_replicate > 1 else ["efsdp"]
        ep, expert_hsdp = view("ep"), dims.get_optional_mesh(edp) if dims.ep > 1 else None
        experts = ep
        degrees = Degrees(dims.dp_replicate, dims.dp_shard, dims.cp, dims.tp, dims.ep, etp, dims.pp)
        if etp > 1:
            ep, experts, expert_hsdp = axes_with_etp(dims, etp)
        return cls(
            degrees=degrees,
            device_mesh=dims.world_mesh,
            cp=cp,
            tp=tp,
            fsdp=fsdp,
            batch=view("batch"),
            loss=view("loss"),
            hsdp=replicated if dims.dp_replicate > 1 else fsdp or one_rank_fsdp(dims),
            attention=view("cp", "tp") if cp and tp else cp or tp,
            ep=ep,
            # Kept with one rank, too: under ep it is what casts experts.
            expert_hsdp=expert_hsdp,
            experts=experts,
            narrow=dims.get_optional_mesh("fsdp") if fsdp is None else None,
            ranks_per_node=ranks_per_node,
            pp=view("pp"),
        )

    def size(self, name: str) -> int:
        """Ranks on a 1-D view."""
        mesh = self._view(name)
        return 1 if mesh is None else mesh.size()

    def rank(self, name: str) -> int:
        """This rank's coordinate on a 1-D view."""
        mesh = self._view(name)
        return 0 if mesh is None else mesh.get_local_rank()

    def cp_ranks_per_node(self) -> int:
        """Neighbours on cp that are on one machine; 0 where nobody has said. All ranks of cp ask.

        Raises:
            ValueError: machines that cut a group of cp into unequal parts, or ranks that disagree.
        """
        if self.cp is None:
            return 0
        check_same_nodes(self.ranks_per_node, self.cp.device_type, self.cp.get_group())
        # Its own axes have the names of AXES; torchtitan's order is the same, with tp fastest.
        names = self.device_mesh.mesh_dim_names or ()
        grid = self.device_mesh.mesh
        if "cp" in names:
            grid = grid.movedim(names.index("cp"), -1)
        else:
            grid = grid.reshape(-1, self.degrees.cp, self.degrees.tp).movedim(1, 2)
        return neighbours_on_axis(grid.reshape(-1, self.degrees.cp), self.ranks_per_node)

    @property
    def ep_ranks_per_node(self) -> int:
        """Neighbours on ep that are on one machine; 0 where that is all, or not the same for all.

        The same on every rank: it decides which groups are made.
        """
        ep, each = self.degrees.ep, self.ranks_per_node
        if self.ep is None or not each:
            return 0
        # ep is the last part of the mesh but for etp, whatever its axes are called.
        whole = self.device_mesh.mesh.reshape(-1, ep, self.degrees.etp)
        run = even_neighbours(whole.movedim(1, 2).reshape(-1, ep), each)
        return 0 if run == ep else run

    def _view(self, name: str) -> DeviceMesh | None:
        if name not in VIEWS:
            raise ValueError(
                f"A ParallelMesh has the 1-D views {VIEWS}, got name={name!r}: use one."
            )
        return getattr(self, name)


def check_parallel_mesh(subject: str, mesh: object) -> None:
    """Refuse what is no ParallelMesh, and say how a DeviceMesh becomes one.

    Raises:
        TypeError: as above.
    """
    remedy = "give one"
    if isinstance(mesh, DeviceMesh):
        remedy = "give ParallelMesh.from_device_mesh(mesh), which reads its axes by name"
    check_kind(subject, ParallelMesh, remedy, mesh=mesh)


def check_no_stages(subject: str, degrees: Degrees) -> None:
    """Refuse an axis pp where the model is whole: each of its ranks would do the same.

    Raises:
        ValueError: as above.
    """
    if degrees.pp > 1:
        raise ValueError(
            f"{subject} runs all layers of its model on every rank, got {degrees}: set pp to 1, or "
            f"write a loop of stages (docs/pipeline.md)."
        )


def _check_devices(device_type: str) -> None:
    """Refuse a type that has no device here; torch's own error names a private function."""
    try:
        here = torch.get_device_module(device_type).is_available()
    except RuntimeError:
        here = False
    if not here:
        raise ValueError(
            f"A ParallelMesh lies on devices of this machine, got device_type={device_type!r}, of "
            f"which torch {torch.__version__} finds none: pass 'cpu', or run where they are."
        )

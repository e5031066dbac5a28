"""Meshes: every view has the right ranks, however the mesh was made."""

from dataclasses import asdict

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from dtcp import HeadTail, shard_batch
from dtcp.distributed.mesh import STAGED_AXES, VIEWS, Degrees, ParallelMesh
from dtcp.parallelize import ParallelPlan, parallelize, parallelize_hf
from tests.harness.spmd import spmd

FOUR_RANKS = [
    Degrees(cp=4),
    Degrees(dp_shard=2, cp=2),
    Degrees(cp=2, tp=2),
    Degrees(dp_replicate=2, cp=2),
    Degrees(dp_replicate=2, dp_shard=2),
    Degrees(dp_replicate=2, tp=2),
    Degrees(tp=4),
    Degrees(pp=2, cp=2),
    Degrees(pp=2, dp_replicate=2),
]
INSIDE = {
    "pp": ("pp",),
    "cp": ("cp",),
    "tp": ("tp",),
    "fsdp": ("dp_shard", "cp"),
    "batch": ("dp_replicate", "dp_shard"),
    "loss": ("dp_replicate", "dp_shard", "cp"),
}
"""The axes that each view spans."""
EXPERTS = [
    Degrees(cp=4, ep=2),
    Degrees(dp_shard=2, cp=2, ep=4),
    Degrees(cp=2, tp=2, ep=2),
    Degrees(tp=4, ep=2),
    Degrees(dp_replicate=2, cp=2, ep=2),
    Degrees(cp=2, tp=2, ep=2, etp=2),
    Degrees(dp_replicate=2, tp=2, ep=2),
]


def check_views(mesh, degrees):
    """Sizes, ranks and members of all views, from the global rank and the degrees alone."""
    sizes = [getattr(degrees, axis) for axis in STAGED_AXES]
    grid = torch.arange(degrees.world).view(sizes)
    here = (grid == dist.get_rank()).nonzero()[0].tolist()
    assert mesh.degrees == degrees
    for name in INSIDE:
        # All ranks that differ from this one only on the view's axes, the last axis fastest.
        inside = [axis in INSIDE[name] for axis in STAGED_AXES]
        index = [slice(None) if free else place for free, place in zip(inside, here, strict=True)]
        members = grid[tuple(index)].flatten().tolist()
        assert mesh.size(name) == len(members)
        assert mesh.rank(name) == members.index(dist.get_rank())
        view = getattr(mesh, name)
        assert (view is None) == (len(members) == 1)
        if view is not None:
            assert view.mesh.tolist() == members
            assert dist.get_process_group_ranks(view.get_group()) == members


BACKENDS = ("partial_dtensor", "spmd_types")
"""Of torchtitan; its dense mesh has a merged axis under the first, all of ours under the other."""


def titan_dims(degrees, backend):
    from torchtitan.distributed import ParallelDims

    axes = {name: degree for name, degree in asdict(degrees).items() if name != "etp"}
    return ParallelDims(**axes, world_size=4, spmd_backend=backend)


def groups(mesh):
    """The names of the process groups of all views."""
    views = (getattr(mesh, name) for name in VIEWS)
    return [view and view.get_group().group_name for view in views]


def check_hsdp_and_attention(mesh, degrees):
    if degrees.dp_replicate > 1:
        assert mesh.hsdp.shape == (degrees.dp_replicate, degrees.dp_shard * degrees.cp)
        assert mesh.hsdp.mesh_dim_names[0] == "dp_replicate"
    else:
        assert mesh.hsdp is mesh.fsdp
    if degrees.cp > 1 and degrees.tp > 1:
        assert mesh.attention.mesh_dim_names == ("cp", "tp")
        assert mesh.attention.shape == (degrees.cp, degrees.tp)
    else:
        assert mesh.attention is (mesh.cp or mesh.tp)


@pytest.mark.parametrize("degrees", FOUR_RANKS, ids=str)
@spmd(ranks=4)
def test_views_of_degrees_span_the_right_ranks(mesh, degrees):
    made = ParallelMesh.from_degrees(degrees, "cpu")
    check_views(made, degrees)
    check_hsdp_and_attention(made, degrees)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "degrees",
    [
        Degrees(cp=2, tp=2),
        Degrees(dp_replicate=2, cp=2),
        Degrees(dp_shard=4),
        Degrees(pp=2, dp_shard=2),
    ],
    ids=str,
)
@spmd(ranks=4)
def test_views_of_torchtitans_meshes_span_the_right_ranks(mesh, degrees, backend):
    dims = titan_dims(degrees, backend)
    made = ParallelMesh.from_parallel_dims(dims)
    check_views(made, degrees)
    check_hsdp_and_attention(made, degrees)
    # Asked for again, groups are not made again.
    again = ParallelMesh.from_parallel_dims(dims)
    assert groups(again) == groups(made)
    narrow = ParallelMesh.from_parallel_dims(titan_dims(Degrees(tp=4), backend)).narrow
    assert narrow.size() == 1
    dims.spmd_backend = "full_dtensor"
    with pytest.raises(ValueError, match="spmd_backend='full_dtensor': set"):
        ParallelMesh.from_parallel_dims(dims)


def check_experts(mesh, degrees):
    """Ranks of ep are neighbours, beside those of etp, and ranks of edp_shard hold the same."""
    whole = torch.arange(degrees.world).view(degrees.dp_replicate, -1, degrees.ep, degrees.etp)
    part = dist.get_rank() % degrees.etp
    assert mesh.experts.shape == ((degrees.ep, degrees.etp) if degrees.etp > 1 else (degrees.ep,))
    grid = whole[..., part]
    replica, shard, expert = (grid == dist.get_rank()).nonzero()[0].tolist()
    assert (mesh.size("ep"), mesh.rank("ep")) == (degrees.ep, expert)
    assert mesh.ep.mesh.tolist() == grid[replica, shard].tolist()
    same = grid[replica, :, expert]
    if degrees.dp_replicate > 1:
        assert mesh.expert_hsdp.mesh.tolist() == grid[:, :, expert].tolist()
    else:
        assert mesh.expert_hsdp.mesh.tolist() == same.tolist()
    assert mesh.hsdp is not None or len(same) == 1


@pytest.mark.parametrize("degrees", EXPERTS, ids=str)
@spmd(ranks=4)
def test_experts_axes_are_carved_out_of_dp_shard_cp_and_tp(mesh, degrees):
    for made in (
        ParallelMesh.from_degrees(degrees, "cpu"),
        *(
            ParallelMesh.from_parallel_dims(titan_dims(degrees, backend), etp=degrees.etp)
            for backend in BACKENDS
        ),
    ):
        check_views(made, degrees)
        check_experts(made, degrees)


@spmd(axes={"dp_shard": 2, "cp": 2})
def test_experts_axes_are_carved_out_of_an_existing_mesh(mesh):
    check_experts(ParallelMesh.from_device_mesh(mesh, ep=4), Degrees(dp_shard=2, cp=2, ep=4))
    with pytest.raises(ValueError, match=r"got ep=3 with dp_shard=2 \* cp=2 \* tp=1 = 4: choose"):
        ParallelMesh.from_device_mesh(mesh, ep=3)


@spmd(axes={"dp_shard": 2, "cp": 2})
def test_mesh_without_some_axes_has_one_rank_on_them(mesh):
    check_views(ParallelMesh.from_device_mesh(mesh), Degrees(dp_shard=2, cp=2))


@spmd(ranks=1)
def test_one_rank_has_no_views(mesh):
    made = ParallelMesh.from_degrees(Degrees(), "cpu")
    names = (*VIEWS, "hsdp", "attention", "expert_hsdp")
    assert [getattr(made, name) for name in names] == [None] * 10
    assert [made.size(name) for name in VIEWS] == [1] * 7
    assert [made.rank(name) for name in VIEWS] == [0] * 7
    assert made.narrow.size() == 1


@pytest.mark.parametrize(
    "degrees", [Degrees(dp_replicate=2, cp=2), Degrees(dp_replicate=2, tp=2)], ids=str
)
@spmd(ranks=4)
def test_fully_shard_replicates_and_shards_on_hsdp(mesh, degrees):
    """Also beside a TP plan, where fully_shard wants both meshes cut out of one."""
    made = ParallelMesh.from_degrees(degrees, "cpu")
    linear = nn.Linear(4, 8, bias=False)
    weight = linear.weight.detach().clone()
    if made.tp is not None:
        linear = parallelize_module(
            linear, made.tp, ColwiseParallel(output_layouts=torch.distributed.tensor.Replicate())
        )
    fully_shard(linear, mesh=made.hsdp)
    x = torch.randn(3, 4)
    torch.testing.assert_close(linear(x), x @ weight.T)
    linear(x).sum().backward()
    torch.testing.assert_close(linear.weight.grad.full_tensor(), x.sum(0).expand(8, 4))


@spmd(ranks=4)
def test_degrees_that_do_not_fit_the_world_are_refused(mesh):
    with pytest.raises(ValueError, match=r"cp=2 \* tp=3 = 6 with world_size=4"):
        ParallelMesh.from_degrees(Degrees(cp=2, tp=3), "cpu")


@pytest.mark.parametrize("device_type", ["gpu", "mps"])
@spmd(ranks=1)
def test_devices_that_are_not_there_are_refused(mesh, device_type):
    """A script for GPUs on a laptop: torch's error named a private function of its own."""
    with pytest.raises(
        ValueError, match=f"got device_type='{device_type}', of which torch .* none"
    ):
        ParallelMesh.from_degrees(Degrees(), device_type)


@spmd(ranks=2)
def test_axes_of_other_names_or_another_order_are_refused(mesh):
    for names in [("dp", "cp"), ("cp", "dp_shard")]:
        other = init_device_mesh("cpu", (1, 2), mesh_dim_names=names)
        with pytest.raises(ValueError, match="in this order, got mesh_dim_names="):
            ParallelMesh.from_device_mesh(other)
        with pytest.raises(ValueError, match=r"sharded over one axis, got .* slice it"):
            ParallelMesh.of_sequence(other)
    with pytest.raises(ValueError, match="in this order"):
        ParallelMesh.from_device_mesh(init_device_mesh("cpu", (2,)))


@spmd(ranks=1)
def test_a_device_mesh_in_the_place_of_a_parallel_mesh_is_told_the_way(mesh):
    own = init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))
    batch, module = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}, torch.nn.Linear(1, 1)
    for call in (
        lambda: shard_batch(batch, own, HeadTail, model=module),
        lambda: parallelize(module, own, ParallelPlan(tp={}, cp={}, blocks=())),
        lambda: parallelize_hf(module, own),
    ):
        with pytest.raises(TypeError, match=r"ParallelMesh\.from_device_mesh\(mesh\)"):
            call()


@spmd(ranks=2)
def test_replicas_without_an_axis_to_shard_on_are_refused(mesh):
    replicas = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_replicate",))
    with pytest.raises(ValueError, match="add dp_shard, of size 1"):
        ParallelMesh.from_device_mesh(replicas)


@spmd(ranks=2)
def test_view_of_another_name_is_refused(mesh):
    with pytest.raises(ValueError, match="got name='dp'"):
        ParallelMesh.from_degrees(Degrees(cp=2), "cpu").size("dp")


def test_degree_below_one_is_refused():
    with pytest.raises(ValueError, match="got cp=0"):
        Degrees(cp=0)


@pytest.mark.parametrize(
    ("degrees", "ranks_per_node", "expected"),
    [
        (Degrees(dp_shard=2, cp=2, ep=4), 2, 2),
        (Degrees(dp_shard=2, cp=2, ep=4), 4, 0),
        (Degrees(dp_shard=2, cp=2, ep=4), 1, 1),
        (Degrees(dp_shard=2, cp=2, ep=4), 3, 0),
        (Degrees(cp=4, ep=2), 2, 0),
        (Degrees(dp_shard=2, cp=2, ep=4), 0, 0),
        (Degrees(cp=4), 2, 0),
        (Degrees(cp=2, tp=2, ep=2, etp=2), 2, 1),
        (Degrees(cp=2, tp=2, ep=2, etp=2), 4, 0),
    ],
)
@spmd(ranks=4)
def test_ep_of_a_mesh_knows_its_nodes(mesh, degrees, ranks_per_node, expected):
    """Neighbours on ep on one machine, where all of its groups are cut alike."""
    made = ParallelMesh.from_degrees(degrees, "cpu", ranks_per_node=ranks_per_node)
    assert made.ep_ranks_per_node == expected


@spmd(ranks=4)
def test_ep_of_a_mesh_in_another_order_knows_its_nodes(mesh):
    """Machines have global ranks 0, 1 and 2, 3, and neighbours on the mesh are on two."""
    crossed = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("dp_shard", "cp"))
    assert ParallelMesh.from_device_mesh(crossed, ep=4, ranks_per_node=2).ep_ranks_per_node == 0
    assert ParallelMesh.from_device_mesh(crossed, ep=2, ranks_per_node=2).ep_ranks_per_node == 1
    with pytest.raises(ValueError, match=r"takes ranks_per_node >= 0, got ranks_per_node=-1"):
        ParallelMesh.from_device_mesh(crossed, ranks_per_node=-1)


LISTED = [
    ([[3, 0], [2, 1]], ("dp_shard", "cp"), "dp_replicate and dp_shard"),
    ([[3, 0], [2, 1]], ("cp", "tp"), "cp"),
    ([[0, 2], [3, 1]], ("dp_shard", "tp"), "dp_replicate and dp_shard"),
    ([[0, 1], [3, 2]], ("dp_shard", "cp"), "cp"),
]


@pytest.mark.parametrize(("rows", "names", "axes"), LISTED)
@spmd(ranks=4)
def test_ranks_that_would_disagree_on_their_places_are_refused(mesh, rows, names, axes):
    """Two of one tp group would hold other tokens, two of one cp group read other rows."""
    listed = DeviceMesh("cpu", rows, mesh_dim_names=names)
    with pytest.raises(ValueError, match=rf"in one order along {axes}, got"):
        ParallelMesh.from_device_mesh(listed)


@pytest.mark.parametrize("rows", [[[0, 2], [1, 3]], [[3, 1], [2, 0]], [[2, 3], [0, 1]]])
@spmd(ranks=4)
def test_ranks_in_any_order_that_axes_agree_on_have_one_place(mesh, rows):
    listed = DeviceMesh("cpu", rows, mesh_dim_names=("dp_shard", "cp"))
    made = ParallelMesh.from_device_mesh(listed)
    places = [None] * 4
    dist.all_gather_object(places, (made.rank("batch"), made.rank("cp")))
    for row in rows:
        assert len({places[rank][0] for rank in row}) == 1
        assert {places[rank][1] for rank in row} == {0, 1}

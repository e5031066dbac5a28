"""Weights that no one keeps alike on the ranks of cp are warned of, and no others."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from dtcp import (
    Causal,
    Degrees,
    ParallelMesh,
    RingAttention,
    SoftmaxAttention,
    apply_plan,
    shard_batch,
)
from dtcp.batch import prepare_batch, shard_prepared
from dtcp.parallelize import ParallelPlan, parallelize
from tests.harness.spmd import spmd


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mixer = nn.Linear(8, 24), SoftmaxAttention(Causal())

    def forward(self, x, attn_metadata):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        return self.mixer(q, k, v, attn_metadata).flatten(2)


def mesh_of(axis, **degrees):
    return ParallelMesh.from_degrees(Degrees(**degrees or {"cp": axis.size()}), "cpu")


def planned(mesh, model=None):
    return apply_plan(model or Model(), mesh.cp, {"mixer": RingAttention()})


def warned(model, mesh, steps: int, sum_gradients: Callable[[nn.Module], None]) -> list[str]:
    """What was said at each of so many batches, each trained on; "" where nothing was."""
    optimizer, said = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(steps):
        rows = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(step))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            local, sharded = shard_batch({"inputs_embeds": rows}, mesh, model=model)
        said.append(" ".join(str(x.message) for x in caught))
        assert all(x.filename == __file__ for x in caught)
        model(local["inputs_embeds"], sharded.attn_metadata).square().sum().backward()
        sum_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return said


def sum_by_hand(model):
    for weight in model.parameters():
        dist.all_reduce(weight.grad)


def leave(model):
    """Gradients as each rank has them."""


@spmd(ranks=2)
def test_never_silent_gradients_that_nobody_sums(mesh):
    """Said at batches 2 and 4: at batch 1 weights are still alike, at batch 3 nobody looks."""
    mesh = mesh_of(mesh)
    torch.manual_seed(0)
    said = warned(planned(mesh), mesh, 4, leave)
    assert [bool(x) for x in said] == [False, True, False, True]
    assert "got others for 'qkv.weight' and 1 more: start them from one seed" in said[1]
    assert warned(planned(mesh), mesh, 4, sum_by_hand) == [""] * 4


@spmd(ranks=2)
def test_never_silent_ranks_seeded_apart(mesh):
    mesh = mesh_of(mesh)
    torch.manual_seed(dist.get_rank())
    (said,) = warned(planned(mesh), mesh, 1, leave)
    assert "same weights, got others for 'qkv.weight'" in said


@spmd(ranks=2)
def test_never_silent_frozen_and_narrow_weights_of_other_seeds(mesh):
    mesh = mesh_of(mesh)
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(dist.get_rank())
        model = planned(mesh, Model().to(dtype).requires_grad_(False))
        model.later, model.elsewhere = nn.LazyLinear(2), nn.Linear(2, 2, device="meta")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            shard_batch({"inputs_embeds": torch.zeros(1, 4, 8)}, mesh, model=model)
        assert "same weights" in str(caught[0].message)


@spmd(ranks=2)
def test_never_silent_ranks_with_other_weights_in_number(mesh):
    mesh = mesh_of(mesh)
    torch.manual_seed(0)
    model = Model()
    if dist.get_rank():
        model.extra = nn.Linear(2, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shard_batch({"inputs_embeds": torch.zeros(1, 4, 8)}, mesh, model=planned(mesh, model))
    assert "same weights, got others: start" in str(caught[0].message)


@spmd(axes={"dp_shard": 2, "cp": 2})
def test_never_silent_fsdp_that_does_not_sum_over_cp(mesh):
    """Shards are alike on the ranks of cp as whole weights are; those of FSDP over cp are not."""
    mesh = mesh_of(mesh, dp_shard=2, cp=2)
    torch.manual_seed(0)
    model = planned(mesh)
    fully_shard(model, mesh=mesh.batch)
    said = warned(model, mesh, 2, leave)
    assert [bool(x) for x in said] == [False, True]

    plan = ParallelPlan(tp={}, cp={"mixer": RingAttention()}, blocks=("qkv",))
    assert warned(parallelize(Model(), mesh, plan), mesh, 4, leave) == [""] * 4


@spmd(ranks=2)
def test_never_silent_batches_prepared_ahead(mesh):
    mesh = mesh_of(mesh)
    torch.manual_seed(dist.get_rank())
    prepared = prepare_batch({"inputs_embeds": torch.zeros(1, 4, 8)}, mesh, model=planned(mesh))
    said = "same weights, got others for 'qkv.weight'"
    with pytest.warns(UserWarning, match=said) as caught:
        shard_prepared(lambda: prepared, mesh)
    assert caught[0].filename == __file__


@spmd(ranks=2)
def test_shards_of_fsdp1_are_each_ranks_own(mesh):
    mesh = mesh_of(mesh)
    model = FullyShardedDataParallel(planned(mesh), device_id=torch.device("cpu"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shard_batch({"inputs_embeds": torch.zeros(1, 4, 8)}, mesh, model=model)
    assert not [x for x in caught if "same weights" in str(x.message)]

"""Weights that a seed stands for are those of one device, however they are sharded."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dtcp.distributed.random_weights import WholeDraws
from tests.harness.spmd import spmd

FILLS = (
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.trunc_normal_,
    nn.init.xavier_uniform_,
    nn.init.kaiming_uniform_,
    lambda x: x.bernoulli_(0.3),
    lambda x: x.exponential_(),
)


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
@spmd(ranks=3)
def test_draws_are_those_of_one_device(mesh, placement):
    """Rows that ranks do not divide, too; what is drawn after them is the same as well."""
    x = distribute_tensor(torch.zeros(8, 5), mesh, [placement], src_data_rank=None)
    with torch.no_grad(), WholeDraws():
        for fill in FILLS:
            torch.manual_seed(1)
            fill(x)
            after, whole = torch.rand(2), torch.zeros(8, 5)
            torch.manual_seed(1)
            fill(whole)
            torch.testing.assert_close(x.full_tensor(), whole, rtol=0, atol=0)
            torch.testing.assert_close(after, torch.rand(2), rtol=0, atol=0)


@spmd(axes={"dp_shard": 2, "tp": 2})
def test_draws_of_two_axes_are_those_of_one_device(mesh):
    """As FSDP shards the rows that tp has sharded before."""
    layer = nn.Linear(6, 8, bias=False)
    layer.weight = nn.Parameter(
        distribute_tensor(layer.weight.detach(), mesh["tp"], [Shard(0)], src_data_rank=None)
    )
    torch.distributed.fsdp.fully_shard(layer, mesh=mesh["dp_shard"])
    assert isinstance(layer.weight, DTensor) and layer.weight.device_mesh.ndim == 2
    torch.manual_seed(1)
    with torch.no_grad(), WholeDraws():
        layer.reset_parameters()
    torch.manual_seed(1)
    whole = nn.Linear(6, 8, bias=False).weight
    torch.testing.assert_close(layer.weight.full_tensor(), whole, rtol=0, atol=0)

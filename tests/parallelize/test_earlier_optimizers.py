"""An optimizer that is made before a model is parallel steps weights that nobody reads."""

import pytest
import torch

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.models.llama import Llama, tiny
from dtcp.parallelize import llama_plan, parallelize
from dtcp.softmax import RingAttention
from tests.harness.attention_parity import refused
from tests.harness.spmd import spmd


def parallel(model, on):
    return parallelize(model, on, llama_plan(model.config, on, RingAttention()))


@pytest.mark.parametrize("degrees", [Degrees(cp=2), Degrees(tp=2)], ids=str)
@spmd(ranks=2)
def test_an_optimizer_from_before_is_refused(mesh, degrees):
    """Its state or a list of weights alone say nothing."""
    on = ParallelMesh.from_degrees(degrees, "cpu")
    model = Llama(tiny())
    held = list(model.parameters())
    optimizer = torch.optim.AdamW(parallel(model, on).parameters(), lr=0.1)
    assert held[0] is not next(model.parameters())
    model = Llama(tiny())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    refused("1 parameter groups of this .*Llama from before", lambda: parallel(model, on))
    del optimizer


@spmd(ranks=1)
def test_on_one_rank_weights_stay_and_so_does_their_optimizer(mesh):
    model = Llama(tiny())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parallel(model, ParallelMesh.from_degrees(Degrees(), "cpu"))
    assert optimizer.param_groups[0]["params"] == list(model.parameters())

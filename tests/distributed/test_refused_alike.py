"""A model that one rank cannot shard is refused on all of them, and none waits."""

import pytest
from torch import distributed as dist

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.distributed.refused_alike import refused_alike
from dtcp.parallelize import parallelize_hf
from tests.harness.hf_models import build
from tests.harness.spmd import spmd


@spmd(ranks=2)
def test_what_one_rank_refuses_all_refuse(mesh):
    match = "its own reason" if dist.get_rank() == 1 else "A thing is made on all .* on rank 1: see"
    with pytest.raises(ValueError, match=match):
        refuse_on(1, mesh)
    refuse_on(2, mesh)


def refuse_on(rank, mesh):
    with refused_alike("A thing is made", mesh):
        if dist.get_rank() == rank:
            raise ValueError("its own reason")


@spmd(ranks=2)
def test_a_model_that_one_rank_has_on_other_devices_is_refused_on_all(mesh):
    """As from_pretrained leaves it with device_map="auto" on a host with fewer GPUs."""
    model = build("llama")
    if dist.get_rank() == 1:
        model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    match = r"several devices \(0, cpu\)" if dist.get_rank() == 1 else "a refusal on rank 1: see"
    with pytest.raises(ValueError, match=match):
        parallelize_hf(model, ParallelMesh.from_degrees(Degrees(cp=2), "cpu"))

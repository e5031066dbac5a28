"""A batch is cut for the ranks that mixers exchange with, or refused before it is used."""

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtcp.batch import shard_batch
from dtcp.distributed.groups import in_words
from dtcp.distributed.mesh import ParallelMesh
from dtcp.sequence.layout import HeadTail
from dtcp.sequence.masks import Causal
from dtcp.softmax import RingAttention
from dtcp.softmax.mixer import CrossAttention
from tests.harness.attention_parity import mixer_on, refused
from tests.harness.spmd import spmd

BATCH = {"input_ids": torch.zeros(1, 32, dtype=torch.int64)}
OTHER = "cut for the ranks that its mixers exchange with"


def cut_on(axis, model=None, **kwargs):
    return shard_batch(BATCH, ParallelMesh.of_sequence(axis), HeadTail, model=model, **kwargs)[1]


@spmd(axes={"tp": 2, "cp": 2})
def test_a_plan_on_another_axis_of_as_many_ranks_is_refused(mesh):
    """Also the 2-D mesh whose first axis is that of heads: keys would be other ranks'."""
    for claimed_on in (mesh["tp"], mesh):
        mixer = mixer_on(claimed_on, RingAttention(), Causal())
        refused(OTHER, lambda: cut_on(mesh["cp"], mixer))  # noqa: B023
    # Of two mixers that read the same mask, each has ranks of its own.
    both = torch.nn.ModuleList(
        mixer_on(mesh[axis], RingAttention(), Causal()) for axis in ("cp", "tp")
    )
    for axis in ("cp", "tp"):
        refused(OTHER, lambda: cut_on(mesh[axis], both))  # noqa: B023
    assert len(cut_on(mesh["cp"], both[0]).attn_metadata) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@spmd(axes={"tp": 2, "cp": 2})
def test_metadata_of_a_batch_on_another_axis_are_refused(mesh, backend):
    """Handed by hand to a mixer of the same kind: shapes are the same, tokens are not."""
    mixers = {axis: mixer_on(mesh[axis], RingAttention(), Causal()) for axis in ("cp", "tp")}
    metadata = {axis: cut_on(mesh[axis], mixer).attn_metadata for axis, mixer in mixers.items()}
    q = torch.zeros(1, 16, 1, 8)
    for axis, mixer in mixers.items():
        attend = mixer if backend == "eager" else torch.compile(mixer, backend=backend)
        other = metadata["tp" if axis == "cp" else "cp"]
        ranks = in_words(mixer.members[0].ranks)
        refused(f"got none for .*, ranks {ranks}: pass", lambda x=other, f=attend: f(q, q, q, x))
        assert attend(q, q, q, metadata[axis]).shape == q.shape


@spmd(axes={"tp": 2, "cp": 2})
def test_a_memory_on_another_axis_of_as_many_ranks_is_refused(mesh):
    memory = cut_on(mesh["tp"])
    cross = CrossAttention()
    RingAttention()._apply(cross, mesh["cp"])
    refused("memory are cut for the same ranks", lambda: cut_on(mesh["cp"], cross, memory=memory))
    assert len(cut_on(mesh["cp"], cross, memory=cut_on(mesh["cp"])).attn_metadata) == 1


@spmd(ranks=2)
def test_process_groups_made_anew_are_noticed(mesh):
    """As after destroy_process_group: names are given out again, to groups of other ranks."""
    old = DeviceMesh.from_group(dist.new_group([0, 1]), "cpu", mesh_dim_names=("cp",))
    mixer = mixer_on(old, RingAttention(), Causal())
    assert len(cut_on(mesh, mixer).attn_metadata) == 1
    dist.destroy_process_group(old.get_group())
    refused("groups made anew", lambda: cut_on(mesh, mixer))
    # Of one rank each, under whichever name.
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    mixer.groups = [alone.group_name]
    refused("groups made anew", lambda: cut_on(mesh, mixer))


def test_ranks_are_said_in_few_words():
    for ranks in ([], [3], [1, 5], [0, 1, 3]):
        assert in_words(ranks) == ", ".join(map(str, ranks))
    assert in_words(range(512)) == "0 to 511"
    assert in_words(range(3, 512, 8)) == "3 to 507 in steps of 8"

"""Our ops on DTensors: the sequence sharded on the axis they communicate over, and nothing else."""

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing import assert_close

from dtcp.compile import EagerIsland, InGraph, count_graphs
from dtcp.distributed.dtensor_rules import bind, check_placements, to_local, wrap
from dtcp.distributed.groups import group_name
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import RingAttention
from dtcp.softmax.op import AttentionInputs
from tests.harness.attention_parity import CAUSAL, Block, Case, mixer_on, refused, shard_case, truth
from tests.harness.spmd import spmd


def test_arguments_are_bound_by_the_names_of_the_schema():
    x, out, weight = torch.ones(2, 3), torch.ones(2, 2), torch.ones(3, 2)
    bound = bind(torch.ops.aten.addmm.default, (out, x, weight), {"alpha": 2})
    assert list(bound) == ["self", "mat1", "mat2", "alpha"]
    assert bound["mat1"] is x and bound["alpha"] == 2


@spmd(ranks=2)
def test_local_arguments_keep_their_structure(mesh):
    x = torch.ones(2, 3)
    placed = DTensor.from_local(x, mesh, [Shard(0)], run_check=False)
    local = to_local({"q": placed, "saved": [placed, x, None], "groups": ("cp",)})
    assert local["groups"] == ("cp",) and local["saved"][2] is None
    for each in (local["q"], *local["saved"][:2]):
        assert not isinstance(each, DTensor) and each.data_ptr() == x.data_ptr()
    back = wrap(local["q"], placed)
    assert (back.placements, back.shape) == (placed.placements, (4, 3))


def ours(mesh, placements, mixer, sharded, mixed=False):
    """Call a mixer on DTensors of these placements; the metadata are those of its batch."""
    inputs = []
    for index, local in enumerate(truth(Case(CAUSAL), 2).inputs[:3]):
        shape_of = sharded.shard(local)
        placed = [Replicate()] * len(placements) if mixed and index == 2 else placements
        inputs.append(DTensor.from_local(shape_of, mesh, placed, run_check=False))
    return mixer(*inputs, sharded.attn_metadata)


WRONG = [
    ([Shard(2), Shard(1)], "sequence on the axis of the heads"),
    ([Shard(1), Shard(1)], "sequence on both axes"),
    ([Replicate(), Shard(2)], "sequence on no axis"),
    ([Shard(1), Partial()], "sum not taken"),
    ([Shard(1), Shard(3)], "head dim sharded"),
    ([Partial(), Replicate()], "sum not taken on the axis of the sequence"),
]


@pytest.mark.parametrize("boundary", [InGraph(), EagerIsland()])
@pytest.mark.parametrize("placements", [wrong for wrong, _ in WRONG], ids=[why for _, why in WRONG])
@spmd(axes={"cp": 2, "tp": 2})
def test_our_op_refuses_any_other_placement(mesh, placements, boundary):
    """From the mixer, and from the op itself."""
    mixer = mixer_on(mesh, RingAttention(boundary=boundary), CAUSAL.mask)
    sharded = shard_case(Case(CAUSAL), mixer, mesh, HeadTail)
    refused("on which the sequence is sharded", lambda: ours(mesh, placements, mixer, sharded))
    local = [sharded.shard(x) for x in truth(Case(CAUSAL), 2).inputs[:3]]
    inputs = [DTensor.from_local(x, mesh, placements, run_check=False) for x in local]
    metadata, softmax = sharded.attn_metadata[mixer.metadata_key], mixer.softmax(local[0])
    x = AttentionInputs(*inputs)
    op, groups = mixer.style.op, mixer.groups
    refused("on which the sequence", lambda: op(x, metadata, softmax, groups=groups))


@spmd(axes={"cp": 2, "tp": 2})
def test_our_op_refuses_placements_that_differ(mesh):
    mixer = mixer_on(mesh, RingAttention(), CAUSAL.mask)
    sharded = shard_case(Case(CAUSAL), mixer, mesh, HeadTail)
    placements = [Shard(1), Shard(2)]
    refused("sharded alike", lambda: ours(mesh, placements, mixer, sharded, mixed=True))


@spmd(axes={"cp": 2, "tp": 2})
def test_our_op_refuses_a_mesh_that_is_not_over_its_axis(mesh):
    mixer = mixer_on(mesh["cp"], RingAttention(), CAUSAL.mask)
    sharded = shard_case(Case(CAUSAL), mixer, mesh, HeadTail)
    refused("communicates over", lambda: ours(mesh["tp"], [Shard(1)], mixer, sharded))


@spmd(axes={"cp": 2, "tp": 2})
def test_our_op_refuses_plain_tensors_beside_dtensors(mesh):
    mixer = mixer_on(mesh, RingAttention(), CAUSAL.mask)
    sharded = shard_case(Case(CAUSAL), mixer, mesh, HeadTail)
    q, k, v = (sharded.shard(x) for x in truth(Case(CAUSAL), 2).inputs[:3])
    placed = DTensor.from_local(q, mesh, [Shard(1), Shard(2)], run_check=False)
    refused("None for a plain tensor", lambda: mixer(placed, k, v, sharded.attn_metadata))
    placed = DTensor.from_local(v, mesh, [Shard(1), Shard(2)], run_check=False)
    refused("None for a plain tensor", lambda: mixer(q, k, placed, sharded.attn_metadata))


@spmd(axes={"cp": 2, "tp": 2})
def test_compiled_op_takes_dtensors_and_refuses_any_other_placement(mesh):
    mixer = mixer_on(mesh, RingAttention(), CAUSAL.mask)
    sharded = shard_case(Case(CAUSAL), mixer, mesh, HeadTail)
    attend = torch.compile(Block(mixer), backend="aot_eager", fullgraph=True)
    with count_graphs() as graphs:
        out = ours(mesh, [Shard(1), Shard(2)], attend, sharded)
    assert out.placements == (Shard(1), Shard(2)) and graphs.graphs == 1
    eager = ours(mesh, [Shard(1), Shard(2)], mixer, sharded)
    assert_close(out.to_local(), eager.to_local())
    with pytest.raises(Exception, match="on which the sequence is sharded"):
        ours(mesh, [Shard(2), Shard(1)], attend, sharded)


@pytest.mark.parametrize("shape", [(2, 7, 2, 4), (3, 8, 2, 4)])
@spmd(ranks=2)
def test_shards_of_several_sizes_are_refused_on_all_ranks(mesh, shape):
    """One rank alone would find a token too few, and the other wait for it."""
    tensors = [distribute_tensor(torch.zeros(shape), mesh, [Shard(1)]) for _ in range(3)]
    if shape[1] % 2:
        with pytest.raises(ValueError, match=r"got \[7, 7, 7\] in dim 1 on axis 0"):
            check_placements("an op", tensors, group_name(mesh))
    else:
        check_placements("an op", tensors, group_name(mesh))

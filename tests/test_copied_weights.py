"""Copies of weights that stages of a schedule of one's own hold: gradients, values, refusals.

That they train as one device's weight is held in tests/torchtitan/test_stages.py.
"""

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleZBVZeroBubble

from dtcp.copied_weights import COPIES_OP, CopiedWeights
from dtcp.distributed.ledger import count_traffic
from tests.harness.spmd import spmd


class Stage(nn.Module):
    """Some embeddings, by name."""

    def __init__(self, **sizes):
        super().__init__()
        for name, size in sizes.items():
            self.add_module(name, nn.Embedding(size, 2, dtype=torch.float64))


def scheduled(group, stages):
    """A schedule of stages with these numbers, which nobody runs."""
    device = torch.device("cpu")
    count = group.size() * len(stages)
    made = [PipelineStage(x, i, count, device, group=group.get_group()) for i, x in stages.items()]
    several = len(made) > 1
    kind, given = (ScheduleZBVZeroBubble, made) if several else (Schedule1F1B, made[0])
    return kind(given, n_microbatches=2 * count, loss_fn=torch.sum, scale_grads=False)


@spmd(ranks=2)
def test_gradients_of_copies_are_added_where_a_weight_is_trained(mesh):
    """In a V of four stages: the first and the last one are on one rank."""
    rank = mesh.get_local_rank()
    own = {0: Stage(a=3, b=2), 3: Stage(a=3)} if rank == 0 else {1: Stage(x=1), 2: Stage(c=2)}
    schedule = scheduled(mesh, own)
    copied = CopiedWeights(
        schedule, [{3: "a.weight", 0: "a.weight"}, {0: "b.weight", 2: "c.weight"}]
    )
    assert (
        f"{copied}" == "a.weight of stage 0 as a.weight of stage 3, "
        "b.weight of stage 0 as c.weight of stage 2"
    )
    assert copied.copies() == [own[3].a.weight if rank == 0 else own[2].c.weight]
    for weight in nn.ModuleList(own.values()).parameters():
        weight.grad = torch.full_like(weight, 1.0 + rank)
    if rank == 0:
        own[0].b.weight.grad = None  # of tokens that the rows did not have

    with count_traffic() as traffic:
        copied.add_gradients()
        copied.refresh()
    assert traffic[COPIES_OP].sent == traffic[COPIES_OP].received == copied.bytes_per_step == 32
    assert all(copy.grad is None for copy in copied.copies())
    if rank == 0:
        assert own[0].a.weight.grad.unique() == 2 and own[0].b.weight.grad.unique() == 2
        assert torch.equal(own[0].a.weight, own[3].a.weight)


@spmd(ranks=2)
def test_a_weight_that_is_frozen_has_no_gradient_of_its_copies(mesh):
    stage = Stage(a=3)
    copied = CopiedWeights(
        scheduled(mesh, {mesh.get_local_rank(): stage}), [{0: "a.weight", 1: "a.weight"}]
    )
    stage.a.weight.requires_grad_(False)
    copied.add_gradients()
    assert stage.a.weight.grad is None


@spmd(ranks=2)
def test_copies_of_other_weights_are_refused_on_all_ranks(mesh):
    rank = mesh.get_local_rank()
    schedule = scheduled(mesh, {rank: Stage(a=3, b=2 + rank)})
    for named, says in (
        ({0: "a.weight", 1: "c.weight"}, "'c.weight' of stage 1, which lacks it"),
        ({0: "a.weight", 2: "a.weight"}, "'a.weight' of stage 2, which is none of them"),
        (
            {0: "b.weight", 1: "b.weight"},
            r"'b.weight' of stage 1, \[3, 2\] in .*, for one of \[2, 2\]",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            CopiedWeights(schedule, [named])
    with pytest.raises(TypeError, match="Copied weights"):
        CopiedWeights(nn.Linear(1, 1), [])

"""The exclusive scan: right for what does not commute, in log2(n) messages, differentiable."""

import math
from functools import reduce

import pytest
import torch
from torch.testing import assert_close

from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.moves import Moved
from dtcp.distributed.scan import exclusive_scan, exclusive_scan_on_nodes, scanned
from tests.harness.collective_reference import BOUNDARIES, compiled_or_not
from tests.harness.spmd import spmd

boundaries = pytest.mark.parametrize("compiled", BOUNDARIES, ids=["eager", "compiled"])
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def then(first, second):
    """Affine maps x -> M x + b, one after the other; does not commute."""
    (matrix, offset), (next_matrix, next_offset) = first, second
    return next_matrix @ matrix, next_matrix @ offset + next_offset


def summaries(ranks, dtype=torch.float64):
    """One affine map per rank: matrices [B, 3, 3] and offsets [B, 3, 2]."""
    return [
        (torch.randn(2, 3, 3, dtype=dtype), torch.randn(2, 3, 2, dtype=dtype)) for _ in range(ranks)
    ]


def identity_of(matrix, offset):
    return torch.eye(3, dtype=matrix.dtype).expand_as(matrix), torch.zeros_like(offset)


@boundaries
@spmd(ranks=(1, 2, 3, 4))
def test_scan_of_affine_maps_equals_a_loop(mesh, compiled, ranks):
    """Both ways; compiled, on odd ranks forward and on even ones in reverse."""
    for reverse in (ranks % 2 == 0,) if compiled else (False, True):
        check_scan(mesh, reverse, compiled, ranks)


def check_scan(mesh, reverse, compiled, ranks):
    rank = mesh.get_local_rank()
    everyone = summaries(ranks)
    cotangents = summaries(ranks)
    leaves = [tensor.requires_grad_() for state in everyone for tensor in state]

    def reached_before(r):
        return everyone[:r] if not reverse else everyone[:r:-1]

    expected = [reduce(then, reached_before(r), identity_of(*everyone[r])) for r in range(ranks)]
    pairs = [
        (out * c).sum()
        for outs, cs in zip(expected, cotangents, strict=True)
        for out, c in zip(outs, cs, strict=True)
    ]
    expected_grads = (
        torch.autograd.grad(sum(pairs), leaves, materialize_grads=True)
        if ranks > 1
        else [torch.zeros_like(leaf) for leaf in leaves]
    )

    mine = [tensor.detach().clone().requires_grad_() for tensor in everyone[rank]]

    def scan(matrix, offset):
        state = (matrix, offset)
        return exclusive_scan(state, then, identity_of(*state), mesh, reverse=reverse)

    with count_traffic() as forward:
        outs = compiled_or_not(scan, compiled)(*mine)
    assert_close(outs, expected[rank])
    rounds = math.ceil(math.log2(ranks))
    assert forward.calls == rounds
    assert forward.received == forward.sent == rounds * 2 * (9 + 6) * 8

    if ranks > 1:
        with count_traffic() as backward:
            loss = sum((o * c).sum() for o, c in zip(outs, cotangents[rank], strict=True))
            grads = torch.autograd.grad(loss, mine)
        assert_close(grads, tuple(expected_grads[2 * rank : 2 * rank + 2]))
        assert backward.received == forward.received


@directions
@spmd(ranks=(1, 3, 4))
def test_scan_of_sums_counts_the_ranks_reached_before(mesh, reverse, ranks):
    one = (torch.ones(()),)
    (total,) = exclusive_scan(
        one, lambda a, b: (a[0] + b[0],), (torch.zeros(()),), mesh, reverse=reverse
    )
    rank = mesh.get_local_rank()
    assert total == (ranks - 1 - rank if reverse else rank)


@spmd(ranks=2)
def test_what_wraps_around_cannot_spoil_the_first_rank(mesh):
    """Rank 0 receives an infinity that lies in its future: neither value nor gradient shows it."""
    x = torch.full((2,), math.inf if mesh.get_local_rank() == 1 else 1.0, requires_grad=True)
    (out,) = exclusive_scan((x,), lambda a, b: (a[0] * b[0],), (torch.ones(2),), mesh)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert_close(out, torch.ones(2))
    assert_close(grad, torch.full((2,), 1.0 if mesh.get_local_rank() == 0 else 0.0))


@spmd(ranks=2)
def test_states_of_two_dtypes_or_shapes_are_refused(mesh):
    state = (torch.ones(2), torch.ones(2, dtype=torch.float64))
    with pytest.raises(TypeError, match="one dtype, got x of"):
        exclusive_scan(state, then, state, mesh)
    with pytest.raises(ValueError, match=r"x of \[\(2,\)\] and identity of \[\(3,\)\]"):
        exclusive_scan((torch.ones(2),), then, (torch.ones(3),), mesh)


def check_on_nodes(mesh, ranks_per_node):
    """Two states of a pair each; bytes of both tiers are those of `scanned`."""
    rank, n = mesh.get_local_rank(), mesh.size()
    everyone = summaries(n)
    for reverse in (False, True):
        before = everyone[:rank] if not reverse else everyone[:rank:-1]
        identity = identity_of(*everyone[rank])
        with count_traffic() as traffic:
            of = (everyone[rank], then, identity, mesh)
            out = exclusive_scan_on_nodes(*of, reverse=reverse, ranks_per_node=ranks_per_node)
        assert_close(out, reduce(then, before, identity))
        counts = scanned(n, rank, reverse=reverse, ranks_per_node=ranks_per_node)
        size = 2 * (9 + 6) * 8
        moved = Moved.rows(*counts, size, rank)
        assert (traffic.sent, traffic.received) == (sum(moved.sent), sum(moved.received))
        if ranks_per_node:
            between = traffic.crossing(rank, ranks_per_node)
            assert between == moved.crossing(rank, ranks_per_node)


@spmd(ranks=4)
def test_two_tier_scan_equals_a_loop_and_crosses_from_one_rank_of_a_node_to_one(mesh):
    for ranks_per_node in (0, 2):
        check_on_nodes(mesh, ranks_per_node)
    with pytest.raises(ValueError, match="equally many ranks"):
        exclusive_scan_on_nodes(*[(torch.ones(1),)] * 3, mesh, ranks_per_node=3)


@pytest.mark.slow
@spmd(ranks=(6, 8))
def test_two_tier_scan_on_six_and_eight_ranks(mesh, ranks):
    for ranks_per_node in range(2, ranks):
        if ranks % ranks_per_node == 0:
            check_on_nodes(mesh, ranks_per_node)


@pytest.mark.parametrize(("ranks", "ranks_per_node"), [(8, 2), (12, 3), (64, 8), (512, 8)])
def test_two_tier_scan_takes_in_a_state_for_each_doubling_of_nodes(ranks, ranks_per_node):
    """At most; of one tier, as many for each rank of a node from the rounds as long as it on."""
    nodes = ranks // ranks_per_node
    for reverse, node in ((False, nodes - 1), (True, 0)):
        members = range(node * ranks_per_node, (node + 1) * ranks_per_node)
        taken = {}
        for known in (0, ranks_per_node):
            counts = [
                scanned(ranks, rank, reverse=reverse, ranks_per_node=known) for rank in members
            ]
            moved = [Moved.rows(*x, 1, rank) for x, rank in zip(counts, members, strict=True)]
            pairs = zip(moved, members, strict=True)
            taken[known] = sum(x.crossing(rank, ranks_per_node)[1] for x, rank in pairs)
        assert taken[ranks_per_node] == (nodes - 1).bit_length()
        assert taken[0] >= 2 * taken[ranks_per_node]

"""Gathering over nodes: what a rank holds crosses once to each node, and sums come home once."""

import pytest
import torch

from dtcp.distributed.collectives import all_gather
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.node_collectives import all_gather_on_nodes
from dtcp.distributed.relayout import RelayoutMetadata, relayout_moved
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from tests.harness.attention_parity import refused
from tests.harness.spmd import spmd


def gathered(gather, x, cotangent):
    x = x.clone().requires_grad_()
    out = gather(x)
    return out.detach(), *torch.autograd.grad(out, x, cotangent)


def check(mesh, ranks_per_node):
    n, rank = mesh.size(), mesh.get_local_rank()
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    for dim in (0, 1, -1):
        wide = [*x.shape]
        wide[dim] *= n
        cotangent = torch.randn(wide, dtype=torch.float64)
        with count_traffic() as traffic:
            actual = gathered(
                lambda y, dim=dim: all_gather_on_nodes(
                    y, mesh, dim=dim, ranks_per_node=ranks_per_node
                ),
                x,
                cotangent,
            )
        expected = gathered(lambda y, dim=dim: all_gather(y, mesh, dim=dim), x, cotangent)
        torch.testing.assert_close(actual, expected)
        size = x.numel() * 8
        between = (n // ranks_per_node - 1) * size
        assert (traffic.sent, traffic.received) == (2 * (n - 1) * size,) * 2
        assert traffic.crossing(rank, ranks_per_node) == (2 * between, 2 * between)


@spmd(ranks=4)
def test_two_tier_gather_crosses_once_to_each_node_and_sums_come_home_once(mesh):
    check(mesh, 2)
    x = torch.zeros(2, 2)
    refused("equally many ranks", lambda: all_gather_on_nodes(x, mesh, dim=0, ranks_per_node=3))


@pytest.mark.slow
@pytest.mark.parametrize("ranks_per_node", [2, 4])
@spmd(ranks=8)
def test_two_tier_gather_on_eight_ranks(mesh, ranks_per_node):
    check(mesh, ranks_per_node)


@pytest.mark.parametrize("ranks_per_node", [2, 4])
@pytest.mark.parametrize("layouts", [(DocumentBalanced, Contiguous), (HeadTail, PerDocument)])
def test_two_tier_bytes_of_a_relayout_are_those_of_one(layouts, ranks_per_node):
    """A token goes to one rank, and so crosses once at most: to the node that holds it then."""
    documents, ranks, m = Documents(((2, 17, 1, 90, 3, 41, 70),), 240), 8, ranks_per_node
    source, target = (kind.for_batch(documents, ranks) for kind in layouts)
    metadata = [RelayoutMetadata.between(source, target, rank) for rank in range(ranks)]
    held, wanted = (
        [
            {x for r in range(first, first + m) for x in layout.token_indices(r).tolist()}
            for first in range(0, ranks, m)
        ]
        for layout in (source, target)
    )
    for node, (mine, others) in enumerate(zip(held, wanted, strict=True)):
        members = range(node * m, node * m + m)
        moved = [relayout_moved(metadata[rank].counts, 3, rank) for rank in members]
        crossing = [x.crossing(rank, m) for x, rank in zip(moved, members, strict=True)]
        sent, received = (sum(x) for x in zip(*crossing, strict=True))
        assert (sent, received) == (3 * len(mine - others), 3 * len(others - mine))

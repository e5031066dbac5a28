"""Routes in two hops, number by number: what nodes read crosses to each once, and all arrives."""

import random

import numpy as np
import pytest

from dtcp.sequence.node_routes import NOBODY, Reads, hands_on, node_routes
from dtcp.sequence.partition import Partition

NOTHING = -1


def exchange(tables, held, out):
    """Move numbers along send and receive hops of all ranks; returns who sent what to whom."""
    crossed = []
    found = [row.copy() for row in held]
    for to, (_, receive) in enumerate(tables):
        for peer in range(len(tables)):
            sent = [hop for hop in tables[peer][0] if hop[0] == to and hop[1] < hop[2]]
            taken = [hop for hop in receive if hop[0] == peer and hop[1] < hop[2]]
            assert [b - a for _, a, b in sent] == [b - a for _, a, b in taken]
            for (_, first, stop), (_, start, _) in zip(sent, taken, strict=True):
                numbers = found[peer][first:stop]
                assert all(x == NOTHING for x in out[to][start : start + stop - first])
                out[to][start : start + stop - first] = numbers
                crossed += [(peer, to, x) for x in numbers]
    return crossed


def random_case(draw):
    """A line of pieces, and stretches of it that ranks read, some twice and some not at all."""
    ranks = draw.choice((1, 2, 4, 6, 8))
    cuts = sorted(draw.sample(range(1, 60), draw.randint(0, 15)))
    start = np.array([0, *cuts])
    owner = np.array([draw.randrange(ranks) for _ in start])
    held = Partition.ascending(start, owner, 60)
    wanted = [[] for _ in range(ranks)]
    for row in wanted:
        for _ in range(draw.randint(0, 4)):
            low = draw.randrange(60)
            row.append((low, draw.randint(low, 60)))
    reads = [(r, a, b) for r, row in enumerate(wanted) for a, b in row]
    place = [
        sum(y - x for x, y in wanted[r][:i]) for r in range(ranks) for i in range(len(wanted[r]))
    ]
    columns = np.array(reads, dtype=np.int64).reshape(-1, 3).T
    return held, wanted, Reads(*columns, np.array(place, dtype=np.int64)), ranks


def check_case(draw):
    held, wanted, reads, ranks = random_case(draw)
    m = draw.choice([x for x in range(ranks + 1) if x == 0 or ranks % x == 0])
    routes = [
        node_routes(reads, held, rank, num_ranks=ranks, ranks_per_node=m) for rank in range(ranks)
    ]
    assert len({tuple(table.shape for table in x) for x in routes}) == 1
    owned = [[x for a, b in held.runs(rank) for x in range(a, b)] for rank in range(ranks)]
    found = [[NOTHING] * sum(b - a for a, b in row) for row in wanted]
    crossed = exchange([x.routes.tolist() for x in routes], owned, found)
    spreads = {hands_on(x.onward) for x in routes}
    assert len(spreads) == 1
    if spreads == {True}:
        inside = exchange([x.onward.tolist() for x in routes], found, found)
        assert inside and all(peer // m == to // m for peer, to, _ in inside)
    assert found == [[x for a, b in row for x in range(a, b)] for row in wanted]
    if m in (0, 1, ranks):
        assert not routes[0].onward.numel()
        return
    owner = {x: rank for rank, row in enumerate(owned) for x in row}
    between = [(to // m, x) for peer, to, x in crossed if peer // m != to // m]
    needed = {
        (rank // m, x) for rank, row in enumerate(found) for x in row if owner[x] // m != rank // m
    }
    assert sorted(between) == sorted(needed), "each number once to each node that reads it"


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_two_tier_routes_bring_all_that_is_read_and_cross_once_to_each_node(count):
    for seed in range(count):
        check_case(random.Random(seed))


def test_two_tier_share_is_even_and_what_one_rank_reads_takes_one_hop():
    held = Partition.ascending(np.array([0, 8]), np.array([0, 1]), 16)
    alike = Reads(*np.array([[2, 3], [0, 0], [16, 16], [0, 0]]))
    routes = [node_routes(alike, held, r, num_ranks=4, ranks_per_node=2) for r in range(4)]
    taken = [sorted(hop for hop in x.routes[1].tolist() if hop[1] < hop[2]) for x in routes]
    assert taken == [[], [], [[0, 0, 8]], [[1, 8, 16]]]
    alone = Reads(*np.array([[2], [0], [16], [0]]))
    routes = [node_routes(alone, held, r, num_ranks=4, ranks_per_node=2) for r in range(4)]
    assert not any(hands_on(x.onward) for x in routes)
    assert (routes[0].onward[..., 0] == NOBODY).all()

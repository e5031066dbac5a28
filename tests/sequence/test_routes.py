"""Routes: both ends agree, nothing travels that need not."""

import torch

from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from dtcp.sequence.routes import Route, halo_token_indices, rolled

DOCUMENTS = Documents(((5, 10, 3),), 24)
KINDS = [Contiguous, HeadTail, PerDocument, BlockBalanced]


def routes(source, target):
    ranks = range(source.num_shards)
    held, wanted = ([layout.runs(rank) for rank in ranks] for layout in (source, target))
    return [Route.between(held, wanted, rank) for rank in ranks]


def test_what_one_rank_sends_another_is_what_that_one_receives():
    """The same number of tokens, run by run, for every pair of layouts and of ranks."""
    for source in (kind.for_batch(DOCUMENTS, 3) for kind in KINDS):
        for target in (kind.for_batch(DOCUMENTS, 3) for kind in KINDS):
            all_routes = routes(source, target)
            for sender in range(3):
                for receiver in range(3):
                    sent = [b - a for to, a, b in all_routes[sender].send if to == receiver]
                    got = [b - a for frm, a, b in all_routes[receiver].receive if frm == sender]
                    assert sent == got


def test_route_to_the_same_layout_sends_nothing_away():
    for rank, route in enumerate(routes(HeadTail(24, 3), HeadTail(24, 3))):
        assert {to for to, _, _ in route.send} == {rank}


def test_tokens_that_nobody_holds_are_not_routed():
    route = Route.between([[(0, 4)]], [[(-2, 0), (4, 6)]], 0)
    assert route == Route((), (), 4)


def test_halo_token_indices_are_those_next_to_the_segments():
    assert halo_token_indices(Contiguous(8, 2), 1, left=2, right=1).tolist() == [2, 3, -1]
    assert halo_token_indices(HeadTail(8, 2), 0, left=2, right=1).tolist() == [-1, -1, 2, 4, 5, -1]
    assert halo_token_indices(Contiguous(4, 4), 1, left=3, right=0).tolist() == [-1, -1, 0]


def test_rolled_runs_are_the_rolled_positions():
    for shift in (-1, 1, 5, -23, 24, 100):
        token_index = torch.arange(24).roll(shift)
        for rank in range(3):
            runs = rolled(HeadTail(24, 3).runs(rank), shift, 24)
            expected = token_index[HeadTail(24, 3).token_indices(rank)].tolist()
            assert [p for a, b in runs for p in range(a, b)] == expected

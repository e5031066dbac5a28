"""How an op's body counts what crosses: by rank, so that a reader can tell nodes apart."""

from collections.abc import Sequence

from torch import distributed as dist

from dtcp.distributed.groups import group_of
from dtcp.distributed.ledger import LEDGER


def count_crossed(
    op: str,
    group: str,
    sent: Sequence[int],
    received: Sequence[int],
    *,
    size: int = 1,
    calls: int = 1,
) -> None:
    """Count a transfer between the ranks of a group.

    Args:
        op: dtcp::<name>, whose body this is.
        group: name of the process group.
        sent, received: to and from each of its ranks, in units of `size` bytes; what a rank keeps
            is not counted.
        calls: executions of the op; 0 where another line counts them.
    """
    members = group_of(group)
    here, ranks = dist.get_rank(members), dist.get_process_group_ranks(members)
    peers = {
        peer: (out * size, back * size)
        for place, (peer, out, back) in enumerate(zip(ranks, sent, received, strict=True))
        if place != here and (out or back)
    }
    LEDGER.record(
        op,
        calls=calls,
        sent=sum(out for out, _ in peers.values()),
        received=sum(back for _, back in peers.values()),
        peers=peers,
    )

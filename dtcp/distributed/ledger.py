"""What the ops did: how often each ran, and the bytes it sent and received.

Compiled code runs no Python of ours but the bodies of our ops, so the ops count themselves.
A dispatch mode would make dynamo run eager and hide a dead collective, so none is used.
The ledger is the one piece of process-wide state in dtcp: backward passes run on threads of
their own, where a context variable does not reach.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from types import MappingProxyType

PeerBytes = Mapping[int, tuple[int, int]]
"""Bytes sent to and received from other ranks, by global rank."""


@dataclass(frozen=True)
class OpCount:
    """Executions of one op on this rank, and its bytes from and to other ranks.

    Args:
        peers: the same bytes by rank, of ops that say it.
    """

    calls: int = 0
    sent: int = 0
    received: int = 0
    peers: PeerBytes = field(default_factory=dict, compare=False, repr=False)

    def __add__(self, other: "OpCount") -> "OpCount":
        return self._with(other, 1)

    def __sub__(self, other: "OpCount") -> "OpCount":
        return self._with(other, -1)

    def crossing(self, rank: int, ranks_per_node: int) -> tuple[int, int]:
        """Bytes sent to and received from other nodes.

        Args:
            rank: this one's, among all.
            ranks_per_node: of each machine, the first ones on the first.
        """
        node = rank // ranks_per_node
        far = [both for peer, both in self.peers.items() if peer // ranks_per_node != node]
        return sum(sent for sent, _ in far), sum(received for _, received in far)

    def _with(self, other: "OpCount", sign: int) -> "OpCount":
        peers = dict(self.peers)
        for peer, (sent, received) in other.peers.items():
            before = peers.get(peer, (0, 0))
            peers[peer] = (before[0] + sign * sent, before[1] + sign * received)
        return OpCount(
            self.calls + sign * other.calls,
            self.sent + sign * other.sent,
            self.received + sign * other.received,
            peers,
        )


NO_PEERS: PeerBytes = MappingProxyType({})


class Ledger:
    """Counts by op name, from the start of the process."""

    def __init__(self) -> None:
        self._counts: dict[str, OpCount] = {}
        self._lock = Lock()

    def record(
        self,
        op: str,
        *,
        calls: int = 1,
        sent: int = 0,
        received: int = 0,
        peers: PeerBytes = NO_PEERS,
    ) -> None:
        """Add executions of an op and the bytes that crossed to and from other ranks.

        Args:
            peers: of these bytes, by global rank.
        """
        with self._lock:
            count = OpCount(calls, sent, received, peers)
            self._counts[op] = self._counts.get(op, OpCount()) + count

    def snapshot(self) -> dict[str, OpCount]:
        """All counts so far; subtract two snapshots to know what happened between them."""
        with self._lock:
            return dict(self._counts)


LEDGER = Ledger()


@dataclass
class Traffic:
    """Counts of one stretch of work, by op; reading it as a whole sums over the ops."""

    by_op: dict[str, OpCount] = field(default_factory=dict)

    def __getitem__(self, op: str) -> OpCount:
        return self.by_op.get(op, OpCount())

    def _total(self) -> OpCount:
        return sum(self.by_op.values(), OpCount())

    @property
    def calls(self) -> int:
        return self._total().calls

    @property
    def sent(self) -> int:
        return self._total().sent

    @property
    def received(self) -> int:
        return self._total().received

    def crossing(self, rank: int, ranks_per_node: int) -> tuple[int, int]:
        """Bytes sent to and received from other nodes, as of `OpCount.crossing`."""
        return self._total().crossing(rank, ranks_per_node)


def traffic_since(start: dict[str, OpCount]) -> Traffic:
    """What was counted after the snapshot `start` was taken."""
    now = LEDGER.snapshot()
    moved = {op: count - start.get(op, OpCount()) for op, count in now.items()}
    return Traffic({op: count for op, count in moved.items() if count != OpCount()})


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the ops that run inside the block, on every thread of this process.

    Example::
        with count_traffic() as traffic:
            loss.backward()
        traffic.received, traffic["dtcp::ring_attention_backward"].calls
    """
    traffic, start = Traffic(), LEDGER.snapshot()
    try:
        yield traffic
    finally:
        traffic.by_op = traffic_since(start).by_op

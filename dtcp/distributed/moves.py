"""What an op moves between ranks, known from its sizes before it runs.

Every op that communicates says it (`communicating_op(moves=...)`), and so does every style, from
the same functions: formulas, plans of a cluster, and what a training run is held to come from
here. The ledger counts what crossed, where it crosses, and owes nothing to these formulas.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import zip_longest


@dataclass(frozen=True)
class Received:
    """Bytes that one rank receives from others, in a forward and in a backward pass.

    Args:
        forward_between, backward_between: those of them that come from other nodes; 0 where
            nobody has said what the nodes are.
    """

    forward: int
    backward: int
    forward_between: int = 0
    backward_between: int = 0

    def __add__(self, other: "Received") -> "Received":
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Received(*(one + another for one, another in pairs))


@dataclass(frozen=True)
class Moved:
    """What one pass moves between this rank and each rank of the axis; 0 to itself.

    Args:
        sent, received: [n] bytes, by rank of the axis.
        workspace: bytes that the pass holds at most, beside its inputs and its results and
            whatever a kernel takes.
    """

    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()
    workspace: int = 0

    def __add__(self, other: "Moved") -> "Moved":
        """One after the other: bytes add up, and of the workspaces the larger counts."""
        return Moved(
            _added(self.sent, other.sent),
            _added(self.received, other.received),
            max(self.workspace, other.workspace),
        )

    def crossing(self, rank: int, ranks_per_node: int) -> tuple[int, int]:
        """Bytes sent to and received from other nodes, where so many neighbours share a node."""
        node = rank // ranks_per_node
        sent, received = (
            sum(size for peer, size in enumerate(sizes) if peer // ranks_per_node != node)
            for sizes in (self.sent, self.received)
        )
        return sent, received

    @classmethod
    def alike(cls, size: int, num_ranks: int, rank: int, *, workspace: int = 0) -> "Moved":
        """As much to and from every other rank."""
        each = tuple(size * (peer != rank) for peer in range(num_ranks))
        return cls(each, each, workspace)

    @classmethod
    def rows(
        cls,
        sent: Iterable[int],
        received: Iterable[int],
        size: int,
        rank: int,
        *,
        workspace: int = 0,
    ) -> "Moved":
        """So many rows of `size` bytes to and from each rank; those to itself do not move."""
        out, back = (
            tuple(int(rows) * size * (peer != rank) for peer, rows in enumerate(counts))
            for counts in (sent, received)
        )
        return cls(out, back, workspace)


@dataclass(frozen=True)
class Moves:
    """What a mixer moves for one rank, in either direction."""

    forward: Moved
    backward: Moved

    def __add__(self, other: "Moves") -> "Moves":
        return Moves(self.forward + other.forward, self.backward + other.backward)

    @property
    def received(self) -> Received:
        """The bytes received, from all ranks together."""
        return Received(sum(self.forward.received), sum(self.backward.received))

    def received_on_nodes(self, rank: int, ranks_per_node: int) -> Received:
        """The bytes that `rank` receives, and those from other nodes; 0: nodes are not known."""
        if not ranks_per_node:
            return self.received
        passes = (self.forward, self.backward)
        between = (moved.crossing(rank, ranks_per_node)[1] for moved in passes)
        return Received(*(sum(moved.received) for moved in passes), *between)


NOTHING = Moves(Moved(), Moved())

OpMoves = Callable[..., Moved]
"""What an op moves, from its arguments: sizes of tensors, and numbers that the host reads."""


def _added(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(one, other, fillvalue=0))

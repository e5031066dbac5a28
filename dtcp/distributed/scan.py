"""What came before, folded up along the ranks: an exclusive scan in log2(n) rounds.

A recurrence over a sharded sequence needs, on each rank, the composition of all earlier ranks'
summaries. Handing a state from rank to rank takes n - 1 steps, one after another; an associative
composition can be taken in windows of ranks that double each round:

    round 1   rank r knows  r-1             and sends on  r
    round 2   rank r knows  r-3 .. r-1      and sends on  r-1 .. r
    round 3   rank r knows  r-7 .. r-1      and sends on  r-3 .. r

All ranks send and receive in every round, so all trace the same ops. Where nodes are known, the
rounds between them are among one rank of each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.collectives import all_to_all, ring_shift
from dtcp.distributed.nodes import check_ranks_per_node
from dtcp.sequence.arguments import check_ints

State = tuple[Tensor, ...]


def exclusive_scan(
    x: State,
    combine: Callable[[State, State], State],
    identity: State,
    mesh: DeviceMesh,
    *,
    reverse: bool = False,
) -> State:
    """Compose x of all ranks to the left of this one, or with reverse, to the right.

    Args:
        x: this rank's summary; same shapes on every rank, and one dtype.
        combine: associative, not necessarily commutative: (reached first, reached later) ->
            both. The scan reaches rank 0 first; in reverse, the last rank.
        identity: of combine, shaped as x: what the rank that is reached first gets.
    Returns:
        On rank r, x_0 then x_1 .. then x_(r-1); in reverse, x_(n-1) .. then x_(r+1).

    Backward is that of its parts. Traffic per rank: ceil(log2(n)) times x, and as much back.
    From Hillis and Steele 1986, "Data parallel algorithms", https://doi.org/10.1145/7902.7903;
    theirs includes x_r, which here travels only in what is sent on.
    """
    _check_state(x, identity)
    n, rank = mesh.size(), mesh.get_local_rank()
    reached = n - 1 - rank if reverse else rank

    def before(state: State, reach: int) -> State:
        flat = ring_shift(_flat(state), mesh, by=-reach if reverse else reach)
        # What wrapped around comes from ranks that are reached later. A tensor, not a branch:
        # every rank composes, some with the identity.
        in_order = x[0].new_full((), reached >= reach, dtype=torch.bool)
        arrived = zip(_parts(flat, state), identity, strict=True)
        return tuple(torch.where(in_order, a, i) for a, i in arrived)

    return _in_windows(x, combine, identity, n, before)


def exclusive_scan_on_nodes(
    x: State,
    combine: Callable[[State, State], State],
    identity: State,
    mesh: DeviceMesh,
    *,
    reverse: bool = False,
    ranks_per_node: int,
) -> State:
    """`exclusive_scan` where so many neighbours share a node, for code that is not traced.

    A node's ranks scan among themselves; the one that is reached last then has the composition of
    all, scans among its like of other nodes, and hands what came before the node to the others.

    Args and result as of `exclusive_scan`.
        ranks_per_node: 0: nobody has said, and windows are those of ranks.

    Traffic per node, received from others: ceil(log2(nodes)) times x at most, one rank takes it in.
    Inside: ceil(log2(ranks_per_node)) times x per rank at most, and once more.
    """
    check_ints("A scan", least=0, ranks_per_node=ranks_per_node)
    check_ranks_per_node("A scan", mesh.size(), ranks_per_node)
    if ranks_per_node in (0, 1, mesh.size()):
        return exclusive_scan(x, combine, identity, mesh, reverse=reverse)
    _check_state(x, identity)
    place = _Place.of(mesh.size(), mesh.get_local_rank(), ranks_per_node, reverse=reverse)

    def hop(state: State, to: Sequence[int], source: int | None) -> State:
        send, receive = [0] * place.num_ranks, [0] * place.num_ranks
        for rank in to:
            send[rank] = 1
        if source is not None:
            receive[source] = 1
        rows = _flat(state).expand(len(to), -1)
        arrived = all_to_all(rows, mesh, receive=receive, send=send)
        return identity if source is None else _parts(arrived[0], state)

    inside = _in_windows(
        x, combine, identity, place.per_node, lambda s, by: hop(s, *place.inside(by))
    )
    whole = combine(inside, x)
    earlier = _in_windows(
        whole, combine, identity, place.nodes, lambda s, by: hop(s, *place.between(by))
    )
    to, source = place.spread()
    handed = hop(earlier, to, source)
    return combine(earlier if source is None else handed, inside)


def scanned(
    num_ranks: int, rank: int, *, reverse: bool = False, ranks_per_node: int = 0
) -> tuple[list[int], list[int]]:
    """How often a scan sends its state to each rank, and receives that of each."""
    sent, received = [0] * num_ranks, [0] * num_ranks
    if ranks_per_node in (0, 1, num_ranks):
        for reach in _reaches(num_ranks):
            way = -reach if reverse else reach
            sent[(rank + way) % num_ranks] += 1
            received[(rank - way) % num_ranks] += 1
        return sent, received
    place = _Place.of(num_ranks, rank, ranks_per_node, reverse=reverse)
    hops = [place.inside(reach) for reach in _reaches(place.per_node)]
    hops += [place.between(reach) for reach in _reaches(place.nodes)]
    for to, source in (*hops, place.spread()):
        for peer in to:
            sent[peer] += 1
        if source is not None:
            received[source] += 1
    return sent, received


Hop = tuple[list[int], int | None]
"""The ranks that a rank sends its state to, and the one whose state it receives, if any."""


@dataclass(frozen=True)
class _Place:
    """Where a rank stands in a scan over nodes, in the order in which ranks are reached."""

    num_ranks: int
    per_node: int
    node: int
    place: int
    reverse: bool

    @classmethod
    def of(cls, num_ranks: int, rank: int, per_node: int, *, reverse: bool) -> "_Place":
        reached = num_ranks - 1 - rank if reverse else rank
        return cls(num_ranks, per_node, *divmod(reached, per_node), reverse)

    @property
    def nodes(self) -> int:
        return self.num_ranks // self.per_node

    @property
    def is_last(self) -> bool:
        return self.place == self.per_node - 1

    def inside(self, by: int) -> Hop:
        """To the rank so many places on in this node, and from as far back."""
        to = [self._rank(self.node, self.place + by)] if self.place + by < self.per_node else []
        return to, self._rank(self.node, self.place - by) if self.place >= by else None

    def between(self, by: int) -> Hop:
        """From the last rank of a node to that of the node so many places on."""
        if not self.is_last:
            return [], None
        to = [self._rank(self.node + by, self.place)] if self.node + by < self.nodes else []
        return to, self._rank(self.node - by, self.place) if self.node >= by else None

    def spread(self) -> Hop:
        """From the last rank of a node to the others; nothing comes before the first node."""
        if self.node == 0:
            return [], None
        if self.is_last:
            return [self._rank(self.node, place) for place in range(self.place)], None
        return [], self._rank(self.node, self.per_node - 1)

    def _rank(self, node: int, place: int) -> int:
        reached = node * self.per_node + place
        return self.num_ranks - 1 - reached if self.reverse else reached


def _reaches(count: int) -> list[int]:
    """1, 2, 4 .. below a count."""
    return [1 << power for power in range((count - 1).bit_length())]


def _in_windows(
    x: State,
    combine: Callable[[State, State], State],
    identity: State,
    count: int,
    before: Callable[[State, int], State],
) -> State:
    """The scan of `count` members; `before` brings a state from so many of them back."""
    inclusive, exclusive = x, identity
    for reach in _reaches(count):
        arrived = before(inclusive, reach)
        exclusive = arrived if reach == 1 else combine(arrived, exclusive)
        if 2 * reach < count:
            inclusive = combine(arrived, inclusive)
    return exclusive


def _flat(state: State) -> Tensor:
    """All tensors of a state as one message."""
    return torch.cat([t.flatten() for t in state])


def _parts(flat: Tensor, like: State) -> State:
    parts = flat.split([t.numel() for t in like])
    return tuple(part.view(t.shape) for part, t in zip(parts, like, strict=True))


def _check_state(x: State, identity: State) -> None:
    if len({t.dtype for t in x + identity}) != 1:
        raise TypeError(
            f"A state travels as one message of one dtype, got x of {[t.dtype for t in x]} and "
            f"identity of {[t.dtype for t in identity]}: convert them to the widest."
        )
    if [t.shape for t in x] != [t.shape for t in identity]:
        raise ValueError(
            f"The identity stands for a rank's summary, got x of {[tuple(t.shape) for t in x]} "
            f"and identity of {[tuple(t.shape) for t in identity]}: give both the same shapes."
        )

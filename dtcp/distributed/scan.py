"""What came before, folded up along the ranks: an exclusive scan in log2(n) rounds.

A recurrence over a sharded sequence needs, on each rank, the composition of all earlier ranks'
summaries. Handing a state from rank to rank takes n - 1 steps, one after another; an associative
composition can be taken in windows of ranks that double each round:

    round 1   rank r knows  r-1             and sends on  r
    round 2   rank r knows  r-3 .. r-1      and sends on  r-1 .. r
    round 3   rank r knows  r-7 .. r-1      and sends on  r-3 .. r

All ranks send and receive in every round, so all trace the same ops.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.collectives import ring_shift

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
    inclusive, exclusive = x, identity
    reach = 1
    while reach < n:
        arrived = _shift(inclusive, mesh, by=-reach if reverse else reach)
        # What wrapped around comes from ranks that are reached later. A tensor, not a branch:
        # every rank composes, some with the identity.
        in_order = x[0].new_full((), reached >= reach, dtype=torch.bool)
        before = tuple(torch.where(in_order, a, i) for a, i in zip(arrived, identity, strict=True))
        exclusive = before if reach == 1 else combine(before, exclusive)
        reach *= 2
        if reach < n:
            inclusive = combine(before, inclusive)
    return exclusive


def _shift(state: State, mesh: DeviceMesh, *, by: int) -> State:
    """Shift all tensors of a state in one message."""
    flat = ring_shift(torch.cat([t.flatten() for t in state]), mesh, by=by)
    parts = flat.split([t.numel() for t in state])
    return tuple(part.view(t.shape) for part, t in zip(parts, state, strict=True))


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

"""The state that enters each segment of a sharded sequence, from the segments' summaries.

A segment maps the state that enters it to the one that leaves: S -> M S + b, a tensor
[M | b] of [K, K + V], or [d | b] of [K, 1 + V] where M only scales rows (`StateMaps`). Maps
compose to maps of the same size, so what came before can be brought by gathering every summary, or
by a scan of compositions in log2(n) rounds.

    HeadTail, n = 3, segments by position:      h0 h1 h2 t2 t1 t0

Seen from rank r, what lies between its head and its tail is symmetric: the heads of all ranks to
its right, then their tails in reverse. So one scan from the right, of pairs, composes both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.collectives import all_to_all
from dtcp.distributed.node_collectives import all_gather_on_nodes
from dtcp.distributed.scan import State, exclusive_scan_on_nodes
from dtcp.sequence.host import on_device


@dataclass(frozen=True)
class StateMaps:
    """How the maps of a rule are written and composed.

    Args:
        scales: whether they scale the rows of a state and add to it, [d | b], instead of [M | b].
    """

    scales: bool = False

    def through(self, summary: Tensor, state: Tensor) -> Tensor:
        """Where the map takes a state."""
        factor = summary[..., : self._width(summary)]
        moved = factor * state if self.scales else factor @ state
        return moved + self.state(summary)

    def then(self, first: State, later: State) -> State:
        """Both maps, one after the other."""
        (a,), (b,) = first, later
        factor = b[..., : self._width(b)]
        composed = factor * a if self.scales else factor @ a
        return (composed + torch.cat((torch.zeros_like(factor), self.state(b)), dim=-1),)

    def around(self, inner: State, outer: State) -> State:
        """Pairs of what is met on the way in and on the way out."""
        (heads,), (tails,) = self.then(outer[:1], inner[:1]), self.then(inner[1:], outer[1:])
        return heads, tails

    def state(self, summary: Tensor) -> Tensor:
        """Where the map takes the state 0."""
        return summary[..., self._width(summary) :]

    def nothing(self, summary: Tensor) -> Tensor:
        """The map that changes nothing."""
        if self.scales:
            return torch.cat((torch.ones_like(summary[..., :1]), summary[..., 1:] * 0), dim=-1)
        eye = torch.eye(*summary.shape[-2:], dtype=summary.dtype, device=summary.device)
        return eye.expand_as(summary).contiguous()

    def _width(self, summary: Tensor) -> int:
        return 1 if self.scales else summary.shape[-2]


MATRICES, SCALES = StateMaps(), StateMaps(scales=True)


def entering_by_gather(
    own: Tensor,
    chain: Sequence[Sequence[int]],
    axis: DeviceMesh,
    *,
    reverse: bool = False,
    maps: StateMaps = MATRICES,
    ranks_per_node: int = 0,
) -> Tensor:
    """Gather all summaries, and fold those that come before each segment of this rank.

    Args:
        own: [P, ..., K, K + V], summaries of this rank's P segments; [P, ..., K, 1 + V] of scales.
        chain: [n][P], the place of every rank's segments among all, by position.
        reverse: come from the right, for gradients.
        ranks_per_node: neighbours that share a node: a summary crosses once to each node.
    Returns:
        [P, ..., K, V].

    Traffic per rank: (n - 1) * own.numel() elements.
    """
    gathered = all_gather_on_nodes(own, axis, dim=0, ranks_per_node=ranks_per_node)
    summaries = gathered.unflatten(0, (len(chain), -1))
    places = {
        place: (rank, index) for rank, row in enumerate(chain) for index, place in enumerate(row)
    }
    state, entering = torch.zeros_like(maps.state(own[0])), {}
    mine = set(chain[axis.get_local_rank()])
    for place in sorted(places, reverse=reverse):
        if place in mine:
            entering[place] = state
        if len(entering) == len(mine):
            break
        state = maps.through(summaries[places[place]], state)
    return torch.stack([entering[place] for place in chain[axis.get_local_rank()]])


def entering_by_scan(
    own: Tensor,
    chain: Sequence[Sequence[int]],
    axis: DeviceMesh,
    *,
    reverse: bool = False,
    maps: StateMaps = MATRICES,
    ranks_per_node: int = 0,
) -> Tensor:
    """Compose what comes before, window by window: log2(n) rounds.

    Args and result as of `entering_by_gather`; one segment per rank in order of the ranks
    (Contiguous), or two (HeadTail).

    Traffic per rank: ceil(log2(n)) summaries, three times that for two segments. Between nodes:
    that for the number of nodes, by one rank of each.
    """
    scan = partial(exclusive_scan_on_nodes, mesh=axis, ranks_per_node=ranks_per_node)
    if len(chain[0]) == 1:
        nothing = maps.nothing(own[0])
        (before,) = scan((own[0],), maps.then, (nothing,), reverse=reverse)
        return maps.state(before)[None]
    # From the right the tails are the heads.
    head, tail = reversed(own.unbind()) if reverse else own.unbind()
    nothing = maps.nothing(head)
    (before,) = scan((head,), maps.then, (nothing,))
    heads, tails = scan((head, tail), maps.around, (nothing, nothing), reverse=True)
    state = maps.state(before)
    later = maps.through(tails, maps.through(heads, maps.through(head, state)))
    return torch.stack((later, state) if reverse else (state, later))


def entering_along_chains(
    own: Tensor, passing: tuple[Tensor, ...], axis: DeviceMesh, *, maps: StateMaps = MATRICES
) -> Tensor:
    """Bring the summaries that this rank's stretches need, and fold each chain of a document.

    Args:
        own: [P, ..., K, K + V], summaries of this rank's P stretches.
        passing: of `state_passing_tensors`, in one direction; in two hops, of
            `node_state_passing_tensors`.
    Returns:
        [P, ..., K, V], zero where nothing enters.

    Traffic per rank: a summary from each stretch of others that comes before one of its own in a
    document, each once.
    """
    steps, summaries = passing[2].tolist(), [own]
    # The second hop hands on what came in the first.
    for send, counts in (passing[:2], passing[3:])[: len(passing) // 2]:
        sent, received = counts.tolist()
        rows = summaries[-1].index_select(0, on_device(send[: sum(sent)], own.device))
        summaries.append(all_to_all(rows, axis, receive=received, send=sent))
    every, state = torch.cat(summaries), torch.zeros_like(maps.state(own[0]))
    entering = torch.zeros_like(maps.state(own))
    for anew, number, whose in steps:
        if anew < 0:
            break
        state = torch.zeros_like(state) if anew else state
        if whose >= 0:
            entering[whose] = state
        if number >= 0:
            state = maps.through(every[number], state)
    return entering


def summaries_received(num_shards: int, segments: int, *, scan: bool) -> int:
    """How many summaries of a segment a rank receives, in one direction."""
    if not scan:
        return (num_shards - 1) * segments
    return (num_shards - 1).bit_length() * (1 if segments == 1 else 3)

"""A ring over nodes: step d attends to what this node's ranks read of the node d places back.

Inside of a step keys come in two hops (key_hops.py): to one of the node's readers, and on to the
others. While step d computes, step d + 1's keys are spread inside the node and step d + 2's cross
between nodes; gradients follow two steps behind. All of it is all_to_alls of the whole axis, in
which most ranks pass nothing to each other: every rank calls the same ones, in the same order.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from dtcp.distributed.groups import group_of
from dtcp.distributed.moves import Moves
from dtcp.distributed.staging import Transfer, transfer_stream
from dtcp.kernels.softmax.api import Keys
from dtcp.kernels.softmax.block_ranges import TILE, KeyLine
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.partition import Ints, Partition, expand_tokens
from dtcp.softmax.exchange import (
    accumulate_by_peer,
    accumulate_returned_grads,
    start_all_to_all_rows,
    start_bringing,
    start_returning,
)
from dtcp.softmax.key_hops import KeyHops, key_hops
from dtcp.softmax.metadata import KeyExchangeMetadata, by_part, local_runs, ranges_and_pieces
from dtcp.softmax.moves import AttentionShape, Peers, steps_moved
from dtcp.softmax.payload import KVPayload
from dtcp.softmax.required_keys import PeerRuns
from dtcp.softmax.row_transfers import RowTransfer
from dtcp.softmax.strategy import OpContext


def node_ring_metadata(
    layout: SequenceLayout,
    rank: int,
    intervals: KeyIntervals,
    *,
    ranks_per_node: int,
    tile: int = TILE,
) -> KeyExchangeMetadata:
    """Metadata of a ring over nodes: as many runs of keys as there are nodes.

    Counts go by step and place in a node, one row of [n] for what is sent and one for what is
    received: in the first hop to and from the node that many steps away, in the second inside.
    """
    hops = key_hops(layout, rank, intervals, ranks_per_node=ranks_per_node)
    keys_layout = intervals.layout_of_keys(layout)
    n, m, local_len = layout.num_shards, ranks_per_node, keys_layout.shard_len
    ranks, nodes, node = np.arange(n), n // m, rank // m
    ahead, back = ((way * (ranks // m - node)) % nodes for way in (1, -1))
    sent = _by(hops.sent, (ahead * m + ranks % m)[hops.sent.peer])
    received = _by(hops.received, (back * m + ranks % m)[hops.received.peer])
    onward, arriving = (
        _by(runs, back[_owner(keys_layout.partition, runs)] * m + runs.peer % m)
        for runs in (hops.onward, hops.arriving)
    )
    keys = _lined_up(hops, received, arriving, (nodes, m, local_len))
    order, token_index = _order_of_steps(keys, nodes, m * local_len)
    rows, first, last = local_runs(layout, rank, intervals)
    line = KeyLine(keys.step, keys.start, keys.stop, nodes)
    ranges, pieces = ranges_and_pieces(rows, line, intervals, tile=tile)
    counts = np.stack([x.counts(n) for x in (sent, received, onward, arriving)])
    return KeyExchangeMetadata(
        first_key=first,
        last_key=last,
        send_slot=sent.expanded(room=keys_layout.seq_len - local_len),
        counts=torch.from_numpy(counts[:2]),
        order=order,
        key_token_index=token_index,
        block_ranges=ranges,
        pieces=pieces,
        query_token_index=layout.token_indices(rank).to(torch.int32),
        onward=_places(onward, received, m, hops.room),
        onward_counts=torch.from_numpy(counts[2:]),
    )


class _KeyRuns(NamedTuple):
    """The keys of all steps, by step and then from left to right. Each field [R]."""

    place: Ints  # of the first token, among the rows of its step
    start: Ints
    stop: Ints
    step: Ints


def _lined_up(
    hops: KeyHops, received: PeerRuns, arriving: PeerRuns, sizes: tuple[int, int, int]
) -> _KeyRuns:
    """Of each step, what came in the first hop and then in the second; of step 0, own keys first.

    Args:
        received, arriving: by step and place in a node.
        sizes: nodes, their ranks, local keys.
    """
    nodes, m, local_len = sizes
    in_first = received.counts(nodes * m).reshape(nodes, m).sum(1)
    base = np.where(np.arange(nodes) == 0, local_len, 0)
    of_first, of_second = received.peer // m, arriving.peer // m
    place = (
        hops.own_slots,
        base[of_first] + _before(received, m),
        (base + in_first)[of_second] + _before(arriving, m),
    )
    start = (hops.own_tokens.start, received.start, arriving.start)
    stop = (hops.own_tokens.stop, received.stop, arriving.stop)
    step = (0 * hops.own_slots, of_first, of_second)
    runs = [np.concatenate(x) for x in (place, start, stop, step)]
    order = np.lexsort((runs[1], runs[3]))
    return _KeyRuns(*(x[order] for x in runs))


def _order_of_steps(keys: _KeyRuns, nodes: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Where each key of a step stands among its rows, and its token index: [nodes, capacity]."""
    lengths = keys.stop - keys.start
    in_step = np.bincount(keys.step, lengths, nodes).astype(np.int64).tolist()
    order, token_index = (
        by_part(expand_tokens(first, lengths), in_step, capacity)
        for first in (keys.place, keys.start)
    )
    return order, token_index


def _places(onward: PeerRuns, received: PeerRuns, m: int, room: int) -> Tensor:
    """Where the tokens that go on inside the node stand among the received ones of their step."""
    by_token = received.start.argsort()
    run = by_token[np.searchsorted(received.start[by_token], onward.start, side="right") - 1]
    place = _before(received, m)[run] + onward.start - received.start[run]
    return torch.from_numpy(expand_tokens(place, onward.stop - onward.start, room=room))


def _by(runs: PeerRuns, key: Ints) -> PeerRuns:
    """The runs in order of a key, which takes the place of their peers, then from left to right."""
    order = np.lexsort((runs.start, key))
    return PeerRuns(key[order], runs.start[order], runs.stop[order])


def _owner(keys: Partition, runs: PeerRuns) -> Ints:
    return keys.owner[np.searchsorted(keys.start, runs.start, side="right") - 1]


def _before(runs: PeerRuns, m: int) -> Ints:
    """Tokens of the same step that stand before each run."""
    before, step = np.cumsum(runs.stop - runs.start) - (runs.stop - runs.start), runs.peer // m
    return before - before[np.searchsorted(step, step)] if len(step) else before


class NodeRing:
    """One call's way around the nodes.

    Args:
        payload: the local keys and values.
        dtype: in which gradients travel.
    """

    def __init__(self, payload: KVPayload, context: OpContext, dtype: torch.dtype) -> None:
        metadata: KeyExchangeMetadata = context.metadata
        group = group_of(context.groups[-1])
        self.payload, self.metadata, self.context = payload, metadata, context
        self.dtype = dtype
        self.num_nodes, n = metadata.key_token_index.shape[0], dist.get_world_size(group)
        self.per_node = n // self.num_nodes
        self.node = dist.get_rank(group) // self.per_node
        sent, received = metadata.counts.view(2, self.num_nodes, -1).tolist()
        on, arriving = metadata.onward_counts.view(2, self.num_nodes, -1).tolist()
        self.sent, self.received, self.on, self.arriving = sent, received, on, arriving
        tokens = [sum(x) for x in sent]
        self.slots = metadata.send_slot[: sum(tokens)].split(tokens)
        tokens = [sum(x) for x in on]
        self.onward = metadata.onward[: sum(tokens)].split(tokens)
        self.local = torch.empty(0)
        # Gradients on their way, inside the node, and from there home; and, since they are read
        # meanwhile, those that they are packed from.
        self._inside_node: tuple[int, Tensor, Transfer | None] | None = None
        self._home: tuple[int, Tensor, RowTransfer] | None = None

    def steps(self) -> Iterator[tuple[int, Keys]]:
        """(step, keys), from this node's own on."""
        rows = self._bring(0).wait()
        inside: Transfer | None = None
        crossing = self._bring(1)
        for step in range(self.num_nodes):
            here = rows if inside is None else torch.cat((rows, inside.wait()))
            if step + 1 < self.num_nodes:
                rows = crossing.wait()
                with transfer_stream(rows.device):
                    onward = rows.index_select(0, self.onward[step + 1])
                    inside = self._inside(onward, self.on[step + 1], self.arriving[step + 1])
            if step + 2 < self.num_nodes:
                crossing = self._bring(step + 2)
            yield step, self._keys(step, here)

    def returned(self, step: int, rows: Tensor) -> None:
        """Take in the gradients of a step's rows in token order, [B, K, G, W], and send them home.

        What the ranks of a node found is summed where the key came in, in fp32.
        """
        rows = rows.transpose(0, 1)
        by_source = torch.empty_like(rows).index_copy_(0, self._order(step).long(), rows)
        if step == 0:
            own = len(rows) - sum(self.received[0])
            self.local = by_source[:own].transpose(0, 1).contiguous()
            by_source = by_source[own:]
        self._advance()
        first = sum(self.received[step])
        inside = None
        if step:  # nothing goes on inside a node of what it holds itself
            with transfer_stream(by_source.device):
                further = by_source[first:].to(self.dtype)
                inside = self._inside(further, self.arriving[step], self.on[step])
        self._inside_node = (step, by_source[:first], inside)

    def finish(self) -> Tensor:
        """The gradients of all local rows [B, L, G, W], once those of other ranks are here."""
        self._advance()
        self._advance()
        return self.local

    def _advance(self) -> None:
        """What has come home is added; what was found inside the node is summed and goes home."""
        if self._home is not None:
            step, _, transfer = self._home
            accumulate_returned_grads(self.local, transfer.wait(), self.slots[step])
            self._home = None
        if self._inside_node is not None:
            step, brought, inside = self._inside_node
            if inside is not None:
                places, counts = self.onward[step], self.on[step]
                accumulate_by_peer(brought, inside.wait(), places, counts)
            send, receive = self._at(-step, self.received[step]), self._at(step, self.sent[step])
            with transfer_stream(brought.device):
                arguments = (brought, send, receive, self.dtype, self.context)
                home = start_returning(*arguments, self._start)
            self._home, self._inside_node = (step, brought, home), None

    def _start(self, rows: Tensor, send: list[int], receive: list[int]) -> Transfer:
        return start_all_to_all_rows(rows, send, receive, self.context)

    def _bring(self, step: int) -> RowTransfer:
        """The first hop of a step's keys."""
        send, receive = self._at(step, self.sent[step]), self._at(-step, self.received[step])
        with transfer_stream(self.slots[step].device):
            packed = self.payload.pack(self.slots[step])
            return start_bringing(packed, send, receive, self.context, self._start)

    def _inside(self, rows: Tensor, send: list[int], receive: list[int]) -> Transfer:
        return start_all_to_all_rows(rows, self._at(0, send), self._at(0, receive), self.context)

    def _at(self, steps: int, counts: list[int]) -> list[int]:
        """Counts of the ranks of the node that many steps on, among those of all ranks."""
        by_rank = [0] * (self.num_nodes * self.per_node)
        first = (self.node + steps) % self.num_nodes * self.per_node
        by_rank[first : first + self.per_node] = counts
        return by_rank

    def _keys(self, step: int, rows: Tensor) -> Keys:
        order = self._order(step)
        if step:
            k, v = self.payload.received(rows.index_select(0, order), step)
        else:
            k, v = self.payload.in_order(rows, order)
        return self.metadata.keys_of(step, k, v)

    def _order(self, step: int) -> Tensor:
        """Where each of a step's keys in token order stands among its rows."""
        count = sum(self.received[step]) + sum(self.arriving[step])
        count += self.metadata.own_keys if step == 0 else 0
        return self.metadata.order[step, :count]


def node_ring_moves(
    shape: AttentionShape, metadata: KeyExchangeMetadata, peers: Peers, *, queries: int
) -> Moves:
    """What a ring over nodes moves, by rank."""
    n, nodes = peers.num_ranks, metadata.key_token_index.shape[0]
    sent, received = [0] * n, [0] * n
    m, steps = n // nodes, range(nodes)
    ways = ((sent, metadata.counts[0], 1), (received, metadata.counts[1], -1))
    inside = ((sent, metadata.onward_counts[0], 0), (received, metadata.onward_counts[1], 0))
    for by_rank, counts, way in (*ways, *inside):
        for step, of_step in zip(steps, counts.view(nodes, m).tolist(), strict=True):
            first = (peers.rank // m + way * step) % nodes * m
            for place, count in enumerate(of_step):
                by_rank[first + place] += count
    most = int((metadata.counts[1] + metadata.onward_counts[1]).view(nodes, m).sum(1).max())
    length = metadata.own_keys
    return steps_moved(shape, sent, received, length, peers.rank, queries=queries, step=most)

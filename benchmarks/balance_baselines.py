"""Suites of packed rows, the rules by which others deal them out, and what a layout comes to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from dtcp.sequence.block_balanced import BlockBalanced, assign_blocks, block_work
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.interval_runs import Ints
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.mask_work import WorkRuns
from dtcp.sequence.masks import Causal
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax.joined_shards import joined
from dtcp.softmax.required_keys import needed_by_rank

Make = Callable[[Documents, int], SequenceLayout]


def lognormal(draw: np.random.Generator) -> float:
    """Median 2048 tokens."""
    return float(draw.lognormal(np.log(2048), 1.5))


def mixture(draw: np.random.Generator) -> float:
    """Mostly short, some long, a few very long."""
    kind = draw.random()
    if kind < 0.82:
        return float(draw.lognormal(np.log(1024), 0.8))
    median, sigma = (8192, 0.6) if kind < 0.97 else (98304, 0.5)
    return float(draw.lognormal(np.log(median), sigma))


SUITES: Mapping[str, Callable[[np.random.Generator], float] | None] = {
    "lognormal": lognormal,
    "mixture": mixture,
    "single": None,
}


def rows_of(suite: str, seq_len: int, packs: int) -> list[Documents]:
    """Packed rows of a suite, documents of a quarter of the row at most; one for `single`."""
    draw_length = SUITES[suite]
    if draw_length is None:
        return [Documents.single(1, seq_len)]
    draw, rows = np.random.default_rng(0), []
    for _ in range(packs):
        lengths: list[int] = []
        while (left := seq_len - sum(lengths)) > 0:
            lengths.append(min(max(1, int(draw_length(draw))), seq_len // 4, left))
        rows.append(Documents((tuple(lengths),), seq_len))
    return rows


def greedy_chunks(documents: Documents, num_shards: int) -> SequenceLayout:
    """Chunks of 2048 tokens, the dearest first to the least loaded rank.

    MagiAttention's dispatch as published: https://github.com/SandAI-org/MagiAttention
    """
    return _blocks(documents, num_shards, 2048, assign_blocks)


def round_robin(documents: Documents, num_shards: int) -> SequenceLayout:
    """Blocks of 128 tokens by falling work, dealt out there and back: torch's PTRR."""
    return _blocks(documents, num_shards, 128, _there_and_back)


def _there_and_back(work: list[int], num_shards: int) -> tuple[int, ...]:
    place = np.argsort(-np.array(work), kind="stable").argsort()
    turn, rank = np.divmod(place, num_shards)
    return tuple(np.where(turn % 2 == 0, rank, num_shards - 1 - rank).tolist())


def _blocks(
    documents: Documents,
    num_shards: int,
    block: int,
    assign: Callable[[list[int], int], tuple[int, ...]],
) -> SequenceLayout:
    work = block_work(Causal().work(Coords.of(documents)), block)
    return BlockBalanced(documents.seq_len, num_shards, block, assign(work, num_shards))


LAYOUTS: Mapping[str, Make] = {
    "Contiguous": Contiguous.for_batch,
    "HeadTail": HeadTail.for_batch,
    "PerDocument": PerDocument.for_batch,
    "BlockBalanced (128)": BlockBalanced.for_batch,
    "greedy chunks (2048)": greedy_chunks,
    "PTRR (128)": round_robin,
    "DocumentBalanced": DocumentBalanced.for_batch,
}


@dataclass(frozen=True)
class Figures:
    """What a layout comes to under a causal mask. Each field [n]."""

    work: Ints  # keys that a rank's queries see
    received: Ints  # tokens whose keys a rank needs from others
    sent: Ints  # tokens that others need of it, once for each
    pieces: Ints

    @property
    def imbalance(self) -> float:
        return float(self.work.max() / self.work.mean())


def figures_of(layout: SequenceLayout, documents: Documents) -> Figures:
    """From runs, all ranks at once."""
    n, seq_len, partition = layout.num_shards, layout.seq_len, layout.partition
    coords = Coords.of(documents)
    needed = needed_by_rank(partition, KeyIntervals.of(Causal(), coords), seq_len)
    tokens = np.bincount(needed.peer, needed.stop - needed.start, n)
    documented = sum(documents.lengths[0])
    own = np.clip(np.minimum(partition.stop, documented) - partition.start, 0, None)
    # All of a rank's own tokens are among those it needs: each sees itself.
    received = tokens - np.bincount(partition.owner, own, n)
    bounds = np.append(partition.start, seq_len)
    # How many ranks need each run of neighbouring tokens, their owner among them.
    edges = np.unique(np.concatenate((bounds, needed.start, needed.stop)))
    users = np.zeros(len(edges))
    np.add.at(users, np.searchsorted(edges, needed.start), 1)
    np.add.at(users, np.searchsorted(edges, needed.stop), -1)
    owner = partition.owner[np.searchsorted(partition.start, edges[:-1], side="right") - 1]
    sent = np.bincount(owner, np.diff(edges) * np.maximum(users.cumsum()[:-1] - 1, 0), n)
    pieces = np.bincount(partition.owner, minlength=n)
    joined_pieces = pieces - np.bincount(
        partition.owner[1:], partition.owner[1:] == partition.owner[:-1], n
    )
    return Figures(_work(layout, coords), received, sent, joined_pieces)


def received_by_nodes(layout: SequenceLayout, documents: Documents, nodes: int) -> Ints:
    """Tokens that each group of neighbouring ranks needs from the others, once: [nodes]."""
    return figures_of(joined(layout, nodes), documents).received


def _work(layout: SequenceLayout, coords: Coords) -> Ints:
    runs, partition = WorkRuns.of([(Causal(), 1)], coords), layout.partition
    start = np.unique(np.append(partition.start, runs.start))
    length = np.diff(start, append=layout.seq_len)
    run = np.searchsorted(runs.start, start, side="right") - 1
    first = runs.work[run] + runs.step[run] * (start - runs.start[run])
    work = length * first + runs.step[run] * (length * (length - 1) // 2)
    owner = partition.owner[np.searchsorted(partition.start, start, side="right") - 1]
    return np.bincount(owner, work, layout.num_shards)

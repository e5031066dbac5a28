"""Sliding windows: bring the tokens next to a shard, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dtcp.distributed.moves import Moves
from dtcp.sequence.arguments import check_ints
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.row_layouts import rows_on
from dtcp.softmax.all_gather import AllGather, AllGatherAttention
from dtcp.softmax.inputs import AttentionInputs
from dtcp.softmax.metadata import KeyExchangeMetadata, all_gather_metadata
from dtcp.softmax.moves import AttentionShape, Peers, keys_moved
from dtcp.softmax.op import AttentionOp
from dtcp.softmax.required_keys import most_received


class _Halo(AllGather):
    """One all_to_all out; what arrived is kept, so backward only returns its gradients.

    Where more arrives than a shard holds, in small pieces, backward brings it again: what is saved
    stays of local size.
    """

    def kept(self, rows: Tensor, metadata: KeyExchangeMetadata) -> list[Tensor]:
        """The rows that arrived, and zeros up to the room: [B, room, G, W]."""
        room = metadata.kept_rows
        if room is None:
            return []
        return [F.pad(rows.transpose(0, 1), (0, 0, 0, 0, 0, room - rows.shape[0]))]

    def rows_of(self, kept: Sequence[Tensor], metadata: KeyExchangeMetadata) -> Tensor:
        return kept[0][:, : int(metadata.moved[1].sum())].transpose(0, 1)

    def saved_like(
        self, x: AttentionInputs, metadata: KeyExchangeMetadata, group_sizes: Sequence[int]
    ) -> list[Tensor]:
        saved, room = super().saved_like(x, metadata, group_sizes), metadata.kept_rows
        if room is not None:
            batch, length, heads, width = x.v.shape
            # Rows that are one line share its room.
            room = room if metadata.first_key.shape[-1] == length else room // batch
            width += 0 if x.k is None else x.k.shape[-1]
            saved.append(x.q.new_empty(batch, room, heads, width))
        return saved

    def moves(
        self, shape: AttentionShape, length: int, metadata: KeyExchangeMetadata, peers: Peers
    ) -> Moves:
        sent, received = metadata.moved.tolist()
        kept = metadata.kept_rows is not None
        return keys_moved(shape, sent, received, metadata.own_keys, peers.rank, kept=kept)


LEAST_HALOS = 4
"""Halos of a row that there is room for at least, where a layout has any number of pieces."""

HALO = AttentionOp("halo_attention", _Halo(), communicates=True)


@dataclass
class HaloAttention(AllGatherAttention):
    """Sliding-window attention that fetches the `window` - 1 keys left of each segment.

    O(W) traffic a piece, however long the sequence, and none where a document starts with it. A
    shard shorter than the halo takes it from several ranks, in the same single exchange; a document
    that starts inside the halo shortens it. The mask must be a window: one that sees further is
    refused when the batch is built.

    Args:
        window: W, tokens a query sees, itself included.

    Keyword Args:
        right: tokens right of a segment that a query may see (bidirectional blocks).
        boundary: InGraph() or EagerIsland().
        reduce_dtype: of gradients of keys, as of AttentionStyle.
        ranks_per_node: as of AllGatherAttention; a window longer than a shard is read by several.

    Traffic per rank, received: at most (W - 1 + right) tokens a piece (one of Contiguous, two of
    HeadTail, any number of other layouts) x B * G * (D + V) elements forward; backward, gradients
    home. For that the tokens that arrived are kept, with room for both halos of HeadTail and, where
    a layout has any number of pieces, for 4, 8, 16.. of them; where more arrives than a shard
    holds, as in many small blocks, backward brings it again.
    """

    takes_memory = False  # nothing of another sequence lies left of a segment

    window: int
    right: int = 0

    @property
    def op(self) -> AttentionOp:
        return HALO

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ints("HaloAttention", window=self.window, right=self.right)
        if self.window < 1 or self.right < 0:
            raise ValueError(
                f"HaloAttention counts a query itself, so window >= 1 and right >= 0, got "
                f"window={self.window}, right={self.right}: give it the mask's window."
            )

    def rank_metadata(
        self, layout: SequenceLayout, rank: int, intervals: KeyIntervals
    ) -> KeyExchangeMetadata:
        left, right = intervals.reach()
        if left >= self.window or right > self.right:
            remedy = (
                f"give it `& SlidingWindow({self.window})`, widen the halo to window={left + 1}, "
                f"right={right} (of a plan for images: a longest_vision_block of {right + 1}), or "
                f"use AllGatherAttention"
            )
            if intervals.per_token > 1:
                remedy = "use AllGatherAttention or RingAttention, which bring what lies apart, too"
            raise ValueError(
                f"{self} brings what a window sees, got a mask that sees {left} tokens to the "
                f"left and {right} to the right: {remedy}."
            )
        return all_gather_metadata(
            layout,
            rank,
            intervals,
            capacity=self._capacity(layout, intervals),
            tile=self.tile,
            ranks_per_node=self.ranks_per_node,
        )

    def _capacity(self, layout: SequenceLayout, intervals: KeyIntervals) -> int:
        """Room for the keys that a rank requires, its own included; all, where too many arrive.

        The same number on every rank, and of few sizes, or compiled blocks would be traced anew
        for every batch: what is saved for backward has a shape.
        """
        halo, own = self.window - 1 + self.right, layout.shard_len
        if isinstance(layout, Contiguous | HeadTail):
            segments = 1 if isinstance(layout, Contiguous) else 2
            return min(layout.seq_len, own + segments * halo)
        most = most_received(layout, intervals, limit=own)
        room = LEAST_HALOS * rows_on(layout) * halo
        while room < most:
            room *= 2
        return min(layout.seq_len, own + min(room, own)) if most <= own else layout.seq_len

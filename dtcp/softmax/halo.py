"""Sliding windows: bring the tokens next to a shard, and nothing else."""

from dataclasses import dataclass

from dtcp.sequence.arguments import check_ints
from dtcp.sequence.interval_runs import Intervals, KeyIntervals
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.softmax.all_gather import AllGatherAttention
from dtcp.softmax.metadata import KeyExchangeMetadata, all_gather_metadata


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

    Traffic per rank, received: at most (W - 1 + right) tokens a piece (one of Contiguous, two of
    HeadTail, any number of other layouts) x B * G * (D + V) elements forward; the same again
    backward, and gradients home.
    """

    takes_memory = False  # nothing of another sequence lies left of a segment

    window: int
    right: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ints("HaloAttention", window=self.window, right=self.right)
        if self.window < 1 or self.right < 0:
            raise ValueError(
                f"HaloAttention counts a query itself, so window >= 1 and right >= 0, got "
                f"window={self.window}, right={self.right}: give it the mask's window."
            )

    def rank_metadata(
        self, layout: SequenceLayout, rank: int, intervals: Intervals
    ) -> KeyExchangeMetadata:
        intervals = KeyIntervals.read_off(intervals)
        left, right = intervals.reach()
        if left >= self.window or right > self.right:
            raise ValueError(
                f"{self} brings what a window sees, got a mask that sees {left} tokens to the "
                f"left and {right} to the right: give it `& SlidingWindow({self.window})`, widen "
                f"the halo to window={left + 1}, right={right} (of a plan for images: a "
                f"longest_vision_block of {right + 1}), or use AllGatherAttention."
            )
        capacity = self._capacity(layout)
        return all_gather_metadata(layout, rank, intervals, capacity=capacity, tile=self.tile)

    def _capacity(self, layout: SequenceLayout) -> int:
        """The most keys that a rank requires in any batch; all, where pieces are of any number."""
        if not isinstance(layout, Contiguous | HeadTail):
            return layout.seq_len
        segments = 1 if isinstance(layout, Contiguous) else 2
        halo = segments * (self.window - 1 + self.right)
        return min(layout.seq_len, layout.shard_len + halo)

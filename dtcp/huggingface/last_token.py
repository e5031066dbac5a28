"""One output per row, that of its last token: what heads of classifiers and reward models read.

The token may lie on any rank, so tokens meet here: a mixer follows the head. It gives every token
of a row the head's output for the last one, so that the model's own code, which picks one token,
gets the right value whichever it picks.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dtcp.distributed.collectives import all_gather
from dtcp.distributed.replicated_loss import sum_for_replicated_loss
from dtcp.metadata import AttentionMetadata, BatchMetadata
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.sequence.coords import Coords
from dtcp.sequence.layout import SequenceLayout
from dtcp.style import MixerStyle


@dataclass(frozen=True, eq=False)
class LastTokenMetadata(AttentionMetadata):
    """Where the tokens of a shard are in their rows.

    Args:
        token_index: [L].
        is_token: [B, L] bool, False for padding.
    """

    token_index: Tensor
    is_token: Tensor

    @classmethod
    def of(cls, coords: Coords, token_index: Tensor) -> "LastTokenMetadata":
        """That of some tokens of each row."""
        return cls(token_index, coords.document[:, token_index] >= 0)


class LastToken(Mixer):
    """Give every token of a row the value of its last one that is not the padding token.

    Args:
        pad_token_id: ids that do not count, as a model's own rule has it; None if all do. Where a
            model is called with inputs_embeds there are no ids, and what the batch has as padding
            does not count.
    """

    def __init__(self, pad_token_id: int | None) -> None:
        super().__init__()
        self.pad_token_id = pad_token_id
        self.batch: tuple[Tensor | None, BatchMetadata] | None = None
        self.set_metadata_key()

    @contextmanager
    def reading(self, input_ids: Tensor | None, attn_metadata: BatchMetadata) -> Iterator[None]:
        """Inside, the head is called for this batch, which is not among its arguments."""
        self.batch = input_ids, attn_metadata
        try:
            yield
        finally:
            self.batch = None

    def forward(self, x: Tensor) -> Tensor:
        """Spread the values of the last tokens: [B, L, C].

        Every rank computes the same from the result, a loss too, so its gradient is not summed
        over ranks: the rank that has the token has all of it.

        Traffic per rank: (n - 1) * B * (C + 1) numbers; nothing back.
        """
        if self.batch is None:
            raise ValueError(
                "A head that pools reads the batch of its model's call, got a call of the head "
                "alone: call the model."
            )
        input_ids, attn_metadata = self.batch
        metadata: LastTokenMetadata = self.own(attn_metadata)
        candidate = metadata.is_token
        if input_ids is not None and self.pad_token_id is not None:
            candidate = candidate & (input_ids != self.pad_token_id)
        index = metadata.token_index.where(candidate, -1)
        last, slot = index.max(dim=1)
        value = x[torch.arange(len(x), device=x.device), slot]
        return self.latest(last, value)[:, None].expand_as(x)

    def latest(self, last: Tensor, value: Tensor) -> Tensor:
        """The values [B, C] of the last tokens of whole rows, of those of a shard."""
        return value

    def forward_without_mixing(self, *args: Any, **kwargs: Any) -> Tensor:
        return args[0]

    def whole_row_metadata(self, coords: Coords) -> AttentionMetadata:
        return LastTokenMetadata.of(coords, torch.arange(coords.document.shape[1]))


class ContextParallelLastToken(ClaimedMixer, LastToken):
    """A LastToken that a style has taken over."""

    carry_out = LastToken.forward

    def latest(self, last: Tensor, value: Tensor) -> Tensor:
        lasts = all_gather(last[None], self.axis, dim=0)
        mine = lasts.argmax(dim=0) == self.rank
        # All ranks but one contribute zeros, so the sum is that rank's value.
        return sum_for_replicated_loss(value.where(mine[:, None], 0), self.axis)


@dataclass
class LastTokenCP(MixerStyle):
    """The last tokens of rows whose shards lie on several ranks, in any layout.

    Traffic per rank: (n - 1) * B * (C + 1) numbers.
    """

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]] = {
        LastToken: ContextParallelLastToken
    }
    layouts: ClassVar[tuple[type[SequenceLayout], ...]] = (SequenceLayout,)

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> AttentionMetadata:
        self.check(mixer, layout)
        return LastTokenMetadata.of(coords, layout.token_indices(rank))

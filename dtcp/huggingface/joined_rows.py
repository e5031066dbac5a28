"""Rows put together again, for heads that read more of a row than its last token.

A head that takes a mean, or a row's first token, runs on whole rows: on each rank of cp, alike.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dtcp.distributed.collectives import all_gather
from dtcp.metadata import AttentionMetadata, BatchMetadata
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.sequence.coords import Coords
from dtcp.sequence.layout import SequenceLayout
from dtcp.style import MixerStyle


@dataclass(frozen=True, eq=False)
class JoinedMetadata(AttentionMetadata):
    """Where the tokens of rows are, up to the last one that any of them has: T tokens.

    Args:
        slot: [T], of each token among those of all ranks.
        token_index: [L], of this rank's.
        is_token: [B, T] bool, False for padding.
    """

    slot: Tensor
    token_index: Tensor
    is_token: Tensor

    @classmethod
    def of(cls, coords: Coords, slot: Tensor, token_index: Tensor) -> "JoinedMetadata":
        """That of rows whose token t lies in slot[t]."""
        is_token = coords.document >= 0
        length = int((is_token.any(0) * torch.arange(1, is_token.shape[1] + 1)).max().clamp(min=1))
        return cls(slot[:length], token_index, is_token[:, :length])


class JoinRows(Mixer):
    """Put the tokens of a row together, on every rank alike, without the padding that all have.

    What is computed of whole rows, a loss too, is the same on all ranks, and so is its gradient:
    `shared` divides that by the ranks, so that gradients of weights, summed over them, are right.

    Args:
        rows_alone: whether its model gives outputs of rows, and none of tokens.
        reads_padding: whether what is made of a row depends on the padding behind it.
    """

    def __init__(self, *, rows_alone: bool = True, reads_padding: bool = False) -> None:
        super().__init__()
        self.rows_alone, self.reads_padding = rows_alone, reads_padding
        self.batch: BatchMetadata | None = None
        self.set_metadata_key()

    @contextmanager
    def reading(self, attn_metadata: BatchMetadata) -> Iterator[None]:
        """Inside, the head is called for this batch: its call does not hand the batch on."""
        self.batch = attn_metadata
        try:
            yield
        finally:
            self.batch = None

    def of_batch(self) -> JoinedMetadata:
        """What it reads of the batch that its model is called with."""
        if self.batch is None:
            raise ValueError(
                "A head that pools reads the batch of its model's call, got a call of the head "
                "alone: call the model."
            )
        metadata: JoinedMetadata = self.own(self.batch)
        return metadata

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of this rank, [B, L, ..], to those of rows: [B, T, ..].

        Traffic per rank: (n - 1) * B * L * C numbers; nothing back.
        """
        metadata = self.of_batch()
        if x.shape[1] != len(metadata.token_index):
            raise ValueError(
                f"Rows are joined of the tokens of shards, got x.shape={tuple(x.shape)} for "
                f"{len(metadata.token_index)} tokens: call the model, not a part of it."
            )
        return self.joined(x, metadata)

    def joined(self, x: Tensor, metadata: JoinedMetadata) -> Tensor:
        """The tokens of all ranks, in their order."""
        return x.index_select(1, metadata.slot)

    def mask(self) -> Tensor:
        """Which tokens are no padding, as transformers has it: [B, T], 1 or 0.

        A row without any counts its first one: a mean over nothing would be NaN, and so would all
        gradients.
        """
        is_token = self.of_batch().is_token
        first = torch.arange(is_token.shape[1], device=is_token.device) == 0
        return (is_token | first & ~is_token.any(1, keepdim=True)).long()

    def shared(self, x: Tensor) -> Tensor:
        """What all ranks have computed alike, with each rank's part of its gradient."""
        return x

    def forward_without_mixing(self, *args: Any, **kwargs: Any) -> Tensor:
        return args[0]

    def whole_row_metadata(self, coords: Coords) -> AttentionMetadata:
        tokens = torch.arange(coords.document.shape[1])
        return JoinedMetadata.of(coords, tokens, tokens)


class ContextParallelJoinRows(ClaimedMixer, JoinRows):
    """A JoinRows that a style has taken over."""

    carry_out = JoinRows.forward

    def joined(self, x: Tensor, metadata: JoinedMetadata) -> Tensor:
        return _Joined.apply(x, metadata.slot, metadata.token_index, self.axis)

    def shared(self, x: Tensor) -> Tensor:
        return _Shared.apply(x, self.num_shards)


@dataclass
class JoinRowsCP(MixerStyle):
    """Rows whose shards lie on several ranks, put together once per step; any layout of all rows.

    Traffic per rank: (n - 1) * B * L * C numbers.
    """

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]] = {JoinRows: ContextParallelJoinRows}
    layouts: ClassVar[tuple[type[SequenceLayout], ...]] = (SequenceLayout,)

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> AttentionMetadata:
        self.check(mixer, layout)
        return JoinedMetadata.of(coords, layout.inverse(), layout.token_indices(rank))


class _Joined(torch.autograd.Function):
    """Each rank has the gradient of whole rows, a part as large as the others': its own tokens'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, token_index: Tensor, axis: Any) -> Tensor:
        ctx.token_index, ctx.size = token_index, axis.size()
        return all_gather(x, axis, dim=1).index_select(1, slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        length = grad.shape[1]
        of_tokens = grad.index_select(1, ctx.token_index.clamp(max=length - 1))
        is_padding = (ctx.token_index >= length).view(-1, *[1] * (grad.ndim - 2))
        return of_tokens.masked_fill(is_padding, 0.0) * ctx.size, None, None, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.size, None

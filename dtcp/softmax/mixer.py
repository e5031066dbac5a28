"""The places where tokens meet: what a model calls, and what a plan may take over.

Everything else in a transformer is per token and needs no context parallelism. A mixer has no
parameters and runs on one device as it stands; a style (style.py) replaces how it is carried
out over a mesh axis, and no other line of the model knows.

A mixer reads `metadata`: what the batch brings, made once on the host (`batch_metadata`), by mixer
kind. A model takes tables as an argument and hands them through.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dtcp.kernels.rotary import rotate
from dtcp.kernels.softmax.api import SoftmaxParams
from dtcp.mixer import BatchMetadata, Mixer, check_position_ids, position_ids_of
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.masks import Coords, Mask
from dtcp.softmax.local import ATTENTION, local_metadata


class MaskedMixer(Mixer):
    """A mixer in which tokens read each other as a mask allows.

    Args:
        mask: which keys a query sees, within its document.
        scale: factor on the scores; None for head_dim ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.

    There is no attention dropout: on a sharded sequence its pattern would depend on the mesh.
    """

    def __init__(self, mask: Mask, *, scale: float | None = None, softcap: float = 0.0) -> None:
        super().__init__()
        self.mask = mask
        self.scale = scale
        self.softcap = softcap
        self.metadata_key = self.key_of(f"{mask}")

    def key_of(self, read: str) -> str:
        """The name of this kind's tables, for a mask or for a mask and a style."""
        return read

    def softmax(self, q: Tensor) -> SoftmaxParams:
        return SoftmaxParams(
            q.shape[-1] ** -0.5 if self.scale is None else self.scale, self.softcap
        )

    def make_metadata(self, coords: Coords, layout: SequenceLayout | None) -> Sequence[Tensor]:
        if layout is not None and layout.num_shards > 1:
            raise ValueError(
                f"A sequence is sharded only where every mixer is claimed by a plan, got an "
                f"unclaimed {self} with {layout}: add a style for it to the plan."
            )
        return self.whole_row_metadata(coords)

    def whole_row_metadata(self, coords: Coords) -> Sequence[Tensor]:
        """The tables of whole rows, on one device."""
        return local_metadata(*self.mask.intervals(coords))

    def extra_repr(self) -> str:
        return f"mask={self.mask}, scale={self.scale}, softcap={self.softcap}"


class SoftmaxAttention(MaskedMixer):
    """Scaled dot-product attention under a mask."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        metadata: BatchMetadata,
        *,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: [B, L, H, D].
            k: [B, L, G, D], H a multiple of G; query head h reads kv head h // (H / G).
            v: [B, L, G, V].
            metadata: what the batch brings.
            sink: [H], one score a head that takes its share of the softmax and adds nothing.
        Returns:
            [B, L, H, V].
        """
        return ATTENTION(q, k, v, metadata[self.metadata_key], self.softmax(q), sink=sink)


class KeysFromValues(MaskedMixer):
    """Attention whose keys are made of its values: the key is the value, scaled and rotated.

    Between ranks only values need to travel; a key is made again where its value arrives. Its
    position comes from the batch's tables, and a model whose positions are others is stopped.
    """

    def key_of(self, read: str) -> str:
        return f"{read}, keys from values"

    def forward(
        self,
        q: Tensor,
        v: Tensor,
        position_ids: Tensor,
        key_scale: Tensor,
        frequency: Tensor,
        metadata: BatchMetadata,
    ) -> Tensor:
        """Attend to k = rotate(v * key_scale) and v.

        Args:
            q: [B, L, H, D], not rotated yet.
            v: [B, L, G, D].
            position_ids: [B, L], the batch's.
            key_scale: [D].
            frequency: [D / 2], radians per token of every pair of channels.
        Returns:
            [B, L, H, D].
        """
        *read, known = metadata[self.metadata_key]
        check_position_ids(position_ids, known, read[1] >= read[0])
        q, k = (rotate(x, known, frequency) for x in (q, v * key_scale))
        return ATTENTION(q, k, v, read, self.softmax(q))

    def alone(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().alone(args[0], args[1], args[1])

    def whole_row_metadata(self, coords: Coords) -> Sequence[Tensor]:
        return (*super().whole_row_metadata(coords), position_ids_of(coords))


class KeyExchange(MaskedMixer):
    """Where a layer hands its keys to all layers that attend to them, its own attention first.

    On one device it hands them on as they are. On a sharded sequence it brings once what the
    queries of every rank will see, and those layers attend to what was brought.
    """

    def key_of(self, read: str) -> str:
        return f"{read}, brought once"

    def forward(self, x: Tensor, metadata: BatchMetadata) -> Tensor:
        """Bring the rows of x [B, L, G, W] that this rank's queries see: [B, K, G, W]."""
        return x

    def position_ids(self, position_ids: Tensor, metadata: BatchMetadata) -> Tensor:
        """Positions in their documents of what `forward` brings: [B, K]."""
        return position_ids

    def alone(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0]
        return x

    def whole_row_metadata(self, coords: Coords) -> Sequence[Tensor]:
        return ()

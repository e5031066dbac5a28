"""The places where tokens meet: what a model calls, and what a plan may take over.

Everything else in a transformer is per token and needs no context parallelism. A mixer has no
parameters and runs on one device as it stands; a style (style.py) replaces how it is carried
out over a mesh axis, and no other line of the model knows.

A mixer reads `tables`: what the batch brings, made once on the host (`batch_tables`), by mixer
kind. A model takes tables as an argument and hands them through.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.compile import assert_in_graph
from dtcp.documents import Documents
from dtcp.kernels.attend import Softmax
from dtcp.kernels.local import ATTENTION, local_tables
from dtcp.kernels.rotate import rotate
from dtcp.layout import SequenceLayout
from dtcp.masks import Coords, Mask

Tables = Mapping[str, Sequence[Tensor]]


class Mixer(nn.Module):
    """A module in which tokens read each other."""

    table_key: str
    style: Any = None
    """What has taken the mixer over, once something has."""

    def make_tables(self, coords: Coords, layout: SequenceLayout | None) -> Sequence[Tensor]:
        """What this mixer reads of a batch; `coords` are the whole rows', in position order."""
        raise NotImplementedError

    def alone(self, *args: Any, **kwargs: Any) -> Tensor:
        """The forward if no token read another: of q, k, v the own value, once a query head."""
        q, _, v = args[:3]
        own: Tensor = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
        return own


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
        self.table_key = self.key_of(f"{mask}")

    def key_of(self, read: str) -> str:
        """The name of this kind's tables, for a mask or for a mask and a style."""
        return read

    def softmax(self, q: Tensor) -> Softmax:
        return Softmax(q.shape[-1] ** -0.5 if self.scale is None else self.scale, self.softcap)

    def make_tables(self, coords: Coords, layout: SequenceLayout | None) -> Sequence[Tensor]:
        if layout is not None and layout.num_shards > 1:
            raise ValueError(
                f"A sequence is sharded only where every mixer is claimed by a plan, got an "
                f"unclaimed {self} with {layout}: add a style for it to the plan."
            )
        return self.tables_of(coords)

    def tables_of(self, coords: Coords) -> Sequence[Tensor]:
        """The tables of whole rows, on one device."""
        return local_tables(*self.mask.intervals(coords))

    def extra_repr(self) -> str:
        return f"mask={self.mask}, scale={self.scale}, softcap={self.softcap}"


class SoftmaxAttention(MaskedMixer):
    """Scaled dot-product attention under a mask."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tables: Tables, *, sink: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            q: [B, L, H, D].
            k: [B, L, G, D], H a multiple of G; query head h reads kv head h // (H / G).
            v: [B, L, G, V].
            tables: what the batch brings.
            sink: [H], one score a head that takes its share of the softmax and adds nothing.
        Returns:
            [B, L, H, V].
        """
        return ATTENTION(q, k, v, tables[self.table_key], self.softmax(q), sink=sink)


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
        position: Tensor,
        key_scale: Tensor,
        frequency: Tensor,
        tables: Tables,
    ) -> Tensor:
        """Attend to k = rotate(v * key_scale) and v.

        Args:
            q: [B, L, H, D], not rotated yet.
            v: [B, L, G, D].
            position: [B, L], the batch's.
            key_scale: [D].
            frequency: [D / 2], radians per token of every pair of channels.
        Returns:
            [B, L, H, D].
        """
        *read, known = tables[self.table_key]
        check_position(position, known, read[1] >= read[0])
        q, k = (rotate(x, known, frequency) for x in (q, v * key_scale))
        return ATTENTION(q, k, v, read, self.softmax(q))

    def alone(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().alone(args[0], args[1], args[1])

    def tables_of(self, coords: Coords) -> Sequence[Tensor]:
        return (*super().tables_of(coords), rotary_position(coords))


class KeyExchange(MaskedMixer):
    """Where a layer hands its keys to all layers that attend to them, its own attention first.

    On one device it hands them on as they are. On a sharded sequence it brings once what the
    queries of every rank will see, and those layers attend to what was brought.
    """

    def key_of(self, read: str) -> str:
        return f"{read}, brought once"

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        """Bring the rows of x [B, L, G, W] that this rank's queries see: [B, K, G, W]."""
        return x

    def position(self, position: Tensor, tables: Tables) -> Tensor:
        """Positions in their documents of what `forward` brings: [B, K]."""
        return position

    def alone(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0]
        return x

    def tables_of(self, coords: Coords) -> Sequence[Tensor]:
        return ()


def rotary_position(coords: Coords) -> Tensor:
    """What rotary angles are counted by: [B, S] int32.

    Raises:
        ValueError: positions on several axes: a mixer that rotates knows one a token.
    """
    if coords.rotary is None:
        return (coords.position - coords.start).to(torch.int32)
    rows, rotary = coords.position.shape[0], coords.rotary
    if rotary.ndim == 2 and rotary.shape[0] == 1:
        rotary = rotary.expand(rows, -1)
    if rotary.shape != coords.position.shape:
        raise ValueError(
            f"A mixer that makes keys where they are read rotates by one position a token, got "
            f"position.shape={tuple(rotary.shape)}: give [B, S] = "
            f"{tuple(coords.position.shape)}, or [1, S]."
        )
    return rotary.to(torch.int32)


def check_position(position: Tensor, known: Tensor, seen: Tensor) -> None:
    """Stop where a model's positions are not those its batch's tables were made of.

    Queries and keys would be rotated by positions of two kinds, a wrong answer without a word.

    Args:
        position: [B, L], what the model was given.
        known: [B, L], of the batch.
        seen: [B, L] bool, False for padding.
    """
    rows = {len(position), len(known)} - {1}
    if position.ndim != 2 or position.shape[-1] != known.shape[-1] or len(rows) > 1:
        raise ValueError(
            f"A mixer that makes keys where they are read rotates by one position a token, got "
            f"position.shape={tuple(position.shape)}: give [B, L] = {tuple(known.shape)}."
        )
    same = (position == known) | ~seen
    assert_in_graph(
        same.all(),
        "A model's positions are those of its batch, got others than the tables were made of: "
        "pass the batch's own, sharded with it (batch['position'] of shard_batch), and give "
        "batch_tables the same where they do not count a document's tokens.",
    )


def mixer_tables(
    model: nn.Module, coords: Coords, layout: SequenceLayout | None = None
) -> dict[str, Sequence[Tensor]]:
    """What the mixers of a model read of a batch: once a kind of mixer, on the host."""
    tables: dict[str, Sequence[Tensor]] = {}
    for module in model.modules():
        if isinstance(module, Mixer) and module.table_key not in tables:
            tables[module.table_key] = module.make_tables(coords, layout)
    return tables


def batch_tables(
    model: nn.Module,
    documents: Documents,
    *,
    prefix: Tensor | None = None,
    block: Tensor | None = None,
    position: Tensor | None = None,
) -> dict[str, Sequence[Tensor]]:
    """The tables of a batch of whole rows, for a model on one device.

    Args:
        position: [B, S], what the model is given; None where it counts a document's tokens.
    """
    return mixer_tables(model, Coords.of(documents, prefix=prefix, block=block, rotary=position))

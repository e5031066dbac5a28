"""The places where tokens meet: what a model calls, and what a plan may take over.

Everything else in a transformer is per token and needs no context parallelism. A mixer has no
parameters and runs on one device as it stands; a style (style.py) replaces how it is carried
out over a mesh axis, and no other line of the model knows.

A mixer reads `tables`: what the batch brings, made once on the host (`batch_tables`), by mixer
kind. A model takes tables as an argument and hands them through.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dtcp.documents import Documents
from dtcp.kernels.attend import Softmax
from dtcp.kernels.local import ATTENTION, local_tables
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


class SoftmaxAttention(Mixer):
    """Scaled dot-product attention under a mask.

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
        self.table_key = f"{mask}"

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

    def softmax(self, q: Tensor) -> Softmax:
        return Softmax(q.shape[-1] ** -0.5 if self.scale is None else self.scale, self.softcap)

    def make_tables(self, coords: Coords, layout: SequenceLayout | None) -> Sequence[Tensor]:
        if layout is not None and layout.num_shards > 1:
            raise ValueError(
                f"A sequence is sharded only where every mixer is claimed by a plan, got an "
                f"unclaimed {self} with {layout}: add a style for it to the plan."
            )
        return local_tables(*self.mask.intervals(coords))

    def extra_repr(self) -> str:
        return f"mask={self.mask}, scale={self.scale}, softcap={self.softcap}"


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
) -> dict[str, Sequence[Tensor]]:
    """The tables of a batch of whole rows, for a model on one device."""
    return mixer_tables(model, Coords.of(documents, prefix=prefix, block=block))

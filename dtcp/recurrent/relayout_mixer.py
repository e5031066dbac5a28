"""A recurrent layer carried out on another layout: its tokens dealt there before it, and back.

    HeadTail, n = 2        rank 0: 0 1 6 7        rank 1: 2 3 4 5
    inside the layer       rank 0: 0 1 2 3        rank 1: 4 5 6 7

One state a rank is handed on then, whatever the layout of the batch, and twice the activations
that change owner travel: less only where many ranks hold short shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.distributed.collectives import group_name
from dtcp.distributed.relayout import RelayoutRoute, deal
from dtcp.mixer import BatchMetadata, Mixer
from dtcp.recurrent.mixer import RecurrentMixer
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.masks import Coords
from dtcp.softmax.style import Received


@dataclass
class RelayoutCP(ParallelStyle):
    """Run a layer on tokens dealt anew: in one all-to-all there, and one back.

    For a module called as layer(x, tables), x of [B, L, D], whose mixers are recurrent and have
    styles of their own. The batch may be of any layout, also one that those styles do not take.

    Args:
        inside: the layout in which the layer works.

    Traffic per rank, received: the tokens that change owner, twice; as much back. Besides that
    of the mixers' styles on `inside`.
    """

    inside: type[Contiguous] | type[HeadTail] = Contiguous

    def received(self, layout: SequenceLayout, rank: int, token: int) -> Received:
        """What a rank will receive: a formula, to plan with.

        Args:
            token: bytes of the hidden state of a token, in all rows.
        """
        inside = self.inside(layout.seq_len, layout.num_shards)
        had = set(layout.token_indices(rank).tolist())
        moved = len(set(inside.token_indices(rank).tolist()) - had) * token
        return Received(2 * moved, 2 * moved)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        found = [m for m in module.modules() if isinstance(m, Mixer)]
        mixers = [m for m in found if isinstance(m, RecurrentMixer) and m.inside is None]
        if not found or len(mixers) < len(found):
            raise TypeError(
                f"{self} takes a layer of recurrent mixers, once, got a {type(module).__name__} "
                f"with {[type(m).__name__ for m in found]}: name the layer itself in the plan."
            )
        for mixer in mixers:
            mixer.inside = self.inside
            mixer.metadata_key = f"{mixer.metadata_key} inside {self.inside.__name__}"
        forward, dealt = module.forward, Dealt(self, device_mesh)
        module.add_module("dealt", dealt)

        def relaid(x: Tensor, metadata: BatchMetadata) -> Tensor:
            return dealt(forward(dealt(x, metadata), metadata), metadata, back=True)

        module.forward = relaid
        return module


class Dealt(Mixer):
    """Deals a layer's tokens anew. Made by the style."""

    style: RelayoutCP

    def __init__(self, style: RelayoutCP, mesh: DeviceMesh) -> None:
        super().__init__()
        self.style, self.mesh, self.group = style, mesh, group_name(mesh)
        self.metadata_key = f"dealt by {style}"

    def forward(self, x: Tensor, metadata: BatchMetadata, *, back: bool = False) -> Tensor:
        """x [B, L, D] from the batch's layout to the one inside, or back."""
        if metadata is None or self.metadata_key not in metadata:
            raise ValueError(
                f"A layer on tokens dealt anew reads the tables of its batch, got none for "
                f"{self.metadata_key!r}: pass ShardedBatch.tables of shard_batch(..., model=model)."
            )
        return deal(x, metadata[self.metadata_key], self.group, back=back)

    def alone(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0]
        return x

    def make_metadata(self, coords: Coords, layout: SequenceLayout | None) -> Sequence[Tensor]:
        if layout is None or layout.num_shards != self.mesh.size():
            raise ValueError(
                f"A layer on {self.mesh.size()} ranks needs a layout of as many shards, got "
                f"layout={layout}: build the batch with shard_batch on the mesh of the plan."
            )
        inside = self.style.inside(layout.seq_len, layout.num_shards)
        return RelayoutRoute.between(layout, inside, self.mesh.get_local_rank())

    def extra_repr(self) -> str:
        return f"{self.style}"

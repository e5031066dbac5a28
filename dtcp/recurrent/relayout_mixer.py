"""A recurrent layer carried out on another layout: its tokens move there before it, and back.

    HeadTail, n = 2        rank 0: 0 1 6 7        rank 1: 2 3 4 5
    inside the layer       rank 0: 0 1 2 3        rank 1: 4 5 6 7

Each rank then hands on one state, whatever the layout of the batch, and the activations that
change owner travel twice: less only where many ranks hold short shards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.compile import Boundary, InGraph
from dtcp.distributed.groups import group_name
from dtcp.distributed.moves import Moves, Received
from dtcp.distributed.relayout import RelayoutMetadata, apply_relayout, relayout_moved
from dtcp.forward import wrap_forward
from dtcp.metadata import BatchMetadata
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.recurrent.mixer import RecurrentMixer
from dtcp.recurrent.moves import ChannelShape
from dtcp.sequence.coords import Coords
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.style import MixerShape


@dataclass
class RelayoutCP(ParallelStyle):
    """Run a layer on another layout: one all-to-all there, and one back.

    For a module called as layer(x, attn_metadata), x of [B, L, D], whose mixers are recurrent and
    have styles of their own. The batch may be of any layout, one that those styles refuse too.

    Args:
        inside: the layout in which the layer works.

    Traffic per rank, received: the tokens that change owner, twice; as much back. Besides that
    of the mixers' styles on `inside`.
    """

    inside: type[Contiguous] | type[HeadTail] = Contiguous
    boundary: ClassVar[Boundary] = InGraph()

    def __post_init__(self) -> None:
        if self.inside not in (Contiguous, HeadTail):
            raise TypeError(
                f"RelayoutCP works on the class Contiguous or HeadTail, got inside="
                f"{self.inside!r}: give one of them."
            )

    def moves(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int, shape: MixerShape
    ) -> Moves:
        """What a layer will move for `rank`, there and back: a formula; tests hold it.

        Args:
            mixer: of the layer, made by this style.
            shape: of a hidden state: a ChannelShape.
        """
        assert isinstance(shape, ChannelShape)
        metadata = self.make_metadata(mixer, coords, layout, rank)
        token = shape.token // shape.batch if metadata.in_line else shape.token
        there, back = (
            relayout_moved(metadata.counts, token, rank, reverse=reverse)
            for reverse in (False, True)
        )
        return Moves(there + back, there + back)

    def received(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int, shape: MixerShape
    ) -> Received:
        """The bytes that `rank` will receive, of `moves`."""
        return self.moves(mixer, coords, layout, rank, shape).received

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        inner = [m for m in module.modules() if isinstance(m, Mixer)]
        mixers = [m for m in inner if isinstance(m, RecurrentMixer) and m.inside is None]
        if not inner or len(mixers) < len(inner):
            raise TypeError(
                f"{self} takes a layer of recurrent mixers, once, got a {type(module).__name__} "
                f"with {[type(m).__name__ for m in inner]}: name the layer itself in the plan."
            )
        for mixer in mixers:
            mixer.inside = self.inside
        module.add_module("relayout", RelayoutMixer(self, device_mesh))

        def on_inside_layout(
            layer: Any,
            forward: Callable[..., Tensor],
            x: Tensor,
            attn_metadata: BatchMetadata,
            *more: Any,
            **named: Any,
        ) -> Tensor:
            if more or named:
                raise TypeError(_called(self, f"{2 + len(more)} by place and {[*named]} by name"))
            inner = forward(layer.relayout(x, attn_metadata), attn_metadata)
            if not isinstance(inner, Tensor):
                raise TypeError(_called(self, f"a result of type {type(inner).__name__}"))
            return layer.relayout(inner, attn_metadata, reverse=True)

        wrap_forward(module, on_inside_layout)
        return module

    def check(self, mixer: Mixer, layout: SequenceLayout) -> None:
        """Tokens move from any layout to the one inside."""

    def groups(self, axis: DeviceMesh) -> list[str]:
        return [group_name(axis)]

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> RelayoutMetadata:
        inside = self.inside(layout.seq_len, layout.num_shards)
        return RelayoutMetadata.between(layout, inside, rank)


def _called(style: RelayoutCP, got: str) -> str:
    return (
        f"{style} moves the tokens of a layer that is called as layer(x, attn_metadata) and "
        f"returns [B, L, D], got {got}: leave what else goes by token out of the call, or cut "
        f"batches by {style.inside.__name__}, without this style."
    )


class RelayoutMixer(ClaimedMixer):
    """Moves a layer's tokens to another layout and back. Made by the style."""

    def __init__(self, style: RelayoutCP, mesh: DeviceMesh) -> None:
        super().__init__()
        self.claim(style, mesh)

    def carry_out(
        self, x: Tensor, attn_metadata: BatchMetadata, *, reverse: bool = False
    ) -> Tensor:
        """x [B, L, D] from the batch's layout to the one inside, or back."""
        return apply_relayout(x, self.own(attn_metadata), self.groups[0], reverse=reverse)

    def forward_without_mixing(self, *args: Any, **kwargs: Any) -> Tensor:
        return args[0]

"""The base of styles: how a kind of mixer is carried out over a mesh axis."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.compile import Boundary, EagerIsland, InGraph
from dtcp.distributed.groups import group_name
from dtcp.distributed.moves import Moves, Received
from dtcp.distributed.nodes import check_ranks_per_node
from dtcp.metadata import AttentionMetadata
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.sequence.arguments import check_ints, check_kind
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.per_document import PerDocument

ALL_LAYOUTS: tuple[type[SequenceLayout], ...] = (
    Contiguous,
    HeadTail,
    PerDocument,
    BlockBalanced,
    DocumentBalanced,
)
"""Of this library: those that a style of any layout accepts."""


@dataclass(frozen=True)
class MixerShape:
    """Sizes of a mixer's call on one rank: what its traffic depends on, beside the batch."""


@dataclass
class MixerStyle(ParallelStyle):
    """Carry a kind of mixer out on a sequence sharded over a mesh axis.

    A subclass names the mixers it takes over and the layouts it accepts, and makes the metadata
    that its mixers read: data, worked out once per batch without communication.

    Keyword Args:
        boundary: InGraph(), one op in the compiled block, or EagerIsland(), one graph break.
        ranks_per_node: neighbours on the axis that share a node: what several of them read then
            crosses the network once, as far as the style's docstring says. 0: what the
            ParallelMesh says, if anything.
    """

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]]
    """Which mixers this style takes over, and what each becomes."""
    layouts: ClassVar[tuple[type[SequenceLayout], ...]]

    boundary: Boundary = field(default_factory=InGraph, kw_only=True)
    ranks_per_node: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_kind(name, (InGraph, EagerIsland), boundary=self.boundary)
        check_ints(name, least=0, ranks_per_node=self.ranks_per_node)

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> AttentionMetadata:
        """What the mixer reads on `rank`: of the same shapes on every rank and for every batch.

        Args:
            coords: of the whole rows, in token order.
        """
        raise NotImplementedError

    def moves(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int, shape: MixerShape
    ) -> Moves:
        """What the mixer will move for `rank`: a formula; tests hold what crosses to it.

        Args:
            mixer: of the plan, claimed or not yet.
            coords: of the whole rows, in token order.
            shape: of the call, that of the style's family.
        """
        raise NotImplementedError

    def received(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int, shape: MixerShape
    ) -> Received:
        """The bytes that `rank` will receive in a layer, of `moves`; and those between nodes."""
        moves = self.moves(mixer, coords, layout, rank, shape)
        return moves.received_on_nodes(rank, self.ranks_per_node)

    def on_nodes(self, ranks_per_node: int) -> "MixerStyle":
        """This style where so many neighbours on the axis share a node."""
        return replace(self, ranks_per_node=ranks_per_node)

    def check(self, mixer: Mixer, layout: SequenceLayout) -> None:
        """Refuse a layout that this style cannot honour, when the batch is built."""
        if not issubclass(layout.kind, self.layouts):
            accepted = ", ".join(kind.__name__ for kind in self.layouts)
            raise ValueError(
                f"{self} works on the layouts {accepted}, got layout={layout}: use one of them, "
                f"or another style."
            )

    def check_one_axis(self, mesh: DeviceMesh) -> None:
        """Refuse, when the plan is applied, a mesh of more axes than that of the sequence."""
        if mesh.ndim != 1:
            raise ValueError(
                f"{self} is applied on the axis of the sequence, got a mesh of {mesh.ndim} axes: "
                f"slice it, as in mesh['cp']."
            )

    def groups(self, axis: DeviceMesh) -> list[str]:
        """Names of the process groups this style talks over; the axis's own first.

        Raises:
            ValueError: nodes that do not divide the axis.
        """
        check_ranks_per_node(type(self).__name__, axis.size(), self.ranks_per_node)
        return [group_name(axis)]

    def apply_whole(self, mixer: nn.Module) -> None:
        """Where one device holds rows whole: pass on what the style says of computing alone."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        kinds = " or ".join(kind.__name__ for kind in self.claims)
        if isinstance(module, ClaimedMixer):
            if module.style is self and module.mesh == device_mesh:
                return module  # that several parents share
            raise TypeError(
                f"{self} takes over an unclaimed {kinds}, got a {type(module).__name__} that "
                f"{module.style} has: name each mixer in one key, and apply a plan once."
            )
        if type(module) not in self.claims:
            raise TypeError(
                f"{self} takes over an unclaimed {kinds}, got a {type(module).__name__}: name the "
                f"mixer itself in the plan."
            )
        module.__class__ = self.claims[cast(type[Mixer], type(module))]
        cast(ClaimedMixer, module).claim(self, device_mesh)
        return module

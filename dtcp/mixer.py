"""The places where tokens meet: what a model calls, and what a plan may take over.

Everything else in a transformer is per token and needs no context parallelism. A mixer has no
parameters and runs on one device as it stands; a style replaces how it is carried out over a mesh
axis, and no other line of the model knows.

A mixer reads `attn_metadata`, what the batch brings: made once per batch on the host, a value for
each kind of mixer. A model takes it as an argument and hands it through.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from itertools import chain
from operator import methodcaller
from types import MethodType
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp._torch.compiler import assert_in_graph
from dtcp._torch.modules import children_of
from dtcp.compile import EagerIsland, island
from dtcp.distributed.groups import connect
from dtcp.metadata import AttentionMetadata, BatchMetadata, MetadataKey, metadata_key
from dtcp.sequence.arguments import check_kind
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.host import on_host
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.memory import Memory

T = TypeVar("T")


class Mixer(nn.Module):
    """A module in which tokens read each other.

    A subclass ends its constructor with `self.set_metadata_key()`.
    """

    style: Any = None
    """The style that has taken the mixer over, once one has."""

    layers: int = 1
    """How many layers it stands for, where one block of a kind stands for all of them."""

    def reads(self) -> tuple[object, ...]:
        """What this mixer's metadata depend on beside the batch: its mask, its width."""
        return ()

    def own_layout(self, layout: SequenceLayout) -> SequenceLayout:
        """The layout its tokens lie in, where the batch's is this one."""
        return layout

    def set_metadata_key(self) -> None:
        """Work out whose metadata this mixer shares: mixers of one type, reading the same."""
        style = () if self.style is None else (self.style,)
        self.metadata_key = metadata_key(type(self), *self.reads(), *style)

    def __setattr__(self, name: str, value: Any) -> None:
        """As of any module; where it changes what the metadata depend on, it changes their key."""
        super().__setattr__(name, value)
        known = vars(self).get("metadata_key")
        if known is None or name == "metadata_key" or torch.compiler.is_compiling():
            return
        self.set_metadata_key()
        if self.metadata_key == known:
            # Graphs know it by identity.
            self.metadata_key = known

    def make_metadata(self, coords: Coords, layout: SequenceLayout | None) -> AttentionMetadata:
        """What this mixer reads of a batch, on this rank.

        Args:
            coords: of the whole rows, in token order.
            layout: how the rows are sharded; None for whole rows.
        """
        if layout is not None and layout.num_shards > 1:
            raise ValueError(
                f"A sequence is sharded only where every mixer is claimed by a plan, got an "
                f"unclaimed {self} with {layout}: add a style for it to the plan."
            )
        return self.whole_row_metadata(coords)

    def whole_row_metadata(self, coords: Coords) -> AttentionMetadata:
        """What this mixer reads of whole rows, on one device."""
        raise NotImplementedError

    def own(self, attn_metadata: BatchMetadata) -> Any:
        """This mixer's metadata among those of a batch."""
        known = isinstance(attn_metadata, BatchMetadata | Mapping)
        if not known or self.metadata_key not in attn_metadata:
            raise ValueError(
                f"A mixer reads the metadata of its batch, got none for {self.metadata_key}: pass "
                f"ShardedBatch.attn_metadata of shard_batch(..., model=model), or "
                f"batch_metadata(model, documents) on one device."
            )
        return attn_metadata[self.metadata_key]

    def forward_without_mixing(self, *args: Any, **kwargs: Any) -> Tensor:
        """The forward if no token read another: of q, k, v the own value, once per query head."""
        q, _, v = args[:3]
        own: Tensor = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
        return own


class ClaimedMixer(Mixer):
    """A mixer that a style has taken over: made by the style, never built directly.

    Subclasses name the mixer they stand for as their second base and write `carry_out`.
    """

    def claim(self, style: Any, mesh: DeviceMesh) -> None:
        """Take the mixer over, on the axis of the sequence or on it and the heads' axis."""
        if mesh.ndim > 2:
            raise ValueError(
                f"{style} is applied on the axis of the sequence, or on it and the heads' axis, "
                f"got a mesh of {mesh.ndim} axes: {mesh}. Slice it: mesh['cp', 'tp']."
            )
        names = mesh.mesh_dim_names
        axis = mesh if mesh.ndim == 1 or names is None else mesh[names[0]]
        self.style, self.mesh, self.axis = style, mesh, axis
        self.rank, self.num_shards = axis.get_local_rank(), axis.size()
        self.groups = style.groups(axis)
        for name in self.groups:
            connect(name)
        self.set_metadata_key()
        if isinstance(style.boundary, EagerIsland):
            self._run_on_island()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the mixer's own: local shards in, local shard out."""
        return self.carry_out(*args, **kwargs)

    def _run_on_island(self) -> None:
        """Leave the graph in the frame of the caller; a branch in forward would leave it later."""
        # A method of this very mixer, so that a copy has its own.
        on_island = MethodType(island(type(self).carry_out), self)
        self.forward = on_island  # type: ignore[method-assign]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A mixer over the same ranks: process groups are the process's and are not copied."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        # Hooks and the like, which nn.Module keeps in dicts, are its own.
        own = {name: copy(x) if isinstance(x, dict) else x for name, x in vars(self).items()}
        copied.__dict__.update(own)
        if isinstance(self.style.boundary, EagerIsland):
            copied._run_on_island()
        return copied

    def __reduce__(self) -> Any:
        raise TypeError(
            f"A mixer that a style has taken over belongs to the ranks of this process, got {self} "
            f"to pickle: save model.state_dict(), and apply the plan to a new model."
        )

    def carry_out(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mixer's forward over the ranks of its axis."""
        raise NotImplementedError

    def make_metadata(self, coords: Coords, layout: SequenceLayout | None) -> AttentionMetadata:
        if layout is None or layout.num_shards != self.num_shards:
            raise ValueError(
                f"A mixer on {self.num_shards} ranks needs a layout of as many shards, got "
                f"layout={layout}: build the batch with shard_batch on the mesh of the plan."
            )
        # Whoever wrote the style, and whether or not it asks.
        self.style.check(self, self.own_layout(layout))
        made: AttentionMetadata = self.style.make_metadata(self, coords, layout, self.rank)
        return made

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, style={self.style}, ranks={self.num_shards}"


def position_ids_of(coords: Coords) -> Tensor:
    """What rotary angles are counted by: [B, S] int32.

    Raises:
        ValueError: position ids on several axes: a mixer that rotates knows one per token.
    """
    return rotated_positions(coords).to(torch.int32)


def rotated_positions(coords: Coords) -> Tensor:
    """`position_ids_of` in the dtype that they were given in, for who reads a few of them."""
    if coords.position_ids is None:
        return coords.token_index - coords.start
    shape, position_ids = (coords.rows, coords.seq_len), coords.position_ids
    if position_ids.ndim == 2 and position_ids.shape[0] == 1:
        position_ids = position_ids.expand(shape[0], -1)
    if position_ids.shape != shape:
        raise ValueError(
            f"A mixer that makes keys where they are read rotates by one position per token, got "
            f"position_ids.shape={tuple(position_ids.shape)}: give [B, S] = {shape}, or [1, S]."
        )
    return position_ids


def check_position_ids(position_ids: Tensor, expected: Tensor, seen: Tensor) -> None:
    """Stop where a model's position ids are not those its batch's metadata were made of.

    Queries and keys would be rotated by positions of two kinds, a wrong answer without a word.

    Args:
        position_ids: [B, L], what the model was called with.
        expected: [B, L], of the batch.
        seen: [B, L] bool, False for padding.
    """
    rows = {len(position_ids), len(expected)} - {1}
    if position_ids.ndim != 2 or position_ids.shape[-1] != expected.shape[-1] or len(rows) > 1:
        raise ValueError(
            f"A mixer that makes keys where they are read rotates by one position per token, got "
            f"position_ids.shape={tuple(position_ids.shape)}: give [B, L] = "
            f"{tuple(expected.shape)}."
        )
    same = ((position_ids == expected) | ~seen).all()
    if type(same) is Tensor and same.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(same):
            raise ValueError(OTHER_POSITIONS)
        return
    assert_in_graph(same, OTHER_POSITIONS)


OTHER_POSITIONS = (
    "A model's position_ids are those of its batch, got others than the metadata were made of: "
    "pass the batch's own, sharded with it (batch['position_ids'] of shard_batch), and give "
    "batch_metadata the same where they do not count a document's tokens."
)


def collect_metadata(
    model: nn.Module,
    coords: Coords,
    layout: SequenceLayout | None = None,
    *,
    real: Tensor | None = None,
) -> BatchMetadata:
    """What the mixers of a model read of a batch: once per kind of mixer, on the host.

    Args:
        real: [B, L] bool, this rank's tokens that are no padding.
    """
    return MixerKinds.of(model).metadata(coords, layout, real=real)


class MixerKinds(NamedTuple):
    """The first mixer of each kind in a model, and what tells that they still are."""

    first: tuple[Mixer, ...]
    mixers: tuple[tuple[Mixer, MetadataKey], ...]
    inside: tuple[Mapping[str, nn.Module | None], ...]
    children: list[nn.Module | None]
    counts: list[int]
    made: dict[Callable[..., Any], Any]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Remembered by the model while its modules have the same children and mixers their keys.

        To look at all modules of a large model takes as long as the metadata of a mask.
        """
        check_kind("Metadata", nn.Module, model=model)
        found = vars(model).get(_FOUND)
        if found is None or not found.hold(model):
            modules = list(model.modules())
            mixers = tuple((x, x.metadata_key) for x in modules if isinstance(x, Mixer))
            first = {key: mixer for mixer, key in reversed(mixers)}
            order = dict.fromkeys(key for _, key in mixers)
            children = [children_of(module) for module in modules]
            # The model's own first, whether it has any or not; leaves get none later on.
            inside = tuple(x for x in children if x or x is children[0])
            kinds = tuple(first[key] for key in order)
            found = cls(kinds, mixers, inside, _values(inside), [*map(len, inside)], {})
            vars(model)[_FOUND] = found
        return found

    def metadata(
        self, coords: Coords, layout: SequenceLayout | None = None, *, real: Tensor | None = None
    ) -> BatchMetadata:
        """`collect_metadata` of the model."""
        made = {mixer.metadata_key: mixer.make_metadata(coords, layout) for mixer in self.first}
        return BatchMetadata(made, real)

    def remembered(self, make: Callable[[Sequence[Mixer]], T]) -> T:
        """What a function makes of all mixers: once, for it depends on their keys alone."""
        if make not in self.made:
            self.made[make] = make([mixer for mixer, _ in self.mixers])
        found: T = self.made[make]
        return found

    def __reduce__(self) -> Any:
        """Neither copied nor saved with its model."""
        return type(None), ()

    def hold(self, model: nn.Module) -> bool:
        """Whether it is what a look at all modules would find."""
        return (
            self.inside[0] is children_of(model)
            and [*map(len, self.inside)] == self.counts
            and _values(self.inside) == self.children
            and all(mixer.metadata_key is key for mixer, key in self.mixers)
        )


def _values(modules: Iterable[Mapping[str, nn.Module | None]]) -> list[nn.Module | None]:
    """The children of all of them, in one list: a model has hundreds."""
    return [*chain.from_iterable(map(methodcaller("values"), modules))]


_FOUND = "kinds_of_mixers"


def mixers_of(model: nn.Module) -> tuple[Mixer, ...]:
    """All mixers of a model, each once."""
    return tuple(mixer for mixer, _ in MixerKinds.of(model).mixers)


@on_host
def batch_metadata(
    model: nn.Module,
    documents: Documents,
    *,
    prefix: Tensor | None = None,
    block: Tensor | None = None,
    position_ids: Tensor | None = None,
    memory: Documents | None = None,
) -> BatchMetadata:
    """The metadata of a batch of whole rows, for a model on one device.

    Args:
        prefix, block: [B, S], what `PrefixLM` and `BlockBidirectional` read.
        position_ids: [B, S], what the model is called with; None where they count a document's
            tokens.
        memory: documents of the sequence that cross attention reads.
    """
    other = None if memory is None else Memory(memory)
    coords = Coords.of(
        documents, prefix=prefix, block=block, position_ids=position_ids, memory=other
    )
    return collect_metadata(model, coords, real=coords.document >= 0)

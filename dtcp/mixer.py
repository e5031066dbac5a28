"""The places where tokens meet: what a model calls, and what a plan may take over.

Everything else in a transformer is per token and needs no context parallelism. A mixer has no
parameters and runs on one device as it stands; a style replaces how it is carried out over a mesh
axis, and no other line of the model knows.

A mixer reads `attn_metadata`, what the batch brings: made once per batch on the host, a value for
each kind of mixer. A model takes it as an argument and hands it through.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtcp.compile import EagerIsland, island
from dtcp.distributed.groups import connect, group_sizes, in_words, members_of
from dtcp.distributed.mesh_views import check_places
from dtcp.metadata import AttentionMetadata, BatchMetadata, MetadataKey, metadata_key
from dtcp.sequence.coords import Coords
from dtcp.sequence.layout import SequenceLayout


class Mixer(nn.Module):
    """A module in which tokens read each other.

    A subclass ends its constructor with `self.set_metadata_key()`.
    """

    style: Any = None
    """The style that has taken the mixer over, once one has."""

    ranks: str = ""
    """Which global ranks the style exchanges with, in words."""

    groups: Sequence[str] = ()
    """Names of the process groups that the style talks over."""

    layers: int = 1
    """How many layers it stands for, where one block of a kind stands for all of them."""

    def reads(self) -> tuple[object, ...]:
        """What this mixer's metadata depend on beside the batch: its mask, its width."""
        return ()

    def own_layout(self, layout: SequenceLayout) -> SequenceLayout:
        """The layout its tokens lie in, where the batch's is this one."""
        return layout

    def check_setting(self, name: str, value: Any) -> None:
        """Refuse what an attribute cannot be, whenever it is set."""

    def set_metadata_key(self) -> None:
        """Work out whose metadata this mixer shares: mixers of one type, reading the same."""
        self.metadata_key = self.key_of(type(self), *self.reads())

    def key_of(self, *parts: object) -> MetadataKey:
        """The key of these parts, carried out by this mixer's style on its ranks."""
        style = () if self.style is None else (self.style,)
        return metadata_key(*parts, *style, ranks=self.ranks)

    def __setattr__(self, name: str, value: Any) -> None:
        """As of any module; where it changes what the metadata depend on, it changes their key."""
        self.check_setting(name, value)
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
        return v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)


class ClaimedMixer(Mixer):
    """A mixer that a style has taken over: made by the style, never built directly.

    Subclasses name the mixer they stand for as their second base and write `carry_out`; or it is
    the mixer's own forward, of which they replace the step that differs.
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
        for name in names or ():
            check_places(mesh, (name,))
        self.style, self.mesh, self.axis = style, mesh, axis
        self.rank, self.num_shards = axis.get_local_rank(), axis.size()
        self.groups = style.groups(axis)
        for name in self.groups:
            connect(name, axis.device_type)
        self.group_sizes = group_sizes(self.groups)
        self.members = [members_of(name) for name in self.groups]
        self.ranks = in_words(dist.get_process_group_ranks(axis.get_group()))
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
        return self.style.make_metadata(self, coords, layout, self.rank)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, style={self.style}, ranks={self.num_shards}"

"""What groups of ranks hold together, and what Ulysses reads of a batch for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dtcp.metadata import AttentionMetadata, HostTensor, no_indices, no_sizes
from dtcp.sequence.layout import Contiguous, SequenceLayout
from dtcp.sequence.partition import Partition


@dataclass(frozen=True, eq=False)
class UlyssesMetadata(AttentionMetadata):
    """What Ulysses reads of a batch, around what the strategy inside reads."""

    order: Tensor  # [n L] int32, joined slots in token order; empty where they are in order
    restore: Tensor  # [n L] int32, the way back; likewise
    outer: AttentionMetadata
    # Of keys of another sequence, [n L]; empty where keys are the queries' own.
    key_order: Tensor = field(default_factory=no_indices)
    key_restore: Tensor = field(default_factory=no_indices)
    # For keys that are made from values: of this rank's own tokens.
    position_ids: Tensor = field(default_factory=no_indices)  # [B, L] int32
    sees: Tensor = field(default_factory=no_indices)  # [B, L] bool, which queries see any key
    # [1], of the axis; empty where one node has them all, or nobody has said.
    ranks_per_node: HostTensor = field(default_factory=no_sizes)

    @classmethod
    def around(
        cls, outer: Callable[[Sequence[Tensor]], AttentionMetadata], tensors: Sequence[Tensor]
    ) -> Self:
        """The way back from `tensors`; `outer` is that of what the strategy inside reads."""
        names = [each.name for each in fields(cls) if each.name != "in_line"]
        before = names.index("outer")
        behind = len(tensors) - (len(names) - before - 1)
        values = (*tensors[:before], outer(tensors[before:behind]), *tensors[behind:])
        named: dict[str, Any] = dict(zip(names, values, strict=True))
        return cls(**named)

    @property
    def neighbours(self) -> int:
        """Ranks that share a node; 0 where one node has them all, or nobody has said."""
        return int(self.ranks_per_node.sum())

    @property
    def num_keys(self) -> int:
        """Keys of another sequence, which travel by themselves; 0: they are the queries' own."""
        return self.key_order.numel()

    @property
    def order_of_keys(self) -> Tensor:
        return self.key_order if self.num_keys else self.order

    @property
    def restore_of_keys(self) -> Tensor:
        return self.key_restore if self.num_keys else self.restore


@dataclass(frozen=True)
class Ascending(SequenceLayout):
    """What groups of neighbouring ranks of another layout hold together, in ascending order."""

    of: SequenceLayout = field(kw_only=True)

    def runs(self, rank: int) -> list[tuple[int, int]]:
        return self.partition.runs(rank)

    @cached_property
    def partition(self) -> Partition:
        each, whole = self.of.num_shards // self.num_shards, self.of.partition
        return Partition.ascending(whole.start, whole.owner // each, self.seq_len)


def joined(layout: SequenceLayout, num_shards: int) -> SequenceLayout:
    """What `num_shards` groups of neighbouring ranks hold together, in ascending order."""
    return Ascending(layout.seq_len, num_shards, of=layout)


def _reorder_indices(layout: SequenceLayout, num_shards: int, shard: int) -> tuple[Tensor, Tensor]:
    """Slots of a joined shard in ascending position, and the way back; empty if they ascend.

    Whether they do is a matter of the kind of layout: the graph is the same for every batch.
    """
    if num_shards == layout.num_shards or isinstance(layout, Contiguous):
        nothing = torch.zeros(0, dtype=torch.int32)
        return nothing, nothing.clone()
    return _in_order(layout, num_shards, shard)


def _in_order(layout: SequenceLayout, num_shards: int, shard: int) -> tuple[Tensor, Tensor]:
    """The same, whether they ascend or not; to sort them takes ten times as long."""
    each = layout.num_shards // num_shards
    ranks = range(shard * each, (shard + 1) * each)
    held = np.concatenate([layout.partition.tokens(rank) for rank in ranks])
    here = np.zeros(layout.seq_len, dtype=np.int32)
    here[held] = 1
    restore = here.cumsum(dtype=np.int32)[held] - 1
    order = np.empty_like(restore)
    order[restore] = np.arange(len(restore), dtype=np.int32)
    return torch.from_numpy(order), torch.from_numpy(restore)


def ulysses_metadata(
    layout: SequenceLayout,
    keys: SequenceLayout | None,
    outer: AttentionMetadata,
    *,
    num_shards: int,
    shard: int,
    ranks_per_node: int = 0,
) -> UlyssesMetadata:
    """Of one of `num_shards` groups of ranks.

    Args:
        keys: the layout of the keys' sequence, where that is another one.
        outer: what the strategy between the groups reads.
        ranks_per_node: neighbours that share a node; 0: nobody has said.
    """
    order, restore = _reorder_indices(layout, num_shards, shard)
    nodes = torch.full((int(1 < ranks_per_node < layout.num_shards),), ranks_per_node)
    own = UlyssesMetadata(order=order, restore=restore, outer=outer, ranks_per_node=nodes)
    if keys is None:
        return own
    order, restore = _in_order(keys, num_shards, shard)
    return replace(own, key_order=order, key_restore=restore)

"""Attention on packed rows without a batch dim (THD), by documents, across all shards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.groups import group_sizes
from dtcp.kernels.softmax.api import SoftmaxParams
from dtcp.metadata import AttentionMetadata
from dtcp.sequence.arguments import FLOATS, check_batch, check_tensor
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import PADDING, Documents
from dtcp.sequence.host import on_host
from dtcp.sequence.masks import Causal, Mask
from dtcp.softmax.inputs import AttentionInputs
from dtcp.softmax.local import ATTENTION
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.softmax.op import AttentionOp
from dtcp.softmax.ring import RingAttention
from dtcp.softmax.style import AttentionStyle
from dtcp.thd import THDBatch, read_bounds, thd_layout


@dataclass(frozen=True)
class PackedAttention:
    """Attention on a THD batch: each document by itself, across all shards.

    Built on the host once per batch; then a function of tensors, traced as one op. Padding sees
    nothing, is seen by nothing, and its output is zero.

    Args:
        metadata: what the op reads.
        groups: names of the process groups it talks over; none on one device.
        softmax: what scores become weights by, given their scale.
    """

    op: AttentionOp
    metadata: AttentionMetadata
    groups: tuple[str, ...] = ()
    softmax: Callable[[float], SoftmaxParams] = SoftmaxParams
    group_sizes: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "group_sizes", tuple(group_sizes(self.groups)))

    @classmethod
    @on_host
    def of(
        cls,
        batch: THDBatch,
        axis: DeviceMesh | None = None,
        *,
        mask: Mask | None = None,
        style: AttentionStyle | None = None,
    ) -> "PackedAttention":
        """Read the boundaries of a batch of `to_thd`, sharded over the axis or, without, whole.

        Args:
            mask: within a document; None for Causal().
            style: the strategy, in the graph; None for RingAttention().
        """
        mask, style = mask or Causal(), style or RingAttention()
        style.check_in_graph("PackedAttention")
        check_batch("A THD batch", batch, "cu_seqlens", "cu_seqlens_padded")
        real, padded = (read_bounds(key, batch[key]) for key in ("cu_seqlens", "cu_seqlens_padded"))
        lengths, slots = ([b - a for a, b in pairwise(x)] for x in (real, padded))
        if len(lengths) != len(slots) or any(a > b for a, b in zip(lengths, slots, strict=True)):
            raise ValueError(
                f"Documents fit their slots, got cu_seqlens={real}, cu_seqlens_padded={padded}: "
                f"take both from to_thd."
            )
        coords = _coords(list(zip(lengths, slots, strict=True)))
        mixer, device = SoftmaxAttention(mask), batch["cu_seqlens"].device
        if axis is None:
            metadata = mixer.make_metadata(coords, None).to(device)
            return cls(ATTENTION, metadata, softmax=style.softmax_params(1))
        layout = thd_layout(padded, padded[-1], axis.size())
        metadata = style.make_metadata(mixer, coords, layout, axis.get_local_rank())
        softmax = style.softmax_params(axis.size())
        return cls(style.op, metadata.to(device), tuple(style.groups(axis)), softmax)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Attend: q [T, H, D], k [T, G, D], v [T, G, V] of this rank's tokens -> [T, H, V]."""
        shape = "[T, heads, width]"
        check_tensor("Attention on THD", shape=shape, ndim=3, dtypes=FLOATS, q=q, k=k, v=v)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        x, softmax = AttentionInputs(q[None], k[None], v[None]), self.softmax(scale)
        sizes = self.group_sizes
        return self.op(x, self.metadata, softmax, groups=self.groups, group_sizes=sizes)[0]


def _coords(slots: Sequence[tuple[int, int]]) -> Coords:
    """Coordinates of one row of slots: what is behind a document in its slot is padding."""
    parts = [length for real, slot in slots for length in (real, slot - real)]
    documents = Documents((tuple(x for x in parts if x),), sum(parts))
    real = torch.tensor([True, False]).repeat(len(slots)).repeat_interleave(torch.tensor(parts))
    coords = Coords.of(documents)
    # Not coordinates of whole documents: padding stands between them.
    document = torch.where(real, coords.document, PADDING)
    return Coords(coords.token_index, document, coords.start, coords.end)

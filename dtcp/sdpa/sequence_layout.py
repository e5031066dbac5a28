"""A context in which F.scaled_dot_product_attention knows the layout of sharded sequences.

It sees the call before autograd and puts our op in its place, so backward needs no context, and
a model that kept torch's function under a name of its own is served like any other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.overrides import TorchFunctionMode

from dtcp.distributed.groups import group_sizes
from dtcp.metadata import AttentionMetadata
from dtcp.sdpa.arguments import SDPA_HEADS, SDPA_SEQ, check_arguments
from dtcp.sdpa.multi_head import MULTI_HEAD_ATTENTION, attend_by_heads
from dtcp.sequence.arguments import check_kind
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.host import on_host
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.masks import Bidirectional, Causal
from dtcp.softmax.dtensor import install_attention_rules
from dtcp.softmax.inputs import AttentionInputs
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.softmax.ring import RingAttention
from dtcp.softmax.style import AttentionStyle

NAMES_OF_ATTENTION = (
    "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "_cudnn_attention_forward",
    "_triton_scaled_dot_attention",
    "_triton_multi_head_attention",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
)


def _forms(name: str) -> Iterator[Any]:
    """An op as it may be called: all overloads, one of them, or torch's function."""
    if packet := getattr(torch.ops.aten, name, None):  # not in every torch
        yield packet
        yield from (getattr(packet, overload) for overload in packet.overloads())
    if function := getattr(torch, name, None):
        yield function


OPS_OF_ATTENTION = frozenset(form for name in NAMES_OF_ATTENTION for form in _forms(name))
"""torch's own, which know no layouts. A set, for dynamo reads no names of functions (2.13)."""


class sequence_layout(TorchFunctionMode):
    """Inside, sequence-sharded DTensors hold `layout`: their attention is context-parallel.

    Args:
        layout: of the sequence, over the ranks of `axis`.
        axis: the 1-D mesh the sequence is sharded on.
        documents: packed in each row, the same in all rows; None for one document per row.
        style: the strategy, in the graph; None for RingAttention().
        device: where the tensors are.
    Raises:
        ValueError: a layout for another number of ranks; inside, a call that cannot be honoured.

    Example::
        with sequence_layout(HeadTail(seq_len, mesh.cp.size()), mesh.cp):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # DTensors
    """

    @on_host
    def __init__(
        self,
        layout: SequenceLayout,
        axis: DeviceMesh,
        *,
        documents: Documents | None = None,
        style: AttentionStyle | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        check_kind("A sequence_layout", SequenceLayout, layout=layout)
        check_kind("A sequence_layout", DeviceMesh, axis=axis)
        check_kind("A sequence_layout", (AttentionStyle, type(None)), style=style)
        if layout.num_shards != axis.size():
            raise ValueError(
                f"A layout has a shard for each rank of its axis, got {layout} on "
                f"{axis.size()} ranks: build it with num_shards={axis.size()}."
            )
        style = RingAttention() if style is None else style
        style.check_in_graph(f"Attention inside {type(self).__name__}")
        coords = Coords.of(documents or Documents.single(1, layout.seq_len))
        rank = axis.get_local_rank()
        self.metadata: Mapping[bool, AttentionMetadata] = {
            causal: style.make_metadata(SoftmaxAttention(mask), coords, layout, rank).to(device)
            for causal, mask in ((True, Causal()), (False, Bidirectional()))
        }
        self.op, self.groups = style.op, style.groups(axis)
        self.group_sizes = group_sizes(self.groups)
        self.softmax = style.softmax_params(axis.size())
        self.layout = layout
        install_attention_rules(style.op)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            if self._is_sharded(query):
                return self._attend(*args, **kwargs)
        if func is MULTI_HEAD_ATTENTION and self._is_sharded(args[0], seq_dim=0):
            return attend_by_heads(self._attend, *args, **kwargs)
        if func in OPS_OF_ATTENTION:
            for x in (*args, *kwargs.values()):
                if isinstance(x, Tensor) and self._is_sharded(x):
                    raise sees_shard(func.__name__)
        return func(*args, **kwargs)

    def _is_sharded(self, query: Tensor, seq_dim: int = SDPA_SEQ) -> bool:
        return isinstance(query, DTensor) and Shard(seq_dim) in query.placements

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        self._check(query, key, value, attn_mask, dropout_p, enable_gqa)
        q, k, v = (x.transpose(SDPA_HEADS, SDPA_SEQ) for x in (query, key, value))
        out = self._carry_out(q, k, v, is_causal=is_causal, scale=scale)
        return out.transpose(SDPA_HEADS, SDPA_SEQ)

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        enable_gqa: bool,
    ) -> None:
        """Refuse a call that is not carried out over the whole sequence; all are DTensors."""
        check_arguments(cast(DTensor, query), key, value, attn_mask, dropout_p)
        heads, kv_heads = query.shape[SDPA_HEADS], key.shape[SDPA_HEADS]
        if heads != kv_heads and not enable_gqa:
            raise ValueError(
                f"Attention with fewer kv heads asks for enable_gqa=True, got heads={heads}, "
                f"kv_heads={kv_heads}: set it, or repeat the kv heads."
            )
        if query.shape[SDPA_SEQ] != self.layout.seq_len:
            raise ValueError(
                f"Inside sequence_layout a sequence is as long as the layout, got "
                f"seq_len={query.shape[SDPA_SEQ]} with {self.layout}: leave the context first."
            )

    def _carry_out(
        self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float | None
    ) -> Tensor:
        """Attention of DTensors [B, S, H, D]."""
        softmax = self.softmax(q.shape[-1] ** -0.5 if scale is None else scale)
        metadata, sizes = self.metadata[is_causal], self.group_sizes
        x = AttentionInputs(q, k, v)
        return self.op(x, metadata, softmax, groups=self.groups, group_sizes=sizes)


def sees_shard(function: str) -> ValueError:
    """What a context says of attention that it cannot carry out."""
    return ValueError(
        f"Attention in this context is F.scaled_dot_product_attention's, got {function}, which "
        f"would see this rank's tokens alone: call that function, or use SoftmaxAttention with a "
        f"Mask."
    )

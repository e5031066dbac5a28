"""F.scaled_dot_product_attention on DTensors whose sequence is sharded.

Two ways in, and no third that would be silently local:

* A bare call. A DTensor sharded on its sequence holds contiguous chunks, so torch's fused
  kernels, forward and backward, become ring attention on the axis that holds the sequence.
* A call inside `sequence_layout(layout, axis)`, which says that the shards hold another layout
  (or packed documents). It sees the call before autograd and puts our op in its place, so
  backward needs no context, and a model that kept torch's function under a name of its own is
  served like any other.

What cannot be honoured raises: masks as tensors, dropout, cross-attention, mixed placements.
One case torch decides before any rule is asked: a bare call that no fused kernel takes (value
dim unlike key dim, dropout on CPU) becomes plain maths on DTensors, which gathers the sequence:
slow, and right; or, if it is causal, an error of torch's own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.overrides import TorchFunctionMode

from dtcp.distributed.collectives import axis_group_name, group_of
from dtcp.distributed.dtensor_rules import handle
from dtcp.kernels.softmax.api import SoftmaxParams
from dtcp.metadata import AttentionMetadata
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, SequenceLayout
from dtcp.sequence.masks import (
    Bidirectional,
    Causal,
    Coords,
    Mask,
)
from dtcp.softmax.dtensor import install
from dtcp.softmax.metadata import KeyExchangeMetadata, ring_metadata
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.softmax.op import (
    AttentionInputs,
    AttentionOp,
    BackwardArguments,
    ForwardResult,
    OpContext,
    Strategy,
)
from dtcp.softmax.ring import RING, RingAttention
from dtcp.softmax.style import AttentionStyle

SDPA_HEADS, SDPA_SEQ = 1, 2  # dims of torch's [B, H, L, D]


class _ContiguousRows:
    """A strategy on contiguous shards of one document a row; it makes its own tables."""

    keeps_own_form = False
    takes_values_only = False

    def __init__(self, strategy: Strategy, mask: Mask) -> None:
        self.strategy, self.mask = strategy, mask

    def forward(self, x: AttentionInputs, context: OpContext) -> ForwardResult:
        return self.strategy.forward(x, self._with_metadata(x.q, context))

    def backward(
        self, grad_out: Tensor, x: AttentionInputs, result: ForwardResult, context: OpContext
    ) -> AttentionInputs:
        return self.strategy.backward(grad_out, x, result, self._with_metadata(x.q, context))

    def saved_like(self, x: AttentionInputs, groups: Sequence[str]) -> list[Tensor]:
        return self.strategy.saved_like(x, groups)

    def _with_metadata(self, q: Tensor, context: OpContext) -> OpContext:
        group = group_of(context.groups[0])
        n, rank = dist.get_world_size(group), dist.get_rank(group)
        metadata = _contiguous_metadata(self.mask, q.shape[1] * n, n, rank, q.device)
        return replace(context, metadata=metadata.tensors())


CAUSAL = AttentionOp("causal_sdpa", _ContiguousRows(RING.strategy, Causal()), communicates=True)
BIDIRECTIONAL = AttentionOp(
    "bidirectional_sdpa", _ContiguousRows(RING.strategy, Bidirectional()), communicates=True
)


def install_sdpa_rules() -> None:
    """Teach DTensor the fused attention kernels of torch. Twice is once; plain tensors never
    notice. Without it a sequence-sharded call raises in torch, or gathers the sequence."""
    for forward, backward, extra in _KERNELS:
        handle(forward, _forward_rule(extra))
        handle(backward, _backward)


class sequence_layout(TorchFunctionMode):
    """Inside, sequence-sharded DTensors hold `layout`: their attention is context-parallel.

    Args:
        layout: of the sequence, over the ranks of `axis`.
        axis: the 1-D mesh the sequence is sharded on.
        documents: packed in each row, the same in all rows; None for one document.
        style: the strategy.

    Example::
        with sequence_layout(HeadTail(seq_len, mesh.cp.size()), mesh.cp):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # DTensors
    """

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
        if layout.num_shards != axis.size():
            raise ValueError(
                f"A layout has a shard for each rank of its axis, got {layout} on "
                f"{axis.size()} ranks: build it with num_shards={axis.size()}."
            )
        style = RingAttention() if style is None else style
        coords = Coords.of(documents or Documents.single(1, layout.seq_len))
        rank = axis.get_local_rank()
        self.metadata: Mapping[bool, AttentionMetadata] = {
            causal: style.make_metadata(SoftmaxAttention(mask), coords, layout, rank).to(device)
            for causal, mask in ((True, Causal()), (False, Bidirectional()))
        }
        self.op, self.groups = style.op, style.groups(axis)
        self.layout = layout
        install(style.op)

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
        return func(*args, **kwargs)

    def _is_sharded(self, query: Tensor) -> bool:
        return isinstance(query, DTensor) and Shard(SDPA_SEQ) in query.placements

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
        _check(query, key, value, attn_mask, dropout_p)
        heads, kv_heads = query.shape[SDPA_HEADS], key.shape[SDPA_HEADS]
        if heads != kv_heads and not enable_gqa:
            raise ValueError(
                f"Attention with fewer kv heads asks for enable_gqa=True, got heads={heads}, "
                f"kv_heads={kv_heads}: set it, or repeat the kv heads."
            )
        if query.shape[SDPA_SEQ] != self.layout.seq_len:
            raise ValueError(
                f"Inside sequence_layout sequences are its own, got "
                f"seq_len={query.shape[SDPA_SEQ]} with {self.layout}: leave the context first."
            )
        q, k, v = (x.transpose(SDPA_HEADS, SDPA_SEQ) for x in (query, key, value))
        softmax = SoftmaxParams(query.shape[-1] ** -0.5 if scale is None else scale)
        x = AttentionInputs(q, k, v)
        out = self.op(x, self.metadata[is_causal], softmax, groups=self.groups)
        return out.transpose(SDPA_HEADS, SDPA_SEQ)


@lru_cache(maxsize=32)
def _contiguous_metadata(
    mask: Mask, seq_len: int, num_shards: int, rank: int, device: torch.device
) -> KeyExchangeMetadata:
    coords = Coords.of(Documents.single(1, seq_len))
    layout = Contiguous(seq_len, num_shards)
    return ring_metadata(layout, rank, mask.intervals(coords)).to(device)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> None:
    """Refuse what no rule honours; q is a DTensor."""
    q = cast(DTensor, q)
    if mask is not None:
        raise ValueError(
            f"Attention on a sharded sequence takes no mask as a tensor, got "
            f"attn_mask.shape={tuple(mask.shape)}: use is_causal, or SoftmaxAttention with a Mask."
        )
    if dropout_p != 0.0:
        raise ValueError(
            f"Attention on a sharded sequence has no dropout, whose pattern would depend on the "
            f"mesh, got dropout_p={dropout_p}: set it to 0."
        )
    for x in (k, v):
        if not isinstance(x, DTensor) or x.placements != q.placements:
            raise ValueError(
                f"Attention takes q, k and v sharded alike, got {q.placements} and "
                f"{getattr(x, 'placements', 'a plain tensor')}: redistribute them."
            )
    if q.shape[SDPA_SEQ] != k.shape[SDPA_SEQ] or k.shape[SDPA_SEQ] != v.shape[SDPA_SEQ]:
        raise ValueError(
            f"Attention on a sharded sequence is self-attention, got {q.shape[SDPA_SEQ]} queries "
            f"and {k.shape[SDPA_SEQ]} keys: keep cross-attention's keys unsharded and local."
        )
    sizes = [q.device_mesh.size(i) for i, p in enumerate(q.placements) if p == Shard(SDPA_SEQ)]
    if len(sizes) > 1 or q.shape[SDPA_SEQ] % sizes[0]:
        raise ValueError(
            f"The sequence is sharded on one axis that divides it, got "
            f"seq_len={q.shape[SDPA_SEQ]} on axes of {sizes} ranks: pad it, or shard it on one."
        )


def _rule_inputs(q: Any, k: Any, v: Any, mask: Tensor | None, dropout_p: float) -> list[str] | None:
    """The group of the axis that holds the sequence; None where no axis does."""
    if isinstance(q, DTensor) and Shard(SDPA_SEQ) in q.placements:
        _check(q, k, v, mask, dropout_p)
        index = q.placements.index(Shard(SDPA_SEQ))
        return [axis_group_name(q.device_mesh, index)]
    tensors = [x for x in (q, k, v) if isinstance(x, DTensor)]
    fine = (Replicate(), Shard(0), Shard(SDPA_HEADS))
    if len(tensors) < 3 or any(
        x.placements != tensors[0].placements or any(p not in fine for p in x.placements)
        for x in tensors
    ):
        raise ValueError(
            f"Attention takes q, k and v sharded alike, on batch, heads or sequence, got "
            f"{[getattr(x, 'placements', 'a plain tensor') for x in (q, k, v)]}: redistribute them."
        )
    return None


Extra = Callable[[Tensor], tuple[Any, ...]]


def _forward_rule(extra: Extra) -> Callable[..., Any]:
    def rule(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _named(op, args, kwargs)
        q, k, v = call["query"], call["key"], call["value"]
        mask = call.get("attn_mask", call.get("attn_bias"))
        groups = _rule_inputs(q, k, v, mask, call.get("dropout_p", 0.0))
        if groups is None:
            return _on_local(op, args, kwargs, q)
        ours = CAUSAL if call.get("is_causal", False) else BIDIRECTIONAL
        x = AttentionInputs(*(_to_ours(x) for x in (q, k, v)))
        out, (lse,) = ours.forward(*x, [], _scale(call, q), 0.0, groups)
        return (_to_torch(out, q), _to_torch(lse, q), *extra(out))

    return rule


def _backward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _named(op, args, kwargs)
    q, k, v, out = call["query"], call["key"], call["value"], call["out"]
    lse = call["logsumexp"]
    grad = call["grad_out_" if "grad_out_" in call else "grad_out"]
    mask = call.get("attn_mask", call.get("attn_bias"))
    groups = _rule_inputs(q, k, v, mask, call.get("dropout_p", 0.0))
    if groups is None:
        return _on_local(op, args, kwargs, q)
    if grad.placements != q.placements:
        grad = grad.redistribute(q.device_mesh, q.placements)
    ours: AttentionOp = CAUSAL if call.get("is_causal", False) else BIDIRECTIONAL
    x = AttentionInputs(*(_to_ours(x) for x in (q, k, v)))
    arguments = BackwardArguments(
        _to_ours(grad),
        *x,
        out=_to_ours(out),
        saved=[_to_ours(lse)],
        metadata=[],
        kv_heads=x.v.shape[2],
        scale=_scale(call, q),
        softcap=0.0,
        groups=groups,
    )
    grads = ours.backward(*arguments)[:3]
    none = [None] * (len(op._schema.returns) - 3)
    return (*(_to_torch(x, q) for x in grads), *none)


def _named(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name: the kernels order them differently."""
    names = [argument.name for argument in op._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _scale(call: Mapping[str, Any], q: Tensor) -> float:
    scale = call.get("scale")
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _to_ours(x: DTensor) -> Tensor:
    """Local [B, H, L, ...] -> [B, L, H, ...]."""
    return x._local_tensor.transpose(SDPA_HEADS, SDPA_SEQ)


def _to_torch(x: Tensor, like: DTensor) -> DTensor:
    local = x.transpose(1, 2)
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False)


def _on_local(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: DTensor) -> Any:
    """Batch and heads are independent: the kernel runs on the local part as it is."""
    take = lambda x: x._local_tensor if isinstance(x, DTensor) else x  # noqa: E731
    results = op(*map(take, args), **{key: take(x) for key, x in kwargs.items()})
    wrap = [isinstance(x, Tensor) and x.ndim >= 3 for x in results]
    return tuple(
        DTensor.from_local(x, like.device_mesh, like.placements, run_check=False) if w else x
        for x, w in zip(results, wrap, strict=True)
    )


def _nothing(out: Tensor) -> tuple[Any, ...]:
    return ()


def _seed(out: Tensor) -> Tensor:
    return out.new_zeros((), dtype=torch.int64)


def _flash_extra(out: Tensor) -> tuple[Any, ...]:
    """cum_seq_q, cum_seq_k, max_q, max_k, rng_state, unused, debug_attn_mask: none is read."""
    return (None, None, out.shape[1], out.shape[1], _seed(out), _seed(out), out.new_zeros(0))


def _efficient_extra(out: Tensor) -> tuple[Any, ...]:
    return (_seed(out), _seed(out))


_ATEN = torch.ops.aten
_KERNELS = (
    (
        _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
        _nothing,
    ),
    (
        _ATEN._scaled_dot_product_flash_attention.default,
        _ATEN._scaled_dot_product_flash_attention_backward.default,
        _flash_extra,
    ),
    (
        _ATEN._scaled_dot_product_efficient_attention.default,
        _ATEN._scaled_dot_product_efficient_attention_backward.default,
        _efficient_extra,
    ),
    (
        _ATEN._scaled_dot_product_cudnn_attention.default,
        _ATEN._scaled_dot_product_cudnn_attention_backward.default,
        _flash_extra,
    ),
)

"""A bare F.scaled_dot_product_attention on DTensors whose sequence is sharded.

A DTensor sharded on its sequence holds contiguous chunks, so torch's fused kernels, forward and
backward, become ring attention on the axis that holds the sequence. For other layouts, and for
packed documents, there is `sequence_layout`; there is no third way, which would silently attend
to the shard alone.

What cannot be honoured raises: masks as tensors, dropout, cross-attention, mixed placements. One
case torch decides before any rule is asked: a call that no fused kernel takes (values of another
width than keys, dropout on the CPU) becomes plain maths on DTensors, which gathers the sequence:
slow, and right; or, if it is causal, an error of torch's own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from dtcp._torch.dtensor import set_dtensor_rule
from dtcp._torch.ops import OpOverload, num_results
from dtcp.distributed.dtensor_rules import bind, to_local, wrap
from dtcp.distributed.groups import axis_group_name, group_of, group_sizes
from dtcp.distributed.moves import Moves
from dtcp.metadata import NoMetadata
from dtcp.sdpa.arguments import SDPA_HEADS, SDPA_SEQ, check_arguments
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.host import on_host
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import Contiguous
from dtcp.sequence.masks import Bidirectional, Causal, Mask
from dtcp.softmax.inputs import AttentionInputs
from dtcp.softmax.metadata import KeyExchangeMetadata, ring_metadata
from dtcp.softmax.moves import AttentionShape, Peers
from dtcp.softmax.op import AttentionOp, BackwardArguments, ForwardArguments
from dtcp.softmax.ring import RING
from dtcp.softmax.strategy import ForwardResult, OpContext


class _ContiguousRows:
    """A ring on contiguous shards of one document per row; it makes its own metadata."""

    keeps_own_form = False
    takes_values_only = False
    takes_latents = False

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    def metadata_of(self, tensors: Sequence[Tensor]) -> NoMetadata:
        return NoMetadata()

    def forward(self, x: AttentionInputs, context: OpContext) -> ForwardResult:
        return RING.strategy.forward(x, self._with_metadata(x.q, context))

    def backward(
        self, grad_out: Tensor, x: AttentionInputs, result: ForwardResult, context: OpContext
    ) -> AttentionInputs:
        return RING.strategy.backward(grad_out, x, result, self._with_metadata(x.q, context))

    def saved_like(
        self, x: AttentionInputs, metadata: NoMetadata, group_sizes: Sequence[int]
    ) -> list[Tensor]:
        return RING.strategy.saved_like(x, metadata, group_sizes)

    def moves(
        self, shape: AttentionShape, length: int, metadata: NoMetadata, peers: Peers
    ) -> Moves:
        n, rank = peers.num_ranks, peers.rank
        own = _contiguous_metadata(self.mask, n * length, n, rank, torch.device("cpu"))
        return RING.strategy.moves(shape, length, own, peers)

    def _with_metadata(self, q: Tensor, context: OpContext) -> OpContext:
        group = group_of(context.groups[0])
        n, rank = dist.get_world_size(group), dist.get_rank(group)
        metadata = _contiguous_metadata(self.mask, q.shape[1] * n, n, rank, q.device)
        return replace(context, metadata=metadata)


@lru_cache(maxsize=32)
@on_host
def _contiguous_metadata(
    mask: Mask, seq_len: int, num_shards: int, rank: int, device: torch.device
) -> KeyExchangeMetadata:
    coords = Coords.of(Documents.single(1, seq_len))
    layout = Contiguous(seq_len, num_shards)
    return ring_metadata(layout, rank, KeyIntervals.of(mask, coords)).to(device)


CAUSAL = AttentionOp("causal_sdpa", _ContiguousRows(Causal()), communicates=True)
BIDIRECTIONAL = AttentionOp(
    "bidirectional_sdpa", _ContiguousRows(Bidirectional()), communicates=True
)


def install_sdpa_rules() -> None:
    """Teach DTensor torch's fused attention kernels. Installing twice is installing once.

    Plain tensors never notice. Without it a sequence-sharded call raises in torch, or gathers
    the sequence.
    """
    for forward, backward, results_not_read in _KERNELS:
        set_dtensor_rule(forward, _forward_rule(results_not_read))
        set_dtensor_rule(backward, _backward_rule)


Arguments = Mapping[str, Any]
ResultsNotRead = Callable[[Tensor], tuple[Any, ...]]
"""What a kernel returns after out and lse, for its backward alone, given out."""


def _forward_rule(results_not_read: ResultsNotRead) -> Callable[..., Any]:
    def rule(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = bind(op, args, kwargs)
        q = call["query"]
        groups = _sequence_group(call)
        if groups is None:
            return _on_local(op, call)
        x = AttentionInputs(*(_ours(call[name]) for name in ("query", "key", "value")))
        arguments = ForwardArguments(
            *x,
            metadata=[],
            scale=_scale(call),
            softcap=0.0,
            groups=groups,
            group_sizes=group_sizes(groups),
        )
        out, (lse,) = _op(call).forward(*arguments)
        return (*_torchs((out, lse), (q, q)), *results_not_read(out))

    return rule


def _backward_rule(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = bind(op, args, kwargs)
    q = call["query"]
    groups = _sequence_group(call)
    if groups is None:
        return _on_local(op, call)
    grad = call["grad_out_" if "grad_out_" in call else "grad_out"]
    if grad.placements != q.placements:
        grad = grad.redistribute(q.device_mesh, q.placements)
    x = AttentionInputs(*(_ours(call[name]) for name in ("query", "key", "value")))
    arguments = BackwardArguments(
        _ours(grad),
        *x,
        out=_ours(call["out"]),
        saved=[_ours(call["logsumexp"])],
        metadata=[],
        kv_heads=x.v.shape[2],
        scale=_scale(call),
        softcap=0.0,
        groups=groups,
    )
    grads = _op(call).backward(*arguments)[:3]
    # Of a bias and the like, which nobody gave.
    no_grads = [None] * (num_results(op) - len(grads))
    inputs = [call[name] for name in ("query", "key", "value")]
    return (*_torchs(grads, inputs), *no_grads)


def _sequence_group(call: Arguments) -> list[str] | None:
    """The group of the axis that holds the sequence; None where the sequence is whole."""
    q, k, v = call["query"], call["key"], call["value"]
    if isinstance(q, DTensor) and Shard(SDPA_SEQ) in q.placements:
        mask = call.get("attn_mask", call.get("attn_bias"))
        check_arguments(q, k, v, mask, call.get("dropout_p", 0.0))
        index = q.placements.index(Shard(SDPA_SEQ))
        return [axis_group_name(q.device_mesh, index)]
    tensors = [x for x in (q, k, v) if isinstance(x, DTensor)]
    independent = (Replicate(), Shard(0), Shard(SDPA_HEADS))
    if len(tensors) < 3 or any(
        x.placements != tensors[0].placements or any(p not in independent for p in x.placements)
        for x in tensors
    ):
        raise ValueError(
            f"Attention takes q, k and v sharded alike, on batch, heads or sequence, got "
            f"{[getattr(x, 'placements', 'a plain tensor') for x in (q, k, v)]}: redistribute them."
        )
    return None


def _op(call: Arguments) -> AttentionOp:
    return CAUSAL if call.get("is_causal", False) else BIDIRECTIONAL


def _scale(call: Arguments) -> float:
    scale = call.get("scale")
    return call["query"].shape[-1] ** -0.5 if scale is None else float(scale)


def _ours(x: DTensor) -> Tensor:
    """[B, H, L, ...] -> its shard as [B, L, H, ...]."""
    return to_local(x).transpose(SDPA_HEADS, SDPA_SEQ)


def _torchs(shards: Iterable[Tensor], like: Iterable[DTensor]) -> list[DTensor]:
    """Shards [B, L, H, ...] -> [B, H, L, ...]."""
    return [_wrapped(x.transpose(1, 2), of) for x, of in zip(shards, like, strict=True)]


def _on_local(op: OpOverload, call: Arguments) -> tuple[Any, ...]:
    """Batch and heads are independent: the kernel runs on the shards as it is."""
    results = op(**to_local(call))
    q = call["query"]
    # Of a backward kernel the gradients of all three, of a forward one out and lse.
    likes = [q, call["key"], call["value"]] if "out" in call else [q, q]
    likes += [q] * (len(results) - len(likes))
    return tuple(
        _wrapped(x, like) if isinstance(x, Tensor) and x.ndim >= 3 else x
        for x, like in zip(results, likes, strict=True)
    )


def _wrapped(local: Tensor, like: DTensor) -> DTensor:
    """A shard placed as another DTensor is, whose ranks may have unequal shares of a dim."""
    mesh, placements = like.device_mesh, like.placements
    cut = [(p.dim, mesh.size(i)) for i, p in enumerate(placements) if isinstance(p, Shard)]
    if all(like.shape[dim] % size == 0 for dim, size in cut):
        return wrap(local, like)
    whole = list(local.shape)
    for dim, _ in cut:
        whole[dim] = like.shape[dim]
    # Its strides are those of one that is contiguous.
    meta = torch.empty(whole, device="meta")
    local = local.contiguous()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=meta.shape, stride=meta.stride()
    )


def _no_results(out: Tensor) -> tuple[Any, ...]:
    return ()


def _seed(out: Tensor) -> Tensor:
    return out.new_zeros((), dtype=torch.int64)


def _flash_results(out: Tensor) -> tuple[Any, ...]:
    """cum_seq_q, cum_seq_k, max_q, max_k, rng_state, unused, debug_attn_mask."""
    return (None, None, out.shape[1], out.shape[1], _seed(out), _seed(out), out.new_zeros(0))


def _efficient_results(out: Tensor) -> tuple[Any, ...]:
    """philox_seed, philox_offset."""
    return (_seed(out), _seed(out))


_KERNELS = (
    (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        _no_results,
    ),
    (
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_backward.default,
        _flash_results,
    ),
    (
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention_backward.default,
        _efficient_results,
    ),
    (
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default,
        _flash_results,
    ),
)

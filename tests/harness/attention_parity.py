"""One attention on a mesh of ranks, compared with the same attention on one device.

A case alone determines its random inputs, so every rank knows all inputs and the whole truth. Each
rank computes on its shards, and its output and gradients must be the truth's shards.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import ParallelMesh
from dtcp.metadata import BatchMetadata
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.masks import (
    AttentionChunks,
    Bidirectional,
    BlockBidirectional,
    Causal,
    Mask,
    SlidingWindow,
)
from dtcp.sequence.per_document import PerDocument
from dtcp.sequence.prefix_masks import FirstTokens, Prefix, PrefixLM
from dtcp.sharded_batch import ShardedBatch
from dtcp.softmax import (
    AllGatherAttention,
    HaloAttention,
    HybridAttention,
    RingAttention,
    UlyssesAttention,
)
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.softmax.style import AttentionStyle
from tests.harness import packings, reference

LAYOUTS = (Contiguous, HeadTail, PerDocument, BlockBalanced)
BOUND = {torch.float64: 1e-12, torch.float32: 2e-6}
"""Relative error of output and gradients."""


@dataclass(frozen=True)
class MaskCase:
    """A mask, and the rule of `reference` that means the same."""

    mask: Mask
    rule: Callable[[Documents], reference.Rule]

    def visible(self, documents: Documents) -> Tensor:
        return reference.visible(documents.lengths, documents.seq_len, self.rule(documents))


def _text_and_images(documents: Documents) -> reference.Rule:
    return reference.Either(reference.causal, reference.Blocks(packings.block_ids(documents)))


CAUSAL = MaskCase(Causal(), lambda _: reference.causal)
BIDIRECTIONAL = MaskCase(Bidirectional(), lambda _: reference.bidirectional)
WINDOW = MaskCase(
    Causal() & SlidingWindow(7), lambda _: reference.Both(reference.causal, reference.Window(7))
)
TWO_SIDED_WINDOW = MaskCase(SlidingWindow(5, right=2), lambda _: reference.Window(5, right=2))
PREFIX = MaskCase(
    PrefixLM(), lambda documents: reference.Prefix(packings.prefix_lengths(documents))
)
IMAGES = MaskCase(Causal() | BlockBidirectional(), _text_and_images)
IMAGES_IN_WINDOW = MaskCase(
    SlidingWindow(7) & (Causal() | BlockBidirectional()),
    lambda documents: reference.Both(reference.Window(7), _text_and_images(documents)),
)
CHUNKS = MaskCase(
    Causal() & AttentionChunks(7), lambda _: reference.Both(reference.causal, reference.Chunks(7))
)
WINDOW_AND_SINKS = MaskCase(
    Causal() & (SlidingWindow(7) | FirstTokens(3)),
    lambda _: reference.Both(
        reference.causal, reference.Either(reference.Window(7), reference.Beginning(3))
    ),
)
SHARED_PROMPT = MaskCase(
    Causal() & (Prefix() | BlockBidirectional()),
    lambda documents: reference.Both(
        reference.causal,
        reference.Either(
            reference.Beginning(lengths=packings.prefix_lengths(documents)),
            reference.Blocks(packings.block_ids(documents)),
        ),
    ),
)
SPLIT_CASES = (WINDOW_AND_SINKS, SHARED_PROMPT)
"""Of which a token sees two intervals of keys."""
MASK_CASES = (
    CAUSAL,
    BIDIRECTIONAL,
    WINDOW,
    TWO_SIDED_WINDOW,
    PREFIX,
    IMAGES,
    IMAGES_IN_WINDOW,
    *SPLIT_CASES,
)


@dataclass(frozen=True)
class Case:
    """Inputs of one attention, and what makes it that one."""

    mask_case: MaskCase = CAUSAL
    packing: packings.Packing = packings.across_borders
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 8
    value_dim: int = 8
    scale: float | None = None
    softcap: float = 0.0
    sink: bool = True
    dtype: torch.dtype = torch.float64
    seq_len: int = 48

    def documents(self, num_shards: int) -> Documents:
        return self.packing(self.seq_len, num_shards)


class Truth(NamedTuple):
    """A case on one device, in fp64: whole inputs, and what must come of them."""

    inputs: tuple[Tensor, ...]  # q, k, v, maybe sink
    grad_out: Tensor
    out: Tensor
    grads: tuple[Tensor, ...]


@functools.cache
@torch.enable_grad()
def truth(case: Case, num_shards: int) -> Truth:
    """Attend on one device, with random cotangents."""
    documents = case.documents(num_shards)
    generator = torch.Generator().manual_seed(1)
    B, S, H, G = documents.batch, case.seq_len, case.heads, case.kv_heads
    shapes: list[tuple[int, ...]] = [
        (B, S, H, case.key_dim),
        (B, S, G, case.key_dim),
        (B, S, G, case.value_dim),
    ]
    shapes += [(H,)] if case.sink else []
    # The truth starts from the ranks' inputs, which are rounded to their dtype.
    inputs = tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(case.dtype)
        .double()
        .requires_grad_()
        for shape in shapes
    )
    q, k, v, *sink = inputs
    out, _ = reference.attention(
        q,
        k,
        v,
        case.mask_case.visible(documents),
        scale=case.scale,
        softcap=case.softcap,
        sink=sink[0] if sink else None,
    )
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(case.dtype)
    grads = torch.autograd.grad(out, inputs, grad_out.double())
    return Truth(tuple(x.detach() for x in inputs), grad_out, out.detach(), grads)


def styles(num_shards: int, **options: Any) -> list[AttentionStyle]:
    """Every strategy on that many ranks, those for windows too, each with `options`."""
    inner = 2 if num_shards % 2 == 0 else 1
    return [
        RingAttention(**options),
        AllGatherAttention(**options),
        UlyssesAttention(**options),
        HybridAttention(inner_ranks=inner, **options),
        HybridAttention(outer=AllGatherAttention(), inner_ranks=inner, **options),
        HaloAttention(7, right=4, **options),
    ]


def in_tiles(style: AttentionStyle, tile: int) -> AttentionStyle:
    """The same style with so many queries per tile: short sequences then have several tiles."""
    return replace(style, tile=tile)


def accepts(style: AttentionStyle, layout: type[SequenceLayout], case: Case, n: int) -> bool:
    """Whether this style and layout promise to compute the case."""
    if layout not in style.layouts:
        return False
    return not isinstance(style, HaloAttention) or case.mask_case in (
        WINDOW,
        TWO_SIDED_WINDOW,
        CHUNKS,
        IMAGES_IN_WINDOW,
    )


class Block(nn.Module):
    """A mixer between per-token operations that cancel: a small block to compile."""

    def __init__(self, mixer: SoftmaxAttention) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_metadata: BatchMetadata,
        *,
        sink: Tensor | None = None,
    ) -> Tensor:
        return -self.mixer(-q, -k, -v, attn_metadata, sink=sink)


def mixer_on(
    mesh: DeviceMesh, style: AttentionStyle, mask: Mask, **softmax: Any
) -> SoftmaxAttention:
    """A mixer that the style has claimed through torch's parallelize_module, on one rank too."""
    mixer = SoftmaxAttention(mask, **softmax)
    parallelize_module(nn.Sequential(mixer), mesh, {"0": style})
    return mixer


def shard_case(
    case: Case, mixer: nn.Module, mesh: DeviceMesh, layout: type[SequenceLayout]
) -> ShardedBatch:
    """The case's batch, sharded; `mesh` has an axis cp, and no other that holds a sequence."""
    documents = case.documents(mesh["cp"].size())
    batch = {
        "input_ids": torch.zeros(documents.batch, documents.seq_len, dtype=torch.int64),
        "prefix": packings.prefix_of_tokens(documents),
        "block": packings.blocks_of_tokens(documents),
    }
    whole = ParallelMesh.from_device_mesh(mesh)
    return shard_batch(batch, whole, layout, model=mixer, documents=documents)[1]


def local_inputs(case: Case, sharded: ShardedBatch) -> tuple[Tensor, ...]:
    """This rank's q, k and v, and the sink if there is one: leaves that require gradients."""
    q, k, v, *sink = (x.to(case.dtype) for x in truth(case, sharded.layout.num_shards).inputs)
    return tuple(x.clone().requires_grad_() for x in (*map(sharded.shard, (q, k, v)), *sink))


class Result(NamedTuple):
    """One rank's part of the output and of the gradients."""

    out: Tensor
    grads: tuple[Tensor, ...]


def run(
    case: Case, attend: Callable[..., Tensor], sharded: ShardedBatch, inputs: tuple[Tensor, ...]
) -> Result:
    """Forward and backward of a mixer, or of its compiled form, on this rank's shards."""
    q, k, v, *sink = inputs
    out = attend(q, k, v, sharded.attn_metadata, sink=sink[0] if sink else None)
    grad_out = sharded.shard(truth(case, sharded.layout.num_shards).grad_out)
    return Result(out.detach(), torch.autograd.grad(out, inputs, grad_out))


def errors(
    case: Case, result: Result, sharded: ShardedBatch, group: Any = None
) -> dict[str, float]:
    """Relative error of the output and of every gradient: largest difference divided by
    the largest value."""
    expected = truth(case, sharded.layout.num_shards)
    dq, dk, dv, *dsink = result.grads
    pairs = {"out": (result.out, sharded.shard(expected.out))}
    for name, grad, whole in zip(("dq", "dk", "dv"), (dq, dk, dv), expected.grads, strict=False):
        pairs[name] = (grad, sharded.shard(whole))
    if dsink:
        # The sink is a parameter: each rank has the gradient from its own queries.
        total = dsink[0].double().clone()
        dist.all_reduce(total, group=group)
        pairs["dsink"] = (total, expected.grads[3])
    wholes = dict(
        zip(("out", "dq", "dk", "dv", "dsink"), (expected.out, *expected.grads), strict=False)
    )
    return {
        name: float((actual.double() - right).abs().max() / wholes[name].abs().max())
        for name, (actual, right) in pairs.items()
    }


def assert_equals_one_device(
    case: Case,
    attend: Callable[..., Tensor],
    mixer: nn.Module,
    mesh: DeviceMesh,
    layout: type[SequenceLayout],
) -> None:
    """Run the case and assert that every error is within the bound of its dtype."""
    sharded = shard_case(case, mixer, mesh, layout)
    result = run(case, attend, sharded, local_inputs(case, sharded))
    relative = errors(case, result, sharded)
    worst = {name: error for name, error in relative.items() if not error <= BOUND[case.dtype]}
    assert not worst, f"{worst} with {mixer}, {sharded.layout} and {case}"


def refused(match: str, call: Callable[[], Any], error: type[Exception] = ValueError) -> None:
    """Assert that the call raises on every rank, and that the ranks can go on."""
    with pytest.raises(error, match=match):
        call()
    reached = torch.ones(())
    dist.all_reduce(reached)
    assert reached == dist.get_world_size()

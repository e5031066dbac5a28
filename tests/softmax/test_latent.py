"""MLA: ranks exchange latents, and every output and gradient is that of one device."""

import functools
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.compile import EagerIsland, count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import ParallelMesh
from dtcp.mixer_metadata import batch_metadata, collect_metadata
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import (
    AllGatherAttention,
    HaloAttention,
    HybridAttention,
    RingAttention,
    UlyssesAttention,
)
from dtcp.softmax.latent import LatentWidths, fold_back
from dtcp.softmax.mixer import LatentAttention
from dtcp.softmax.style import AttentionShape
from tests.harness import packings, reference
from tests.harness.attention_parity import (
    CAUSAL,
    LAYOUTS,
    WINDOW,
    WINDOW_AND_SINKS,
    MaskCase,
    in_tiles,
)
from tests.harness.spmd import spmd

SEQ_LEN = 48


@dataclass(frozen=True)
class Widths:
    """Heads and channels of a latent attention."""

    heads: int = 4
    content: int = 6
    rotary: int = 4
    value: int = 5
    latent: int = 12


@dataclass(frozen=True)
class LatentCase:
    """Inputs of one latent attention, and what makes it that one."""

    packing: packings.Packing = packings.across_borders
    widths: Widths = Widths()
    mask_case: MaskCase = CAUSAL
    seq_len: int = SEQ_LEN
    scale: float | None = None


class Truth(NamedTuple):
    inputs: tuple[Tensor, ...]  # q, latent, rotary key, up
    grad_out: Tensor
    out: Tensor
    grads: tuple[Tensor, ...]


@functools.cache
@torch.enable_grad()
def truth(case: LatentCase, num_shards: int) -> Truth:
    """Keys and values of every token, and dense attention to them."""
    documents, w = case.packing(case.seq_len, num_shards), case.widths
    draw = torch.Generator().manual_seed(2)
    B, S = documents.batch, documents.seq_len
    shapes = [
        (B, S, w.heads, w.content + w.rotary),
        (B, S, w.latent),
        (B, S, w.rotary),
        (w.heads, w.content + w.value, w.latent),
    ]
    inputs = tuple(
        torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    q, latent, rotary, up = inputs
    made = torch.einsum("bsc,hwc->bshw", latent, up)
    k = torch.cat([made[..., : w.content], torch.stack([rotary] * w.heads, dim=2)], dim=-1)
    visible = case.mask_case.visible(documents)
    out, _ = reference.attention(q, k, made[..., w.content :], visible, scale=case.scale)
    grad_out = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    grads = torch.autograd.grad(out, inputs, grad_out)
    return Truth(tuple(x.detach() for x in inputs), grad_out, out.detach(), grads)


class Block(nn.Module):
    """A mixer between per-token operations that cancel: a small block to compile."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, q, latent, rotary, up, attn_metadata):
        return -self.mixer(-q, latent, -rotary, -up, attn_metadata)


def claimed(mesh, style, case):
    mixer = LatentAttention(case.mask_case.mask, scale=case.scale)
    parallelize_module(nn.Sequential(mixer), mesh, {"0": style})
    return mixer


def sharded_inputs(case, mixer, mesh, layout):
    """The sharded batch, this rank's inputs (up whole), and its part of the gradient of out."""
    ranks = mesh["cp"].size()
    expected, documents = truth(case, ranks), case.packing(case.seq_len, ranks)
    batch = {"input_ids": torch.zeros(documents.batch, documents.seq_len, dtype=torch.int64)}
    on = ParallelMesh.from_device_mesh(mesh)
    sharded = shard_batch(batch, on, layout, model=mixer, documents=documents)[1]
    *tokens, up = expected.inputs
    inputs = [x.clone().requires_grad_() for x in (*map(sharded.shard, tokens), up)]
    return sharded, inputs, sharded.shard(expected.grad_out)


def assert_equals_truth(case, attend, mixer, mesh, layout):
    sharded, inputs, grad_out = sharded_inputs(case, mixer, mesh, layout)
    out = attend(*inputs, sharded.attn_metadata)
    *grads, d_up = torch.autograd.grad(out, inputs, grad_out)
    dist.all_reduce(d_up)  # a weight: each rank has the share of its own queries
    expected = truth(case, mesh["cp"].size())
    assert_close(out, sharded.shard(expected.out))
    for grad, whole in zip(grads, expected.grads, strict=False):
        assert_close(grad, sharded.shard(whole))
    assert_close(d_up, expected.grads[3])


def test_gradients_are_folded_back_into_latents_unrounded_where_ranks_sum_them_so():
    draw, dtype = torch.Generator().manual_seed(6), torch.bfloat16
    dk, dv = (torch.randn(1, 9, 4, width, generator=draw) for width in (10, 5))
    rows, up = (torch.randn(x, generator=draw).to(dtype) for x in ((1, 9, 1, 16), (4, 11, 12)))
    widths = LatentWidths.of(dk, rows, up)
    exact = fold_back(dk.double(), dv.double(), rows.double(), up.double(), widths, wide=False)
    for wide, least, most in ((True, 0.0, 1e-6), (False, 1e-3, 1e-2)):
        for grad, right in zip(fold_back(dk, dv, rows, up, widths, wide=wide), exact, strict=True):
            assert grad.dtype == torch.float32
            assert least <= (grad - right).norm() / right.norm() <= most


@pytest.mark.slow_where(lambda ranks: ranks in (1, 4))
@spmd(ranks=(1, 2, 3, 4))
def test_mla_equals_one_device(mesh, ranks):
    """Output and all gradients: packed rows, padding, rows packed differently, every layout."""
    layouts = LAYOUTS if ranks == 2 else (HeadTail,)
    rows = (packings.across_borders, packings.last_shard_padding, packings.two_rows)
    island = AllGatherAttention(boundary=EagerIsland())
    for style in (RingAttention(), AllGatherAttention(), island, HaloAttention(7)):
        mask_case = WINDOW_AND_SINKS if style is island else CAUSAL
        mask_case = WINDOW if isinstance(style, HaloAttention) else mask_case
        mixer = claimed(mesh, in_tiles(style, 5), LatentCase(mask_case=mask_case))
        for layout, packing in product(layouts, rows):
            assert_equals_truth(
                LatentCase(packing, mask_case=mask_case), mixer, mixer, mesh, layout
            )


def test_mla_on_one_device_equals_dense_attention_to_its_keys():
    case = LatentCase(packings.two_rows, scale=0.3)
    mixer, documents = LatentAttention(CAUSAL.mask, scale=0.3), case.packing(case.seq_len, 1)
    expected = truth(case, 1)
    inputs = [x.clone().requires_grad_() for x in expected.inputs]
    out = mixer(*inputs, batch_metadata(mixer, documents))
    assert_close(out, expected.out)
    assert_close(torch.autograd.grad(out, inputs, expected.grad_out), expected.grads)
    q, latent, rotary, up = expected.inputs
    own = mixer.forward_without_mixing(q, latent, rotary, up)
    assert_close(own, torch.einsum("bsc,hvc->bshv", latent, up[:, case.widths.content :]))


PUBLISHED = {
    "deepseek_v2_lite": Widths(heads=16, content=128, rotary=64, value=128, latent=512),
    "deepseek_v3": Widths(heads=128, content=128, rotary=64, value=128, latent=512),
    "kimi_k2": Widths(heads=64, content=128, rotary=64, value=128, latent=512),
    "kimi_linear": Widths(heads=32, content=128, rotary=64, value=128, latent=512),
}


@pytest.mark.slow_where(lambda name: name != "deepseek_v2_lite")
@pytest.mark.parametrize("name", PUBLISHED)
@spmd(ranks=2)
def test_mla_in_published_shapes_receives_latents_alone(mesh, name):
    """Right, and (C + R) / (2 G D) of the bytes of keys and values with D the keys' width."""
    widths = PUBLISHED[name]
    case = LatentCase(packings.one_document, widths, seq_len=8)
    mixer = claimed(mesh, RingAttention(), case)
    with count_traffic() as moved:
        assert_equals_truth(case, mixer, mixer, mesh, HeadTail)
    coords, width = Coords.of(Documents.single(1, 8)), widths.content + widths.rotary
    keys = AttentionShape(1, widths.heads, widths.heads, width, width, 8)
    formula, of_keys = (
        RingAttention().received(mixer, coords, HeadTail(8, 2), mesh.get_local_rank(), shape)
        for shape in (replace(keys, latent=widths.latent + widths.rotary), keys)
    )
    assert moved.received == formula.forward + formula.backward
    assert formula.forward * 2 * widths.heads * width == of_keys.forward * 576
    assert formula.forward > 0


@spmd(ranks=(2, 3))
def test_mla_moves_the_bytes_of_its_formula(mesh, ranks):
    """In both directions, counted by the ops and seen by torch's profiler."""
    rank = mesh.get_local_rank()
    for style, packing in product(
        (RingAttention(), AllGatherAttention()), (packings.one_document, packings.two_rows)
    ):
        case = LatentCase(packing)
        mixer = claimed(mesh, style, case)
        sharded, inputs, grad_out = sharded_inputs(case, mixer, mesh, HeadTail)
        with count_traffic() as forward, torch.profiler.profile(record_shapes=True) as profiler:
            out = mixer(*inputs, sharded.attn_metadata)
        with count_traffic() as backward:
            torch.autograd.grad(out, inputs, grad_out)
        shape = AttentionShape(sharded.documents.batch, 4, 4, 10, 5, 8, latent=16)
        planned = style.received(mixer, sharded.coords, sharded.layout, rank, shape)
        assert (forward.received, backward.received) == (planned.forward, planned.backward)
        seen = sum(
            torch.Size(event.input_shapes[0]).numel() * 8
            for event in profiler.events()
            if event.name in ("gloo:recv", "c10d::alltoall_base_")
        )
        assert seen == forward.received > 0


@spmd(ranks=2)
def test_compiled_mla_is_one_graph_for_all_batches(mesh):
    for style in (RingAttention(), AllGatherAttention()):
        torch._dynamo.reset()
        mixer = claimed(mesh, style, LatentCase())
        attend = torch.compile(Block(mixer), backend="aot_eager", fullgraph=True)
        with count_graphs() as graphs:
            for packing in (packings.across_borders, packings.one_document):
                assert_equals_truth(LatentCase(packing), attend, mixer, mesh, HeadTail)
        assert (graphs.graphs, graphs.breaks) == (1, 0)


@spmd(axes={"cp": 2, "tp": 2})
def test_mla_with_heads_sharded_gives_whole_gradients_of_latents(mesh):
    case = LatentCase()
    mixer = claimed(mesh["cp", "tp"], RingAttention(), case)
    sharded, inputs, grad_out = sharded_inputs(case, mixer, mesh, HeadTail)
    q, latent, rotary, up = inputs
    tp = mesh["tp"].get_local_rank()
    mine = slice(2 * tp, 2 * tp + 2)
    out = mixer(q[:, :, mine], latent, rotary, up[mine], sharded.attn_metadata)
    grads = torch.autograd.grad(out, inputs, grad_out[:, :, mine])
    expected = truth(case, 2)
    assert_close(out, sharded.shard(expected.out)[:, :, mine])
    assert_close(grads[0][:, :, mine], sharded.shard(expected.grads[0])[:, :, mine])
    for grad, whole in zip(grads[1:3], expected.grads[1:3], strict=True):
        assert_close(grad, sharded.shard(whole))
    d_up = grads[3]
    dist.all_reduce(d_up, group=mesh["cp"].get_group())
    assert_close(d_up[mine], expected.grads[3][mine])


@spmd(ranks=2)
def test_mla_by_heads_is_refused_when_the_plan_is_applied(mesh):
    for style in (UlyssesAttention(), HybridAttention(inner_ranks=2)):
        with pytest.raises(ValueError, match="Keys made of values or latents"):
            claimed(mesh, style, LatentCase())


def test_mla_of_shapes_that_do_not_fit_is_refused():
    mixer, documents = LatentAttention(CAUSAL.mask), Documents.single(1, 4)
    metadata = batch_metadata(mixer, documents)
    good = {
        "q": torch.zeros(1, 4, 2, 5),
        "latent": torch.zeros(1, 4, 6),
        "key_rotary": torch.zeros(1, 4, 2),
        "up": torch.zeros(2, 7, 6),
    }
    assert mixer(*good.values(), metadata).shape == (1, 4, 2, 4)
    for name, x, match in [
        ("latent", torch.zeros(1, 3, 6), "a latent and a rotary key for each token"),
        ("latent", torch.zeros(1, 4, 5), "a latent and a rotary key for each token"),
        ("key_rotary", torch.zeros(1, 4, 6), "keys and values of all heads from one latent"),
        ("up", torch.zeros(3, 7, 6), "keys and values of all heads from one latent"),
        ("up", torch.zeros(2, 3, 6), "keys and values of all heads from one latent"),
        ("up", torch.zeros(14, 6), r"up \[H, N \+ V, C\]"),
        ("q", torch.zeros(1, 5, 2, 5), "keys and values of all heads from one latent"),
        ("q", torch.zeros(1, 4, 2, 5).double(), "one floating dtype"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            mixer(*{**good, name: x}.values(), metadata)


@spmd(axes={"cp": 1, "tp": 2})
def test_gradients_of_latents_are_summed_over_heads_unrounded_where_asked_for(mesh):
    """The shares of two equal heads nearly cancel: to round them first leaves mostly rounding."""
    draw, w = torch.Generator().manual_seed(7), Widths(heads=1)
    shapes = ((1, 16, 1, 10), (1, 16, w.latent), (1, 16, w.rotary), (1, 11, w.latent))
    inputs = [torch.randn(x, generator=draw).bfloat16().requires_grad_() for x in shapes]
    cotangent = torch.randn(1, 16, 1, w.value, generator=draw).bfloat16()
    shares = (cotangent, -(cotangent * 8).round() / 8)

    alone, documents = LatentAttention(CAUSAL.mask), Documents.single(1, 16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = alone(*exact, batch_metadata(alone, documents))
    expected = torch.autograd.grad(out, exact, sum(shares).double())[1:3]
    errors = []
    for style in (RingAttention(), RingAttention(reduce_dtype=torch.float32)):
        mixer = claimed(mesh["cp", "tp"], style, LatentCase())
        metadata = collect_metadata(mixer, Coords.of(documents), HeadTail(16, 1))
        grad_out = shares[mesh["tp"].get_local_rank()]
        grads = torch.autograd.grad(mixer(*inputs, metadata), inputs, grad_out)[1:3]
        assert {grad.dtype for grad in grads} == {torch.bfloat16}
        errors.append([(x - y).norm() / y.norm() for x, y in zip(grads, expected, strict=True)])
    assert max(errors[1]) < 0.01 < 0.03 < min(errors[0]), errors

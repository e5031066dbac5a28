"""Recurrent mixers on ranks, held against the recurrence token by token in fp64."""

import functools
import math
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.compile import count_graphs
from dtcp.distributed.ledger import Traffic, count_traffic
from dtcp.distributed.mesh import ParallelMesh
from dtcp.kernels.delta_rule.chunks import CHUNK_LEN
from dtcp.metadata import BatchMetadata
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.recurrent import (
    CausalConv1d,
    CausalConvCP,
    FewestBytes,
    GatedDeltaCP,
    GatedDeltaRule,
    GatedLinearAttention,
    GatherStates,
    RelayoutCP,
    ScanStates,
)
from dtcp.recurrent.moves import ChannelShape, DeltaShape
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.per_document import PerDocument
from dtcp.sharded_batch import ShardedBatch
from tests.harness import packings, reference
from tests.harness.attention_parity import refused
from tests.harness.spmd import spmd

G, H, K, V, WIDTH, SEQ_LEN = 2, 4, 6, 5, 4, 48
CHANNELS = 2 * G * K + H * V


class Layer(nn.Module):
    """A convolution and the rule that reads it: what a model puts between its projections."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rule = CausalConv1d(WIDTH), GatedDeltaRule()

    def forward(
        self, x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, attn_metadata: BatchMetadata
    ) -> Tensor:
        q, k, v = self.conv(x, weight, attn_metadata).split((G * K, G * K, H * V), dim=-1)
        q, k = (y.unflatten(-1, (G, K)) for y in (q, k))
        return self.rule(q, k, v.unflatten(-1, (H, V)), g, beta, attn_metadata)


class Truth(NamedTuple):
    """Whole inputs x, g, beta, weight; and what must come of them."""

    inputs: tuple[Tensor, ...]
    grad_out: Tensor
    out: Tensor
    grads: tuple[Tensor, ...]


@functools.cache
def truth(documents: Documents, by_channel: bool = False) -> Truth:
    generator = torch.Generator().manual_seed(0)
    B, S = documents.batch, documents.seq_len
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    decays = (H, K) if by_channel else (H,)
    x, g, beta = draw(B, S, CHANNELS), -3 * draw(B, S, *decays).abs(), draw(B, S, H).sigmoid()
    # Some tokens forget all, some nothing.
    g[:, ::7], g[:, 1::5] = -40.0, 0.0
    # In a running sum such numbers leave nothing of others, or no number.
    g[:, 2::13], g[:, 4::17] = -torch.inf, -1e30
    if by_channel:
        # Of which e^-g is no number any more.
        g[:, 3::11, :, ::2] = -800.0
    inputs = tuple(t.requires_grad_() for t in (x, g, beta, draw(CHANNELS, WIDTH)))
    mixed = reference.causal_conv(x, inputs[3], documents.lengths)
    q, k, v = mixed.split((G * K, G * K, H * V), dim=-1)
    heads = (q.unflatten(-1, (G, K)), k.unflatten(-1, (G, K)), v.unflatten(-1, (H, V)))
    out = reference.gated_delta_rule(reference.DeltaRule(*heads, *inputs[1:3]), documents.lengths)
    grad_out = draw(out.shape)
    grads = torch.autograd.grad(out, inputs, grad_out, materialize_grads=True)
    return Truth(tuple(t.detach() for t in inputs), grad_out, out.detach(), grads)


def layer_on(mesh: DeviceMesh, style: GatedDeltaCP = GatedDeltaCP()) -> Layer:  # noqa: B008
    layer = Layer()
    parallelize_module(layer, mesh, {"conv": CausalConvCP(), "rule": style})
    return layer


def shard_case(
    documents: Documents, layer: nn.Module, mesh: DeviceMesh, layout: type[SequenceLayout]
) -> ShardedBatch:
    tokens = torch.zeros(documents.batch, documents.seq_len, dtype=torch.int64)
    whole = ParallelMesh.from_device_mesh(mesh)
    return shard_batch({"input_ids": tokens}, whole, layout, model=layer, documents=documents)[1]


def assert_equals_the_recurrence(
    documents: Documents, layer: Any, sharded: ShardedBatch, *, by_channel: bool = False
) -> Traffic:
    expected = truth(documents, by_channel)
    x, g, beta, weight = expected.inputs
    local = [sharded.shard(t).requires_grad_() for t in (x, g, beta)]
    weight = weight.clone().requires_grad_()
    with count_traffic() as traffic:
        out = layer(*local, weight, sharded.attn_metadata)
        *grads, d_weight = torch.autograd.grad(
            out, (*local, weight), sharded.shard(expected.grad_out)
        )
    dist.all_reduce(d_weight)
    computed = (out, *grads, d_weight)
    wanted = (*map(sharded.shard, (expected.out, *expected.grads[:3])), expected.grads[3])
    for actual, right in zip(computed, wanted, strict=True):
        assert float((actual - right).abs().max()) <= 1e-11
    return traffic


@pytest.mark.parametrize("by_channel", [False, True], ids=["by head", "by channel"])
@pytest.mark.parametrize("packing", packings.PACKINGS)
def test_one_device_equals_the_recurrence(packing, by_channel):
    documents = packing(SEQ_LEN, 2)
    expected, layer = truth(documents, by_channel), Layer()
    inputs = [t.clone().requires_grad_() for t in expected.inputs]
    out = layer(*inputs, batch_metadata(layer, documents))
    grads = torch.autograd.grad(out, inputs, expected.grad_out)
    for actual, right in zip((out, *grads), (expected.out, *expected.grads), strict=True):
        assert float((actual.detach() - right).abs().max()) <= 1e-11


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_kernel_equals_the_recurrence_at_any_length(length):
    documents = Documents(((length,),), length)
    for by_channel in (False, True):
        expected = truth(documents, by_channel)
        layer = Layer()
        actual = layer(*expected.inputs, batch_metadata(layer, documents))
        assert float((actual - expected.out).abs().max()) <= 1e-11


def test_kernel_in_bf16_is_as_near_as_its_inputs():
    documents = Documents.single(1, 130)
    expected, layer = truth(documents), Layer()
    x, g, beta, weight = expected.inputs
    rounded = [t.bfloat16() for t in (x, beta, weight)]
    attn_metadata = batch_metadata(layer, documents)
    exact = layer(rounded[0].double(), g, rounded[1].double(), rounded[2].double(), attn_metadata)
    actual = layer(rounded[0], g.float(), rounded[1], rounded[2], attn_metadata)
    assert actual.dtype == torch.bfloat16
    assert float((actual.double() - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("states", [GatherStates(), ScanStates()])
@pytest.mark.parametrize("layout", [Contiguous, HeadTail])
@spmd(ranks=[1, 2, 3, 4])
def test_ranks_equal_the_recurrence(mesh, layout, states, ranks):
    """And what is received is what the formulas say, of decays by head and by channel alike."""
    style = GatedDeltaCP(states)
    layer = layer_on(mesh, style)
    all_of_them = (ranks, layout, states) == (2, HeadTail, GatherStates())
    turn = (ranks + (layout is HeadTail) + (states == ScanStates())) % 2
    by_head = (packings.one_token_documents, packings.equal_rows)[turn]
    for packing in packings.PACKINGS if all_of_them else (by_head, packings.after_borders):
        documents = packing(SEQ_LEN, ranks)
        sharded = shard_case(documents, layer, mesh, layout)
        by_channel = packing is packings.after_borders
        traffic = assert_equals_the_recurrence(documents, layer, sharded, by_channel=by_channel)
        shape = DeltaShape(documents.batch, H, K, V, element_size=8)
        rank = mesh.get_local_rank()
        by_formula = style.received(layer.rule, sharded.coords, sharded.layout, rank, shape)
        kinds = ("dtcp::all_gather", "dtcp::ring_shift")
        moved = sum(traffic[kind].received for kind in kinds)
        assert moved == by_formula.forward + by_formula.backward
        assert traffic["dtcp::exchange_tokens"].received == conv_bytes(sharded, documents.batch)
        of_conv = (layer.conv, sharded.coords, sharded.layout, rank)
        conv = layer.conv.style.received(*of_conv, ChannelShape(documents.batch, CHANNELS, 8))
        assert conv_bytes(sharded, documents.batch) == conv.forward + conv.backward
        assert traffic.received == moved + traffic["dtcp::exchange_tokens"].received


@pytest.mark.parametrize("layout", [Contiguous, HeadTail])
@spmd(ranks=2)
def test_segments_of_several_chunks_equal_the_recurrence(mesh, layout):
    """A document that spans segments, with chunks of them cut short at the end."""
    documents = Documents(((230, 70),), 300)
    layer = layer_on(mesh, GatedDeltaCP(ScanStates()))
    sharded = shard_case(documents, layer, mesh, layout)
    assert sharded.layout.segment_len > CHUNK_LEN
    for by_channel in (False, True):
        assert_equals_the_recurrence(documents, layer, sharded, by_channel=by_channel)


def conv_bytes(sharded: ShardedBatch, batch: int) -> int:
    """w - 1 tokens for every segment with a neighbour on another rank, forward and back."""
    rank, runs = (
        sharded.mesh.rank("cp"),
        [sharded.layout.segments(r) for r in range(sharded.mesh.size("cp"))],
    )
    owner = {p: r for r, row in enumerate(runs) for a, b in row for p in (a, b - 1)}
    own = {p for p, r in owner.items() if r == rank}
    left = sum(a > 0 and a - 1 not in own for a, _ in runs[rank])
    right = sum(b < sharded.layout.seq_len and b not in own for _, b in runs[rank])
    return (left + right) * (WIDTH - 1) * batch * CHANNELS * 8


@pytest.mark.slow_where(lambda ranks: ranks == 4)
@spmd(ranks=[2, 3, 4])
def test_compiled_is_one_graph_for_every_packing(mesh, ranks):
    """And another for decays by channel; on two ranks by head alone, on three by channel."""
    layout = Contiguous if ranks == 3 else HeadTail
    decays = {2: (False,), 3: (True,)}.get(ranks, (False, True))
    layer = layer_on(mesh)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with count_graphs() as graphs:
        for packing, by_channel in product(packings.PACKINGS[1:4], decays):
            documents = packing(SEQ_LEN, ranks)
            sharded = shard_case(documents, layer, mesh, layout)
            traffic = assert_equals_the_recurrence(
                documents, compiled, sharded, by_channel=by_channel
            )
            assert traffic["dtcp::gated_delta_rule_backward"].calls == 1
    assert (graphs.graphs, graphs.breaks) == (len(decays), 0)


class Whole(nn.Module):
    """The layer as one that reads hidden states, and metadata."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.inner, self.weight = Layer(), nn.Parameter(weight.clone())

    def forward(self, x: Tensor, attn_metadata: BatchMetadata) -> Tensor:
        x, g, beta = x.split((CHANNELS, H, H), dim=-1)
        return self.inner(x, g, beta, self.weight, attn_metadata).flatten(2)


@pytest.mark.slow_where(lambda inside, ranks: (ranks == 2) != (inside is HeadTail))
@pytest.mark.parametrize("inside", [Contiguous, HeadTail])
@spmd(ranks=[2, 3])
def test_a_layer_on_tokens_dealt_anew_equals_the_recurrence(mesh, inside, ranks):
    """From every layout; one graph for all, and the tokens that change owner received twice."""
    documents, style = Documents(((7, 30, 1, 10),), SEQ_LEN), RelayoutCP(inside)
    expected = truth(documents)
    layer = Whole(expected.inputs[3])
    keys = {"inner.conv": CausalConvCP(), "inner.rule": GatedDeltaCP(), "": style}
    compiled = torch.compile(apply_plan(layer, mesh, keys), backend="aot_eager", fullgraph=True)
    whole = torch.cat(expected.inputs[:3], dim=-1)
    with count_graphs() as graphs:
        for layout in (PerDocument, Contiguous, HeadTail, BlockBalanced):
            sharded = shard_case(documents, layer, mesh, layout)
            x = sharded.shard(whole).requires_grad_()
            with count_traffic() as traffic:
                out = compiled(x, sharded.attn_metadata)
                grad, d_weight = torch.autograd.grad(
                    out, (x, layer.weight), sharded.shard(expected.grad_out).flatten(2)
                )
            dist.all_reduce(d_weight)
            assert_close(out, sharded.shard(expected.out).flatten(2))
            assert_close(grad, sharded.shard(torch.cat(expected.grads[:3], dim=-1)))
            assert_close(d_weight, expected.grads[3])
            # Tokens come as wide as they are and go home as values alone, and so do gradients.
            sizes = [H * V, CHANNELS + 2 * H]
            of = (layer.relayout, sharded.coords, sharded.layout, mesh.get_local_rank())
            one, two = (style.received(*of, ChannelShape(1, n, 8)) for n in sizes)
            moved = one + two
            assert 2 * traffic["dtcp::all_to_all"].received == moved.forward + moved.backward
    assert (graphs.graphs, graphs.breaks) == (1, 0)


@spmd(axes={"cp": 2, "tp": 2})
def test_dtensors_split_by_sequence_and_heads_equal_the_recurrence(mesh):
    documents = packings.across_borders(SEQ_LEN, 2)
    layer = layer_on(mesh["cp"])
    sharded = shard_case(documents, layer, mesh["cp"], HeadTail)
    generator = torch.Generator().manual_seed(3)
    shapes = ((G, K), (G, K), (H, V), (H,), (H,))
    whole = [
        torch.randn(1, SEQ_LEN, *shape, generator=generator, dtype=torch.float64)
        for shape in shapes
    ]
    whole[3], whole[4] = -whole[3].abs(), whole[4].sigmoid()
    leaves = [x.clone().requires_grad_() for x in whole]
    expected = reference.gated_delta_rule(reference.DeltaRule(*leaves), documents.lengths)
    cotangent = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, leaves, cotangent)

    placed = (Shard(1), Shard(2))

    def part(x: Tensor) -> Tensor:
        return sharded.shard(x).chunk(2, dim=2)[mesh["tp"].get_local_rank()].contiguous()

    local = [DTensor.from_local(part(x), mesh, placed).requires_grad_() for x in whole]
    out = layer.rule(*local, sharded.attn_metadata)
    grads = torch.autograd.grad(out, local, DTensor.from_local(part(cotangent), mesh, placed))
    assert_close(out.to_local(), part(expected.detach()))
    for actual, right in zip(grads, wanted, strict=True):
        assert actual.placements == placed
        assert_close(actual.to_local(), part(right))


def test_fewest_bytes_gathers_among_few_and_scans_among_many():
    """Large states; small ones are gathered, since a round takes longer than they do."""
    large = DeltaShape(1, 32, 128, 128).summary
    choices = {(n, p): FewestBytes().scans(n, p, large) for n in (2, 4, 8, 64) for p in (1, 2)}
    assert choices == {
        (2, 1): False,
        (2, 2): False,
        (4, 1): True,
        (4, 2): False,
        (8, 1): True,
        (8, 2): True,
        (64, 1): True,
        (64, 2): True,
    }
    small = DeltaShape(1, 4, 16, 32).summary
    for n, p in choices:
        assert not FewestBytes().scans(n, p, small)
        assert FewestBytes(a_round=0).scans(n, p, small) == choices[n, p]


@spmd(ranks=2)
def test_what_cannot_be_honoured_is_refused_on_every_rank(mesh):
    layer, documents = layer_on(mesh), packings.across_borders(SEQ_LEN, 2)
    scanned = layer_on(mesh, GatedDeltaCP(ScanStates()))
    refused("ScanStates composes", lambda: shard_case(documents, scanned, mesh, BlockBalanced))
    short = Documents.single(1, 8)
    refused("segment_len=2", lambda: shard_case(short, layer, mesh, HeadTail))
    refused("metadata of its batch", lambda: layer(*truth(documents).inputs, {}))
    sharded, inputs = shard_case(documents, layer, mesh, HeadTail), truth(documents).inputs
    refused("metadata of its own batch", lambda: layer(*inputs, sharded.attn_metadata))
    x, g, beta, weight = (sharded.shard(t) if t.ndim > 2 else t for t in inputs)
    odd = g[..., None].expand(-1, -1, -1, K + 1)
    refused("key channel of one", lambda: layer(x, odd, beta, weight, sharded.attn_metadata))
    refused("as many shards", lambda: batch_metadata(layer, documents))
    refused("equal parts", lambda: HeadTail(6, 2))
    refused(
        "unclaimed GatedDeltaRule",
        lambda: parallelize_module(layer, mesh, {"conv": GatedDeltaCP()}),
        TypeError,
    )
    relaid = RelayoutCP()
    refused("got a Linear", lambda: parallelize_module(nn.Linear(2, 2), mesh, relaid), TypeError)
    dealt = parallelize_module(layer_on(mesh), mesh, relaid)
    refused("once, got a Layer", lambda: parallelize_module(dealt, mesh, relaid), TypeError)
    refused("metadata of its batch", lambda: dealt(inputs[0], sharded.attn_metadata))
    refused("as many shards", lambda: batch_metadata(dealt, documents))
    refused("segment_len=2", lambda: shard_case(Documents.single(1, 4), dealt, mesh, Contiguous))
    unclaimed = Layer()
    refused("unclaimed", lambda: shard_case(documents, unclaimed, mesh, HeadTail))
    refused("claimed", lambda: apply_plan(unclaimed, mesh, {"rule": GatedDeltaCP()}))


def test_backward_recomputes_and_keeps_only_inputs_and_one_state():
    documents = Documents.single(1, 128)
    layer = Layer()
    x, g, beta, weight = (t.clone().requires_grad_() for t in truth(documents).inputs)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    q, k, v = x.split((G * K, G * K, H * V), dim=-1)
    heads = (q.unflatten(-1, (G, K)), k.unflatten(-1, (G, K)), v.unflatten(-1, (H, V)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        GatedDeltaRule(normalize=False)(*heads, g, beta, batch_metadata(layer, documents))
    largest = max(t.numel() for t in kept)
    assert largest <= x.shape[1] * H * V
    assert largest < CHUNK_LEN**2 * H * 4


def test_states_are_gathered_or_scanned_as_named_whatever_their_size():
    for summary in (1, 2**30):
        assert not GatherStates().scans(8, 8, summary) and ScanStates().scans(8, 8, summary)
    assert [FewestBytes().scans(8, 8, summary) for summary in (1, 2**30)] == [False, True]


@pytest.mark.parametrize("mixer", [GatedDeltaRule, GatedLinearAttention])
def test_scale_that_is_no_finite_number_is_refused(mixer):
    for scale in (math.nan, -math.inf):
        with pytest.raises(ValueError, match=f"scaled by a finite number, got scale={scale}"):
            mixer(scale=scale)


@pytest.mark.parametrize("kind", [GatedDeltaRule, GatedLinearAttention])
def test_a_learned_scale_has_the_gradient_of_a_factor(kind):
    """What comes out is proportional to it."""
    documents, scale = Documents(((4, 3),), 8), nn.Parameter(torch.tensor(0.3).double())
    q, k, v = torch.randn(3, 1, 8, 2, 4, dtype=torch.float64).unbind()
    g, beta = -torch.rand(1, 8, 2).double(), torch.rand(1, 8, 2).double()
    rates = (g, beta) if kind is GatedDeltaRule else (g,)
    out, of_one = (
        mixer(q, k, v, *rates, batch_metadata(mixer, documents))
        for mixer in (kind(scale=scale), kind(scale=1.0))
    )
    assert_close(out, 0.3 * of_one)
    grad = torch.randn_like(out)
    assert_close(torch.autograd.grad(out, scale, grad)[0], (of_one * grad).sum())

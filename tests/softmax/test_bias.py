"""Score biases by distance, T5's, ALiBi's and Inkling's: exact, with gradients, never L x S."""

import functools
import math
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dtcp.batch import shard_batch
from dtcp.compile import EagerIsland, count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import ParallelMesh
from dtcp.kernels.softmax.backends import BACKENDS
from dtcp.kernels.softmax.choice import choose_kernel
from dtcp.kernels.softmax.demand import refusal
from dtcp.mixer_metadata import batch_metadata
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from dtcp.sequence.masks import Causal
from dtcp.softmax import (
    AllGatherAttention,
    HaloAttention,
    HybridAttention,
    RingAttention,
    UlyssesAttention,
)
from dtcp.softmax.distance_bias import alibi_slopes, t5_distance_bias
from dtcp.softmax.mixer import CrossAttention, SoftmaxAttention
from dtcp.softmax.moves import AttentionShape
from tests.harness import packings
from tests.harness.attention_parity import (
    BIDIRECTIONAL,
    CAUSAL,
    WINDOW,
    WINDOW_AND_SINKS,
    MaskCase,
    in_tiles,
    mixer_on,
)
from tests.harness.spmd import spmd
from tests.kernels.test_backends import HOPPER

SEQ_LEN, REACH = 48, 9


@dataclass(frozen=True)
class BiasCase:
    """An attention with a bias, and which."""

    mask_case: MaskCase = CAUSAL
    packing: packings.Packing = packings.across_borders
    table: bool = True
    slope: bool = False
    relative: int = 0
    """Tokens that profiles are of; 0 for none."""
    own_sinks: bool = False
    """Whether each query has sinks of its own."""
    softcap: float = 0.0
    value_dim: int = 8
    heads: int = 4
    kv_heads: int = 2
    hides: bool = False
    """Whether its table hides far keys from the first heads, by -inf, and the last head has no
    sink, by -inf, too."""


def of_tokens(case):
    return ("q", "k", "v", "relative", *(("sink",) if case.own_sinks else ()))


class Truth(NamedTuple):
    inputs: dict[str, Tensor]
    grad_out: Tensor
    out: Tensor
    grads: dict[str, Tensor]


@functools.cache
@torch.enable_grad()
def truth(case: BiasCase, num_shards: int) -> Truth:
    """Dense attention with a dense bias, [H, S, S], filled in pair by pair."""
    documents = case.packing(SEQ_LEN, num_shards)
    draw = functools.partial(
        torch.randn, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    B, S, H, G = documents.batch, SEQ_LEN, case.heads, case.kv_heads
    inputs = {
        "q": draw(B, S, H, 8),
        "k": draw(B, S, G, 8),
        "v": draw(B, S, G, case.value_dim),
        "sink": draw(B, S, H) if case.own_sinks else draw(H),
    }
    if case.table:
        inputs["bias"] = draw(H, 2 * REACH + 1)
        if case.hides:
            inputs["bias"][:2, : REACH - 1] = -torch.inf
    if case.slope:
        inputs["slope"] = draw(H) / 4
    if case.relative:
        inputs["relative"] = draw(B, S, H, 3)
        inputs["profiles"] = draw(3, case.relative)
    if case.hides:
        inputs["sink"][-1] = -torch.inf
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    k, v = (inputs[name].repeat_interleave(H // G, dim=2) for name in ("k", "v"))
    scores = torch.einsum("bqhd,bkhd->bhqk", inputs["q"], k) * 8**-0.5
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    rows = []
    for query in range(S):
        row = torch.zeros(H, S, dtype=torch.float64)
        distances = torch.tensor([key - query for key in range(S)])
        if case.table:
            row = row + inputs["bias"][:, [REACH + max(-REACH, min(REACH, d)) for d in distances]]
        if case.slope:
            row = row + inputs["slope"][:, None] * distances
        rows.append(row)
    visible = case.mask_case.visible(documents)
    blind = ~visible.any(-1)
    scores = scores + torch.stack(rows, dim=1)
    if case.relative:
        mixed = torch.einsum("bqhc,cw->bhqw", inputs["relative"], inputs["profiles"])
        for w in range(case.relative):  # the key w tokens back, of every query that has one
            on_diagonal = torch.diag_embed(mixed[..., w:, w], offset=-w)[..., :S, :S]
            scores = scores + on_diagonal
    scores = scores.masked_fill(~(visible | blind[..., None])[:, None], -torch.inf)
    sink = inputs["sink"].expand(B, S, H).transpose(1, 2)[..., None]
    weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :S]
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v).masked_fill(blind[..., None, None], 0.0)
    grad_out = draw(out.shape)
    grads = torch.autograd.grad(out, [*inputs.values()], grad_out)
    whole = {name: x.detach() for name, x in inputs.items()}
    return Truth(whole, grad_out, out.detach(), dict(zip(inputs, grads, strict=True)))


def shard_case(case, mixer, mesh, layout):
    documents = case.packing(SEQ_LEN, mesh.size())
    batch = {"input_ids": torch.zeros(documents.batch, SEQ_LEN, dtype=torch.int64)}
    on = ParallelMesh.of_sequence(mesh)
    return shard_batch(batch, on, layout, model=mixer, documents=documents)[1]


def assert_equals_truth(case, attend, mixer, mesh, layout):
    sharded, expected = shard_case(case, mixer, mesh, layout), truth(case, mesh.size())
    inputs = {
        name: (sharded.shard(x) if name in of_tokens(case) else x.clone()).requires_grad_()
        for name, x in expected.inputs.items()
    }
    q, k, v, *rest = inputs.items()
    out = attend(q[1], k[1], v[1], sharded.attn_metadata, **dict(rest))
    assert_close(out, sharded.shard(expected.out))
    grads = torch.autograd.grad(out, [*inputs.values()], sharded.shard(expected.grad_out))
    for name, grad in zip(inputs, grads, strict=True):
        if name in of_tokens(case):
            assert_close(grad, sharded.shard(expected.grads[name]), msg=lambda m: f"{name}: {m}")  # noqa: B023
        else:
            dist.all_reduce(grad)  # a parameter: each rank has the share of its own queries
            assert_close(grad, expected.grads[name], msg=lambda m: f"{name}: {m}")  # noqa: B023


def cases(num_ranks):
    heads = {"heads": 6, "kv_heads": 3} if num_ranks == 3 else {}
    return (
        BiasCase(**heads),
        BiasCase(BIDIRECTIONAL, packings.two_rows, slope=True, **heads),
        BiasCase(WINDOW, packings.last_shard_padding, table=False, slope=True, **heads),
        BiasCase(BIDIRECTIONAL, softcap=1.5, value_dim=6, **heads),
        BiasCase(packing=packings.last_shard_padding, hides=True, **heads),
        BiasCase(softcap=1.5, hides=True, **heads),
        BiasCase(table=False, relative=7, **heads),
        BiasCase(WINDOW, packings.two_rows, relative=11, slope=True, own_sinks=True, **heads),
        BiasCase(BIDIRECTIONAL, packings.two_rows, table=False, relative=60, value_dim=6, **heads),
        BiasCase(packing=packings.last_shard_padding, own_sinks=True, **heads),
        BiasCase(WINDOW_AND_SINKS, relative=7, slope=True, own_sinks=True, **heads),
    )


@pytest.mark.slow_where(lambda ranks: ranks in (1, 4))
@spmd(ranks=(1, 2, 3, 4))
def test_bias_equals_one_device(mesh, ranks):
    """Tables and slopes with all gradients, on every strategy; distances across ranks."""
    inner = 2 if ranks % 2 == 0 else 1
    styles = (
        RingAttention(),
        AllGatherAttention(boundary=EagerIsland()),
        HaloAttention(7),
        UlyssesAttention(),
        HybridAttention(inner_ranks=inner),
    )
    for (i, style), (j, case) in product(enumerate(styles), enumerate(cases(ranks))):
        if isinstance(style, HaloAttention) and case.mask_case is not WINDOW:
            continue
        mixer = mixer_on(mesh, in_tiles(style, 5), case.mask_case.mask, softcap=case.softcap)
        layout = (HeadTail, DocumentBalanced)[(i + j + ranks) % 2]
        assert_equals_truth(case, mixer, mixer, mesh, layout)


def test_bias_on_one_device_equals_a_dense_one():
    for case in cases(1):
        mixer = SoftmaxAttention(case.mask_case.mask, softcap=case.softcap)
        expected = truth(case, 1)
        inputs = {name: x.clone().requires_grad_() for name, x in expected.inputs.items()}
        (_, q), (_, k), (_, v), *rest = inputs.items()
        metadata = batch_metadata(mixer, case.packing(SEQ_LEN, 1))
        out = mixer(q, k, v, metadata, **dict(rest))
        assert_close(out, expected.out)
        grads = torch.autograd.grad(out, [*inputs.values()], expected.grad_out)
        assert_close(dict(zip(inputs, grads, strict=True)), expected.grads)


@spmd(axes={"cp": 2, "tp": 2})
def test_bias_with_heads_sharded_is_of_each_ranks_own_heads(mesh):
    case = BiasCase(BIDIRECTIONAL, packings.two_rows, slope=True, relative=9, own_sinks=True)
    mixer = mixer_on(mesh["cp", "tp"], RingAttention(), case.mask_case.mask)
    sharded, expected = shard_case(case, mixer, mesh["cp"], HeadTail), truth(case, 2)
    tp = mesh["tp"].get_local_rank()
    local = {}
    for name, x in expected.inputs.items():
        has_tokens = name in of_tokens(case)
        x = sharded.shard(x) if has_tokens else x
        own = x if name == "profiles" else x.chunk(2, dim=2 if has_tokens else 0)[tp]
        local[name] = own.clone().requires_grad_()
    q, k, v, *rest = local.items()
    out = mixer(q[1], k[1], v[1], sharded.attn_metadata, **dict(rest))
    assert_close(out, sharded.shard(expected.out).chunk(2, dim=2)[tp])
    grad_out = sharded.shard(expected.grad_out).chunk(2, dim=2)[tp]
    grads = torch.autograd.grad(out, [*local.values()], grad_out)
    for name, grad in zip(local, grads, strict=True):
        whole = expected.grads[name]
        if name in of_tokens(case):
            assert_close(grad, sharded.shard(whole).chunk(2, dim=2)[tp])
        elif name == "profiles":  # those of all heads: a share of each rank
            dist.all_reduce(grad)
            assert_close(grad, whole)
        else:
            dist.all_reduce(grad, group=mesh["cp"].get_group())
            assert_close(grad, whole.chunk(2)[tp])


@spmd(ranks=(2, 4))
def test_bias_of_queries_travels_with_them_by_heads_and_stays_with_them_in_a_ring(mesh, ranks):
    """3 channels and a sink for each query that is traded, both ways; none where keys travel."""
    case = BiasCase(table=False, relative=7, own_sinks=True)
    for style, trading in (
        (RingAttention(), 1),
        (AllGatherAttention(), 1),
        (UlyssesAttention(), ranks),
        (HybridAttention(inner_ranks=2), 2),
    ):
        mixer = mixer_on(mesh, style, CAUSAL.mask)
        sharded = shard_case(case, mixer, mesh, HeadTail)
        local = {
            name: (sharded.shard(x) if name in of_tokens(case) else x).clone().requires_grad_()
            for name, x in truth(case, ranks).inputs.items()
        }
        shape = AttentionShape(1, case.heads, case.kv_heads, 8, case.value_dim, 8)
        seen = {}
        for more in (0, 3 + 1):
            x = {n: y for n, y in local.items() if more or n in ("q", "k", "v")}
            q, k, v, *rest = x.items()
            with count_traffic() as forward:
                out = mixer(q[1], k[1], v[1], sharded.attn_metadata, **dict(rest))
            with count_traffic() as backward:
                torch.autograd.grad(out.sum(), [*x.values()])
            moves = style.moves(
                mixer,
                sharded.coords,
                sharded.layout,
                mesh.get_local_rank(),
                replace(shape, beside_query=more),
            )
            seen[more] = (forward.received, backward.received)
            assert seen[more] == (moves.received.forward, moves.received.backward)
        added = (trading - 1) * sharded.layout.shard_len * case.heads * 4 * 8 // trading
        assert seen[4] == (seen[0][0] + added, seen[0][1] + added)


class Block(nn.Module):
    """A mixer between per-token operations that cancel: a small block to compile."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, q, k, v, attn_metadata, **per_head):
        return -self.mixer(-q, -k, -v, attn_metadata, **per_head)


@spmd(ranks=2)
def test_compiled_bias_is_one_graph_for_all_batches(mesh):
    for style in (RingAttention(), UlyssesAttention()):
        torch._dynamo.reset()
        mixer = mixer_on(mesh, style, CAUSAL.mask)
        attend = torch.compile(Block(mixer), backend="aot_eager", fullgraph=True)
        with count_graphs() as graphs:
            for packing in (packings.across_borders, packings.one_document):
                case = BiasCase(packing=packing, relative=20, own_sinks=True)
                assert_equals_truth(case, attend, mixer, mesh, HeadTail)
        assert (graphs.graphs, graphs.breaks) == (1, 0)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return out


def test_bias_makes_nothing_as_large_as_queries_times_keys():
    """A tile of 128 queries, and the keys that it sees, are the most that is made at once."""
    length, heads = 8192, 1
    mixer, documents = SoftmaxAttention(WINDOW.mask), Documents.single(1, length)
    metadata = batch_metadata(mixer, documents)
    q, k, v = (torch.randn(1, length, heads, 8).requires_grad_() for _ in range(3))
    bias, slope = torch.randn(heads, 19).requires_grad_(), torch.ones(heads).requires_grad_()
    with _Largest() as largest:
        relative, profiles = (torch.randn_like(q) for _ in range(2))
        profiles = profiles[0, :5, 0].T.contiguous().requires_grad_()
        biases = {"bias": bias, "slope": slope, "relative": relative.requires_grad_()}
        biases["profiles"] = profiles
        out = mixer(q, k, v, metadata, **biases)
        torch.autograd.grad(out.sum(), (q, k, v, *biases.values()))
    assert 0 < largest.elements <= 16 * length < length * length // 100


def test_bias_of_t5_has_buckets_that_widen_with_the_distance():
    """Eight a side: 0 to 3 by themselves, then shared up to 20, from where on all have the last."""
    weight = torch.arange(16.0)[:, None]
    table = t5_distance_bias(weight, bidirectional=True, max_distance=20)[0]
    left = [0, 1, 2, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, 7]
    assert table[20 - torch.arange(15)].tolist() == left
    assert table[21:].tolist() == [8 + x for x in table[:20].flip(0).tolist()]
    one_sided = t5_distance_bias(weight[:8], bidirectional=False, max_distance=20)[0]
    assert one_sided[:21].tolist() == table[:21].tolist() and not one_sided[21:].any()


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [False, True])
def test_bias_of_t5_is_that_of_transformers(bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    for buckets, far in ((32, 128), (8, 20), (32, 64)):
        weight = torch.randn(buckets, 3, dtype=torch.float64, requires_grad=True)
        table = t5_distance_bias(weight, bidirectional=bidirectional, max_distance=far)
        distance = torch.arange(-2 * far, 2 * far + 1)
        theirs = T5Attention._relative_position_bucket(
            distance, bidirectional=bidirectional, num_buckets=buckets, max_distance=far
        )
        assert_close(table[:, distance.clamp(-far, far) + far], weight[theirs].T)
        assert table.shape == (3, 2 * far + 1)


@pytest.mark.slow
def test_bias_of_alibi_is_that_of_transformers():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in (1, 4, 8, 12, 20):
        alibi = build_alibi_tensor(torch.ones(1, 6), heads, torch.float32)  # [H, 1, S]
        assert_close(alibi_slopes(heads)[:, None] * torch.arange(6), alibi[:, 0])


class _Devices(TorchDispatchMode):
    """Where the results of operations are."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.types.add(out.device.type)
        return out


def test_bias_of_t5_and_of_alibi_is_made_on_their_device():
    """Each layer makes its own, and the host would wait for a GPU that it copies to."""
    with _Devices() as devices:
        t5_distance_bias(torch.empty(8, 3, device="meta"), bidirectional=True, max_distance=20)
        alibi_slopes(12, device="meta")
    assert devices.types == {"meta"}


def test_bias_is_done_by_the_backends_that_say_so():
    demand = replace(HOPPER, bias=frozenset({"table"}))
    for backend in BACKENDS:
        able = any(x.bias for abilities in backend.on.values() for x in abilities)
        assert (
            (refusal(backend, demand) is None) == able == (backend.name in ("triton", "reference"))
        )
    choice = choose_kernel(demand, "auto", lambda backend, demand: None)
    assert choice.backend.name == "triton" and "a score bias" in str(choice)
    assert ("cudnn", "has no score bias") in choice.passed_over
    with pytest.raises(ValueError, match=r"kernel='cudnn', which has no score bias"):
        choose_kernel(demand, "cudnn", lambda backend, demand: None)


def test_bias_of_other_shapes_is_refused():
    mixer, documents = SoftmaxAttention(Causal()), Documents.single(1, 4)
    metadata, q = batch_metadata(mixer, documents), torch.zeros(1, 4, 2, 8)
    for name, x, match in [
        ("bias", torch.zeros(2, 4), r"from -R to R tokens, got bias.shape=\(2, 4\)"),
        ("bias", torch.zeros(1, 5), r"with 2 heads"),
        ("bias", torch.zeros(2, 4, 4), r"give \[H, 2 R \+ 1\]"),
        ("slope", torch.zeros(3), r"got slope.shape=\(3,\) with 2 heads"),
    ]:
        with pytest.raises(ValueError, match=match):
            mixer(q, q, q, metadata, **{name: x})
    with pytest.raises(TypeError, match="A score bias"):
        mixer(q, q, q, metadata, slope=torch.ones(2, dtype=torch.int64))
    for sink in (torch.zeros(1, 3, 2), torch.zeros(1, 4, 2, dtype=torch.float64)):
        with pytest.raises(
            ValueError, match="sinks of their own have one per head, in their dtype"
        ):
            mixer(q, q, q, metadata, sink=sink)
    with pytest.raises(TypeError, match=r"relative of torch.float64 with q of torch.float32"):
        mixer(q, q, q, metadata, relative=q.double(), profiles=torch.zeros(8, 3))
    for relative, profiles in (
        (q, None),
        (None, torch.zeros(8, 3)),
        (q[0], torch.zeros(8, 3)),
        (q[:, :3], torch.zeros(8, 3)),
        (q, torch.zeros(7, 3)),
        (q, torch.zeros(8, 3, 1)),
        (q, torch.zeros(8, 0)),
    ):
        with pytest.raises(ValueError, match=r"give both, relative \[B, L, H, C\]"):
            mixer(q, q, q, metadata, relative=relative, profiles=profiles)
    cross = CrossAttention()
    metadata = batch_metadata(cross, documents, memory=documents)
    with pytest.raises(ValueError, match="two tokens of one sequence"):
        cross(q, q, q, metadata, slope=torch.ones(2))
    for wrong in ({"max_distance": 4}, {"max_distance": 0}):
        with pytest.raises(ValueError, match="two buckets or more a side"):
            t5_distance_bias(torch.zeros(8, 2), bidirectional=False, **wrong)
    assert math.isclose(float(alibi_slopes(8)[0]), 0.5)

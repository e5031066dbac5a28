"""What is kept for backward, and what is never made."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.profiler import profile

from dtcp.batch import shard_batch
from dtcp.compile import EagerIsland, InGraph
from dtcp.distributed.mesh import ParallelMesh
from dtcp.kernels.dtypes import accumulation
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.softmax import (
    AllGatherAttention,
    HaloAttention,
    HybridAttention,
    RingAttention,
    UlyssesAttention,
)
from tests.harness import packings
from tests.harness.attention_parity import (
    CAUSAL,
    WINDOW,
    Block,
    Case,
    local_inputs,
    mixer_on,
    shard_case,
    styles,
)
from tests.harness.spmd import spmd


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """Bytes of the floating-point memory that autograd keeps, by address."""
    kept: dict[int, int] = {}

    def pack(x):
        local = x._local_tensor if isinstance(x, DTensor) else x
        if local.is_floating_point():
            storage = local.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def local_bytes(case, sharded, kv_copies=1):
    """q, k, v, out and lse of one rank, and its sinks."""
    tokens = sharded.documents.batch * sharded.layout.shard_len
    size = torch.finfo(case.dtype).bits // 8
    query = case.heads * (case.key_dim + case.value_dim) * size
    key = case.kv_heads * (case.key_dim + case.value_dim) * size * kv_copies
    lse = case.heads * accumulation(case.dtype).itemsize
    return tokens * (query + key + lse) + case.heads * size * case.sink


def halo_bytes(case, sharded, style):
    """The tokens left of one segment, which a window's backward reads again."""
    tokens = sharded.documents.batch * (style.window - 1 + style.right)
    return tokens * case.kv_heads * (case.key_dim + case.value_dim) * case.dtype.itemsize


@pytest.mark.slow_where(lambda boundary: isinstance(boundary, EagerIsland))
@pytest.mark.parametrize("boundary", [None, InGraph(), EagerIsland()])
@spmd(ranks=2)
def test_kept_for_backward_is_at_most_what_is_local(mesh, boundary):
    """q, k, v, out and lse; Ulysses keeps copies where ranks share a kv head."""
    kinds = (2, 1) if boundary is None else (1,)
    for style, kv_heads in product(styles(2, boundary=boundary or InGraph()), kinds):
        case = Case(WINDOW, packings.two_rows, heads=4, kv_heads=kv_heads, dtype=torch.float32)
        torch._dynamo.reset()
        mixer = mixer_on(mesh, style, WINDOW.mask)
        sharded = shard_case(case, mixer, mesh, Contiguous)
        attend = mixer
        if boundary is not None:
            whole = isinstance(boundary, InGraph)
            attend = torch.compile(Block(mixer), backend="aot_eager", fullgraph=whole)
        q, k, v, sink = local_inputs(case, sharded)
        with saved_bytes() as kept:
            out = attend(q, k, v, sharded.attn_metadata, sink=sink)
        shares_heads = isinstance(style, UlyssesAttention | HybridAttention)
        copies = 2 // kv_heads if shares_heads else 1
        bound = local_bytes(case, sharded, copies)
        if isinstance(style, HaloAttention):
            bound += halo_bytes(case, sharded, style)
        assert bound / 2 < sum(kept.values()) <= bound, f"{style}"
        out.sum().backward()


def largest_allocation(work):
    """Bytes of the largest piece of memory that was taken while the work ran."""
    with profile(profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"value_dim": 4}], ids=repr)
@spmd(ranks=2)
def test_nothing_of_the_size_of_a_score_table_is_made(mesh, options):
    """Not even one byte for each of L x S pairs; making the metadata of the batch counts too."""
    seq_len, row = 4096, 2 * 4 * 4
    for index, style in enumerate(styles(2)):
        windowed = isinstance(style, HaloAttention) or (index + len(options)) % 2
        mask = Causal() & SlidingWindow(7) if windowed else Causal()
        softmax = {"softcap": options.get("softcap", 0.0)}
        mixer = mixer_on(mesh, style, mask, **softmax)
        documents = Documents(((seq_len // 2 + 5, seq_len // 4),), seq_len)
        batch = {"input_ids": torch.zeros(1, seq_len, dtype=torch.int64)}
        whole = ParallelMesh.from_device_mesh(mesh)

        def step():
            _, sharded = shard_batch(batch, whole, HeadTail, model=mixer, documents=documents)  # noqa: B023
            shape = (1, sharded.layout.shard_len, 2, 8)
            q, k = (torch.randn(shape, requires_grad=True) for _ in range(2))
            v = torch.randn(*shape[:3], options.get("value_dim", 8), requires_grad=True)
            mixer(q, k, v, sharded.attn_metadata).sum().backward()  # noqa: B023

        largest = largest_allocation(step)
        assert seq_len // 2 * row <= largest < seq_len // 2 * seq_len, f"{style}"


@spmd(ranks=4)
def test_ring_holds_two_shards_of_keys_and_no_more(mesh):
    """However many ranks there are; one exchange for all holds the whole sequence."""
    seq_len, heads, dim = 2048, 2, 256
    documents = Documents.single(1, seq_len)
    batch = {"input_ids": torch.zeros(1, seq_len, dtype=torch.int64)}
    whole, largest = ParallelMesh.from_device_mesh(mesh), {}
    for style in (RingAttention(), AllGatherAttention(), HybridAttention()):
        mixer = mixer_on(mesh, style, CAUSAL.mask)
        _, sharded = shard_batch(batch, whole, HeadTail, model=mixer, documents=documents)
        q, k, v = (torch.randn(1, seq_len // 4, heads, dim) for _ in range(3))
        largest[type(style)] = largest_allocation(lambda: mixer(q, k, v, sharded.attn_metadata))  # noqa: B023
    shard = seq_len // 4 * heads * dim * 4
    assert largest[RingAttention] <= 2 * shard
    assert largest[AllGatherAttention] >= 4 * shard

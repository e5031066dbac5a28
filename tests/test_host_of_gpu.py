"""What the host does with a GPU: a step waits for nothing, streams and memory are in order.

On a GPU that is not there (tests/harness/gpu_launches.py): real planning, real launches of our own
kernels and fla's, no numbers.
"""

from functools import partial

import pytest
import torch

from benchmarks.gpu import shared
from dtcp._torch.fakes import fake_ranks
from dtcp.batch import shard_batch
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.parallelize.plans.families import FAMILIES
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention
from tests.harness import packings
from tests.harness.attention_parity import (
    CAUSAL,
    IMAGES,
    LAYOUTS,
    WINDOW,
    WINDOW_AND_SINKS,
    Case,
    accepts,
    mixer_on,
    styles,
)
from tests.harness.host_of_gpu import host_of_gpu
from tests.harness.mixer_cases import DOCUMENTS, MEMORY, mixer_cases

RANKS = 4
TWO_TIER = [RingAttention(ranks_per_node=2), AllGatherAttention(ranks_per_node=2)]
STYLES = {f"{each.op.name}{each.ranks_per_node}": each for each in [*styles(RANKS), *TWO_TIER]}

on_gpu = partial(torch.zeros, device="cuda", dtype=torch.bfloat16)
leaf = partial(on_gpu, requires_grad=True)


@pytest.mark.parametrize("name", mixer_cases())
def test_a_mixer_on_one_gpu_waits_for_nothing(name):
    case = mixer_cases()[name]
    metadata = batch_metadata(case.mixer, DOCUMENTS, memory=MEMORY if case.memory else None)
    with host_of_gpu() as gpu:
        leaves = {name: leaf(shape) for name, shape in case.shapes.items()}
        inputs = {name: case.prepared.get(name, lambda x: x)(x) for name, x in leaves.items()}
        out = case.mixer(**inputs, attn_metadata=metadata.to("cuda"))
        torch.autograd.grad(out, list(leaves.values()), torch.zeros_like(out))
    assert gpu.kernels and not gpu.found


@pytest.mark.slow_where(lambda layout, **_: layout not in (Contiguous, HeadTail))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STYLES)
def test_ranks_on_gpus_wait_for_nothing_and_share_memory_in_order(name, layout):
    """Rank 1 of four, over NCCL: masks that kernels of others take, and one that they do not."""
    for mask_case in (CAUSAL, WINDOW, IMAGES, WINDOW_AND_SINKS):
        for packing in (packings.one_document, packings.across_borders):
            case = Case(mask_case, packing, seq_len=128 * RANKS)
            for flash in (False, True) if accepts(STYLES[name], layout, case, RANKS) else ():
                check_ranks(STYLES[name], layout, case, flash)


def test_a_rank_whose_share_of_a_transfer_is_empty_waits_for_what_replicas_add_up():
    """One key, fetched by the other of two ranks: gradients of it were overwritten on their way."""
    case = Case(CAUSAL, lambda *_: Documents(((255, 257),), 512), seq_len=512)
    style = HybridAttention(inner_ranks=2, ranks_per_node=2)
    check_ranks(style, Contiguous, case, flash=False, kv_heads=1, rank=2)


def check_ranks(style, layout, case, flash, *, kv_heads=2, rank=1):
    documents = case.documents(RANKS)
    batch = {
        "input_ids": torch.zeros(documents.batch, documents.seq_len, dtype=torch.int64),
        "block": packings.blocks_of_tokens(documents),
    }
    with fake_ranks(RANKS, rank), host_of_gpu(flash=flash) as gpu:
        mesh = ParallelMesh.from_degrees(Degrees(cp=RANKS), "cuda")
        mixer = mixer_on(mesh.cp, style, case.mask_case.mask)
        sharded = sharded_on(mesh, layout, mixer, batch, documents)[1]
        length = sharded.layout.shard_len
        q, k, v = (leaf(documents.batch, length, heads, 64) for heads in (4, kv_heads, kv_heads))
        sink = leaf(4)
        out = mixer(q, k, v, sharded.attn_metadata, sink=sink)
        torch.autograd.grad(out, (q, k, v, sink), torch.zeros_like(out))
        del out
        # What was given back by then is looked at when there is need for more.
        on_gpu(1)
    assert gpu.kernels["nccl"] and not gpu.found, (case, gpu.found)
    assert bool(gpu.kernels["flash4 backward"]) is flash


def sharded_on(mesh, layout, model, batch, documents):
    # Nobody answers, so nobody can say that the rows are the same.
    options = {"device": "cuda", "compare_ranks": False}
    return shard_batch(batch, mesh, layout, model=model, documents=documents, **options)


@pytest.mark.parametrize(
    ("family", "strategy", "layout"),
    [
        ("llama", UlyssesAttention, HeadTail),
        ("gemma4", AllGatherAttention, DocumentBalanced),
        ("qwen3_5", RingAttention, PerDocument),
        ("deepseek_v4", RingAttention, Contiguous),
    ],
)
def test_a_step_of_a_model_on_gpus_waits_for_nothing(family, strategy, layout):
    config = shared.TINY[family]
    batch, documents = shared._batch(config.vocab_size)
    with fake_ranks(RANKS, 1), host_of_gpu() as gpu:
        mesh = ParallelMesh.from_degrees(Degrees(cp=RANKS), "cuda")
        with torch.device("meta"):
            model = FAMILIES[family].model(config).bfloat16()
        apply_plan(model, mesh.cp, FAMILIES[family].plan(config, mesh, strategy, layout).cp)
        # A plan is applied once, and ranks compare what they know.
        gpu.found.clear()
        local, sharded = sharded_on(mesh, layout, model, batch, documents)
        tokens = global_token_count(local["labels"], mesh.loss)
        logits = model(local["input_ids"], local["position_ids"], sharded.attn_metadata)
        token_mean_loss(logits, local["labels"], tokens).backward()
    assert gpu.kernels["nccl"] and not gpu.found, gpu.found

"""Results that do not depend on the number of ranks, to the last bit, nor on the run."""

import copy

import pytest
import torch
from torch import nn

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import ParallelMesh
from dtcp.loss import token_log_probs
from dtcp.metadata import BatchMetadata
from dtcp.mixer_metadata import batch_metadata
from dtcp.models import gemma4, llama
from dtcp.parallelize import gemma4_plan, llama_plan, parallelize
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.softmax import (
    AllGatherAttention,
    HaloAttention,
    HybridAttention,
    RingAttention,
    UlyssesAttention,
)
from dtcp.softmax.metadata import local_metadata
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness import packings
from tests.harness.attention_parity import (
    CAUSAL,
    LAYOUTS,
    WINDOW,
    Case,
    accepts,
    in_tiles,
    local_inputs,
    mixer_on,
    run,
    shard_case,
    styles,
)
from tests.harness.spmd import spmd

DOCUMENTS = Documents(((300, 1, 723), (1024,)), 1024)
FAMILIES = {
    "llama": (llama.Llama, llama.PRESETS["tiny"], llama_plan),
    "gemma4": (gemma4.Gemma4, gemma4.PRESETS["tiny"], gemma4_plan),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@spmd(ranks=2)
def test_logits_of_gathered_keys_are_one_devices_to_the_bit(mesh, family, dtype):
    """Chunks are whole tiles of queries, and a tile takes its keys in token order, as on one."""
    build, config, plan = FAMILIES[family]
    model = build(config)
    model.init_weights()
    alone = copy.deepcopy(model).to(dtype)
    ids = torch.randint(config.vocab_size, (2, 1024))
    position_ids = DOCUMENTS.position_ids()
    expected = alone(ids, position_ids, batch_metadata(alone, DOCUMENTS))
    on_cp = ParallelMesh.from_device_mesh(mesh)
    parallelize(model.to(dtype), on_cp, plan(config, on_cp, AllGatherAttention()))
    rows = {"input_ids": ids, "position_ids": position_ids}
    for layout in (HeadTail, Contiguous):
        local, sharded = shard_batch(rows, on_cp, layout, model=model, documents=DOCUMENTS)
        logits = model(local["input_ids"], local["position_ids"], sharded.attn_metadata)
        assert torch.equal(sharded.gather(logits), expected)
        log_probs = sharded.gather(token_log_probs(logits, local["input_ids"]))
        assert torch.equal(log_probs, token_log_probs(expected, ids))


TILE, SEQ_LEN = 32, 512
MANY = Documents(((70, 41, 66, 1, 57, 45, 62, 50, 39, 81),), SEQ_LEN)
"""Some borders are worth cutting a tile at, others are not."""
ONE, ALIKE_AT_FIRST = Documents.single(1, SEQ_LEN), Documents(((512,), (400, 112)), SEQ_LEN)
WINDOWED = Causal() & SlidingWindow(40)


def results(mixer, metadata, inputs, grad_out):
    """out, and the gradients of q, k and v."""
    q, k, v, sink = (None if x is None else x.detach().requires_grad_() for x in inputs)
    out = mixer(q, k, v, metadata, sink=sink)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out))


def differing(mesh, style, layout, documents, mask, *, sink=False, softcap=0.0):
    """Which results on ranks are not one device's to the bit, of out, dq, dk and dv."""
    shape = (documents.batch, SEQ_LEN, 4, 16)
    q, k, v, grad_out = (torch.randn(shape) for _ in range(4))
    of_heads = torch.randn(4) if sink else None
    alone = SoftmaxAttention(mask, softcap=softcap)
    whole = local_metadata(KeyIntervals.of(mask, Coords.of(documents)), tile=TILE)
    metadata = BatchMetadata({alone.metadata_key: whole})
    expected = results(alone, metadata, (q, k, v, of_heads), grad_out)
    mixer = mixer_on(mesh, in_tiles(style, TILE), mask, softcap=softcap)
    rows = {"input_ids": torch.zeros(shape[:2], dtype=torch.int64)}
    on_cp = ParallelMesh.from_device_mesh(mesh)
    _, sharded = shard_batch(rows, on_cp, layout, model=nn.Sequential(mixer), documents=documents)
    own = (*(sharded.shard(x) for x in (q, k, v)), of_heads)
    actual = results(mixer, sharded.attn_metadata, own, sharded.shard(grad_out))
    names = ("out", "dq", "dk", "dv")
    return [
        name
        for name, ours, right in zip(names, actual, expected, strict=True)
        if not torch.equal(sharded.gather(ours), right)
    ]


@pytest.mark.parametrize("layout", [HeadTail, Contiguous])
@spmd(ranks=4)
def test_attention_with_gathered_keys_is_one_devices_to_the_bit_in_whole_tiles(mesh, layout):
    """Gradients of keys, which ranks sum, need not be; a ring, which merges, is not."""
    gathers, sums = AllGatherAttention(), {"dk", "dv"}
    for documents, mask, params in (
        (MANY, Causal(), {}),
        (ALIKE_AT_FIRST, Causal(), {}),
        (ONE, Causal(), {"softcap": 20.0}),
        (MANY, WINDOWED, {"sink": True}),
    ):
        assert sums.issuperset(differing(mesh, gathers, layout, documents, mask, **params))
    assert sums.issuperset(differing(mesh, HaloAttention(40), layout, MANY, WINDOWED))
    groups = HybridAttention(outer=gathers, inner_ranks=2)
    assert sums.issuperset(differing(mesh, groups, layout, ONE, Causal()))
    assert "out" in differing(mesh, RingAttention(), layout, ONE, Causal())


@pytest.mark.parametrize("layout", [HeadTail, DocumentBalanced])
@spmd(ranks=4)
def test_attention_by_heads_is_one_devices_to_the_bit_with_every_gradient(mesh, layout):
    for mask in (Causal(), WINDOWED):
        assert differing(mesh, UlyssesAttention(), layout, ONE, mask) == []


@spmd(ranks=4)
def test_a_second_run_has_the_same_bits(mesh):
    """Every strategy in every layout, with every gradient; torch would refuse what has not."""
    torch.use_deterministic_algorithms(True)
    for mask_case in (CAUSAL, WINDOW):
        case = Case(mask_case, packings.across_borders, dtype=torch.float32)
        for style in styles(4):
            for layout in (*LAYOUTS, DocumentBalanced):
                if not accepts(style, layout, case, 4):
                    continue
                mixer = mixer_on(mesh, in_tiles(style, 5), mask_case.mask)
                sharded = shard_case(case, mixer, mesh, layout)
                first, second = (
                    run(case, mixer, sharded, local_inputs(case, sharded)) for _ in range(2)
                )
                assert torch.equal(first.out, second.out), (style, layout)
                assert all(map(torch.equal, first.grads, second.grads)), (style, layout)


@spmd(ranks=4)
def test_no_sum_of_gradients_adds_to_a_place_twice_in_one_call(mesh):
    """On a GPU such a call adds by atomics, as they come: other bits in every run."""
    add, twice, calls = torch.Tensor.index_add_, [], []

    def watched(sums, dim, index, source):
        calls.append(len(index))
        twice.append(len(index) - len(index.unique()))
        return add(sums, dim, index, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "index_add_", watched)
        case = Case(CAUSAL, packings.one_document, dtype=torch.float32)
        for style in (
            AllGatherAttention(),
            AllGatherAttention(ranks_per_node=2),
            RingAttention(),
            RingAttention(ranks_per_node=2),
        ):
            mixer = mixer_on(mesh, style, case.mask_case.mask)
            sharded = shard_case(case, mixer, mesh, Contiguous)
            run(case, mixer, sharded, local_inputs(case, sharded))
    assert sum(twice) == 0 and (sum(calls) > 0 or mesh.get_local_rank() == 3)

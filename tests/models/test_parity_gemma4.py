"""A parallel Gemma 4 equals transformers', document by document: logits and every gradient."""

import pytest
import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Replicate
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.compile import EagerIsland, count_graphs
from dtcp.distributed.ledger import Traffic, count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.models.gemma4 import Gemma4
from dtcp.parallelize import (
    ActivationCheckpoint,
    Compile,
    FullCheckpoint,
    NoCheckpoint,
    SelectiveCheckpoint,
    gemma4_plan,
    parallelize,
)
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.softmax import AllGatherAttention, RingAttention
from dtcp.softmax.style import AttentionStyle
from tests.harness.hf_gemma4 import ROWS, SEQ_LEN, VARIANTS, Truth, truth
from tests.harness.parity import gradients
from tests.harness.spmd import run_ranks

RING, KEEP_ALL, GRAPHS = RingAttention(), NoCheckpoint(), Compile("aot_eager")
ISLAND = RingAttention(boundary=EagerIsland())


def step_on_mesh(
    mesh: object,
    expected: Truth,
    degrees: Degrees,
    *,
    attention: AttentionStyle = RING,
    layout: type[SequenceLayout] = HeadTail,
    checkpoint: ActivationCheckpoint = KEEP_ALL,
    compile: Compile | None = None,
) -> tuple[Traffic, int, int]:
    """One step; asserts on every rank. Returns what it moved, its graphs and its breaks."""
    config = expected.config
    model = Gemma4(config).double()
    model.load_state_dict(expected.weights)
    ranks = ParallelMesh.from_degrees(degrees, "cpu")
    plan = gemma4_plan(config, ranks, attention)
    parallelize(model, ranks, plan, activation_checkpoint=checkpoint, compile=compile)

    mine = slice(ranks.rank("batch"), None, ranks.size("batch"))
    batch = {"input_ids": expected.input_ids, "position_ids": expected.position_ids}
    if expected.mm_token_type_ids is not None:
        batch["mm_token_type_ids"] = expected.mm_token_type_ids
    local, sharded = shard_batch(
        {key: x[mine] for key, x in batch.items()},
        ranks,
        layout,
        model=model,
        documents=Documents(ROWS[mine], SEQ_LEN),
    )
    with count_graphs() as counted, count_traffic() as traffic:
        logits = model(local["input_ids"], local["position_ids"], sharded.attn_metadata)
        if isinstance(logits, DTensor):
            logits = logits.full_tensor(grad_placements=[Replicate()])
        logits.backward(sharded.shard(expected.grad_logits[mine]))
    real = sharded.shard(Documents(ROWS[mine], SEQ_LEN).document(), pad=-1) >= 0
    assert_close(logits[real], sharded.shard(expected.logits[mine])[real])
    actual = gradients(model)
    assert_close(actual, {name: expected.gradients[name] for name in actual})
    dist.barrier()
    return traffic, counted.graphs, counted.breaks


def on_ranks(
    variant: str, degrees: Degrees, *, small: bool = False, **options: object
) -> list[tuple[Traffic, int, int]]:
    """The step on all ranks; the truth is computed here, where transformers is imported."""
    expected = truth(variant, small=small)
    return run_ranks(step_on_mesh, degrees.world, expected, degrees, **options)


@pytest.mark.parametrize(("cp", "variant"), [(2, "dense"), *((3, each) for each in VARIANTS)])
def test_gemma4_on_cp_ranks_equals_the_published_model(cp, variant):
    """HeadTail on two ranks, Contiguous on three, where a halo comes from two ranks."""
    layout = HeadTail if cp == 2 else Contiguous
    on_ranks(variant, Degrees(cp=cp), layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_gemma4_on_balanced_documents_equals_the_published_model(variant):
    """Rows of different documents, each cut by itself, for windows and global layers together."""
    on_ranks(variant, Degrees(cp=3), layout=DocumentBalanced)


@pytest.mark.parametrize("variant", ["dense", "e", "vision"])
def test_gemma4_on_tp_ranks_equals_the_published_model(variant):
    """The others have tp beside cp, below: of them, experts have one kv head in global layers,
    replicated on both ranks."""
    on_ranks(variant, Degrees(tp=2))


@pytest.mark.parametrize(
    ("variant", "degrees", "attention", "layout", "checkpoint"),
    [
        ("dense", Degrees(cp=4), RING, HeadTail, FullCheckpoint()),
        ("vision", Degrees(cp=4), AllGatherAttention(), Contiguous, KEEP_ALL),
        ("e", Degrees(dp_shard=2, cp=2), RING, HeadTail, SelectiveCheckpoint()),
        ("moe", Degrees(cp=2, tp=2), AllGatherAttention(), HeadTail, SelectiveCheckpoint()),
        ("shared_values", Degrees(cp=2, tp=2), RING, Contiguous, SelectiveCheckpoint()),
        ("vision", Degrees(dp_replicate=2, cp=2), ISLAND, HeadTail, FullCheckpoint()),
    ],
)
def test_gemma4_on_four_ranks_equals_the_published_model(
    variant, degrees, attention, layout, checkpoint
):
    """Keys that layers share are gathered once, whatever is recomputed."""
    options = {"attention": attention, "layout": layout, "checkpoint": checkpoint}
    for traffic, *_ in on_ranks(variant, degrees, **options):
        shares = variant in ("e", "shared_values")
        assert traffic["dtcp::gather_shared_kv"].calls == 2 * shares


def test_gemma4_compiles_layers_that_share_keys():
    """A recomputed block gathers its keys a second time."""
    options = {"checkpoint": FullCheckpoint(), "compile": GRAPHS}
    for traffic, *counts in on_ranks("e", Degrees(cp=2), small=True, **options):
        assert counts == [2, 0]
        assert traffic["dtcp::gather_shared_kv"].calls == 2
        assert traffic["dtcp::gather_shared_kv_backward"].calls == 1


@pytest.mark.slow
def test_gemma4_gathers_shared_keys_in_islands():
    """Layers that attend to another's keys have the plan's boundary, like all others."""
    options = {"attention": ISLAND, "checkpoint": FullCheckpoint(), "compile": GRAPHS}
    for traffic, _, breaks in on_ranks("e", Degrees(cp=2), small=True, **options):
        assert traffic["dtcp::gather_shared_kv_backward"].calls == 1
        assert breaks > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "checkpoint", "kinds"),
    [("vision", SelectiveCheckpoint(), 2), ("e", FullCheckpoint(), 4), ("moe", KEEP_ALL, 2)],
)
def test_gemma4_compiles_to_one_graph_per_layer_kind(variant, checkpoint, kinds):
    """And equals the published model."""
    for _, graphs, breaks in on_ranks(
        variant, Degrees(cp=2), checkpoint=checkpoint, compile=GRAPHS
    ):
        assert (graphs, breaks) == (kinds, 0)


@pytest.mark.slow
def test_gemma4_compiles_around_islands_that_compute_keys_from_values():
    """One break per layer, two graphs per kind; the checkpoint keeps what was communicated."""
    options = {"attention": ISLAND, "checkpoint": SelectiveCheckpoint(), "compile": GRAPHS}
    for traffic, graphs, breaks in on_ranks("dense", Degrees(cp=2), **options):
        assert (graphs, breaks) == (4, 2)
        assert traffic["dtcp::ring_attention"].calls == 2
        assert traffic["dtcp::ring_attention_backward"].calls == 2
        # At most the other rank's values, and no keys, in each of the two global layers.
        heads = truth("dense").config.global_heads
        values = len(ROWS) * SEQ_LEN // 2 * heads.num_kv_heads * heads.head_dim
        received = traffic["dtcp::ring_attention"].received
        assert 0 < received <= 2 * values * torch.float64.itemsize

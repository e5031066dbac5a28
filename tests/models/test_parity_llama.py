"""A parallel dense decoder equals the one-device decoder: its loss, and every gradient."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dtcp.compile import EagerIsland, count_graphs
from dtcp.distributed.ledger import Traffic, count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.models.llama import Llama, LlamaConfig
from dtcp.parallelize import (
    ActivationCheckpoint,
    Compile,
    FullCheckpoint,
    NoCheckpoint,
    SelectiveCheckpoint,
    llama_plan,
    parallelize,
)
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.softmax import AllGatherAttention, RingAttention, UlyssesAttention
from dtcp.softmax.style import AttentionStyle
from tests.harness import parity
from tests.harness.parity import GRAPHS, ROWS, gradients, on_mesh, one_device
from tests.harness.spmd import spmd

CONFIG = replace(parity.CONFIG, num_layers=2)
RING, KEEP_ALL = RingAttention(), NoCheckpoint()


def assert_parity(
    degrees: Degrees,
    *,
    config: LlamaConfig = CONFIG,
    attention: AttentionStyle = RING,
    layout: type[SequenceLayout] = HeadTail,
    checkpoint: ActivationCheckpoint = KEEP_ALL,
    compile: Compile | None = None,
) -> Traffic:
    """Assert parity on ranks laid out as `degrees`; return what one step communicated."""
    reference = Llama(config).double()
    model = Llama(config).double()
    model.load_state_dict(reference.state_dict())
    mesh = ParallelMesh.from_degrees(degrees, "cpu")
    plan = llama_plan(config, mesh, attention)
    parallelize(model, mesh, plan, activation_checkpoint=checkpoint, compile=compile)

    torch.manual_seed(1)
    expected = one_device(reference, ROWS)
    torch.manual_seed(1)
    with count_traffic() as traffic:
        actual = on_mesh(model, mesh, ROWS, layout)
    assert_close(actual, expected)
    assert_close(gradients(model), gradients(reference))
    return traffic


TWO = [Degrees(cp=2), Degrees(tp=2), Degrees(dp_shard=2), Degrees(dp_replicate=2)]
FOUR = [
    (Degrees(cp=2, tp=2), FullCheckpoint()),
    (Degrees(dp_shard=2, cp=2), KEEP_ALL),
    (Degrees(dp_shard=2, tp=2), SelectiveCheckpoint(1)),
    (Degrees(dp_replicate=2, cp=2), SelectiveCheckpoint()),
    (Degrees(dp_replicate=2, tp=2), SelectiveCheckpoint()),
    (Degrees(cp=4), SelectiveCheckpoint(1)),
]
CHECKPOINTS = [FullCheckpoint(), SelectiveCheckpoint()]


@pytest.mark.parametrize("degrees", TWO)
@spmd(ranks=2)
def test_two_ranks_equal_one_device(mesh, degrees):
    assert_parity(degrees)


@pytest.mark.parametrize(("degrees", "checkpoint"), FOUR)
@spmd(ranks=4)
def test_four_ranks_equal_one_device(mesh, degrees, checkpoint):
    """Attention, with what it communicates, is recomputed only where everything is."""
    traffic = assert_parity(degrees, checkpoint=checkpoint)
    if degrees.cp > 1:
        assert traffic["dtcp::ring_attention"].calls == attended(checkpoint)


@pytest.mark.parametrize("degrees", [Degrees(tp=2), Degrees(dp_shard=2)])
@spmd(ranks=2)
def test_tied_embedding_stays_tied(mesh, degrees):
    """Its gradient is that of both its uses, split by vocabulary and sharded by FSDP."""
    assert_parity(degrees, config=replace(CONFIG, tied=True))


@pytest.mark.parametrize("layout", [Contiguous, HeadTail])
@pytest.mark.parametrize("attention", [AllGatherAttention(), UlyssesAttention()])
@spmd(ranks=2)
def test_every_strategy_and_layout_equals_one_device(mesh, attention, layout):
    assert_parity(Degrees(cp=2), attention=attention, layout=layout)


@pytest.mark.slow
@spmd(ranks=3)
def test_llama_on_balanced_documents_equals_one_device(mesh):
    assert_parity(Degrees(cp=3), layout=DocumentBalanced)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@spmd(ranks=2)
def test_compiled_block_is_one_graph_and_equals_one_device(mesh, checkpoint):
    with count_graphs() as counted:
        traffic = assert_parity(Degrees(cp=2), checkpoint=checkpoint, compile=GRAPHS)
    assert (counted.graphs, counted.breaks) == (1, 0)
    assert traffic["dtcp::ring_attention"].calls == attended(checkpoint)


@pytest.mark.slow_where(lambda checkpoint: isinstance(checkpoint, FullCheckpoint))
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@spmd(ranks=2)
def test_block_around_an_island_is_two_graphs_and_equals_one_device(mesh, checkpoint):
    """The checkpoint goes around: a break inside it would leave no graph at all."""
    attention = RingAttention(boundary=EagerIsland())
    with count_graphs() as counted:
        traffic = assert_parity(
            Degrees(cp=2), attention=attention, checkpoint=checkpoint, compile=GRAPHS
        )
    assert (counted.graphs, counted.breaks) == (2, 1)
    assert traffic["dtcp::ring_attention"].calls == attended(checkpoint)


@pytest.mark.parametrize(
    ("degrees", "attention", "checkpoint", "graphs"),
    [
        (Degrees(cp=2, tp=2), RingAttention(), SelectiveCheckpoint(1), 1),
        pytest.param(
            *(Degrees(cp=2, tp=2), RingAttention(boundary=EagerIsland()), FullCheckpoint(), 2),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(Degrees(dp_shard=2, cp=2), AllGatherAttention(), FullCheckpoint(), 1),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(Degrees(dp_replicate=2, tp=2), RingAttention(), NoCheckpoint(), 1),
            marks=pytest.mark.slow,
        ),
    ],
)
@spmd(ranks=4)
def test_compiled_on_four_ranks_equals_one_device(mesh, degrees, attention, checkpoint, graphs):
    with count_graphs() as counted:
        assert_parity(degrees, attention=attention, checkpoint=checkpoint, compile=GRAPHS)
    assert counted.graphs == graphs


@pytest.mark.slow
@spmd(ranks=2)
def test_inductor_equals_one_device(mesh):
    assert_parity(Degrees(cp=2), checkpoint=SelectiveCheckpoint(), compile=Compile("inductor"))


def attended(checkpoint: ActivationCheckpoint) -> int:
    """How often each rank attends in one step: once per layer, twice where all is recomputed."""
    return CONFIG.num_layers * (2 if isinstance(checkpoint, FullCheckpoint) else 1)

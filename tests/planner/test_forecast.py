"""What is forecast of a step is what real ranks count, to the byte, by axis and direction."""

import pytest
import torch
from torch import distributed as dist

from dtcp._torch import process_group
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.loss import token_mean_loss
from dtcp.models import deepseek_v4, gemma4, llama, qwen3_5
from dtcp.parallelize import FSDP, FullCheckpoint, NoCheckpoint, SelectiveCheckpoint, parallelize
from dtcp.planner.forecast import forecast
from dtcp.planner.setup import Precision, Setup
from dtcp.planner.step import axes_of
from dtcp.planner.subject import FamilyModel, HuggingFaceModel
from dtcp.planner.trace import Place, StepRecorder
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.softmax import (
    AllGatherAttention,
    HybridAttention,
    RingAttention,
    UlyssesAttention,
)
from tests.harness.hf_models import config_of
from tests.harness.spmd import run_ranks

FP32 = Precision(torch.float32, torch.float32, torch.float32)
DOCUMENTS = Documents(((150, 42, 64),), 256)
SUBJECTS = {
    "llama": lambda: FamilyModel("llama", "llama", llama.tiny()),
    "gemma4": lambda: FamilyModel("gemma4", "gemma4", gemma4.tiny()),
    "gemma4_e": lambda: FamilyModel("gemma4_e", "gemma4", gemma4.tiny_e()),
    "qwen3_5": lambda: FamilyModel("qwen3_5", "qwen3_5", qwen3_5.tiny(experts=True)),
    "deepseek_v4": lambda: FamilyModel("deepseek_v4", "deepseek_v4", deepseek_v4.tiny()),
    "hf": lambda: HuggingFaceModel("mistral", config_of("mistral")),
}


def counted(_, kind, setup):
    """(forward, backward) bytes that this rank receives in a real step, by axis."""
    subject, mesh = SUBJECTS[kind](), ParallelMesh.from_degrees(setup.degrees, "cpu")
    torch.manual_seed(0)
    model = subject.build()
    plan = subject.plan(model, mesh, setup.attention, setup.layout)
    fsdp = FSDP(reshard_after_forward=setup.reshard)
    parallelize(model, mesh, plan, activation_checkpoint=setup.checkpoint, fsdp=fsdp)
    local, sharded = subject.batch(model, mesh, setup.layout, setup.documents)
    recorder = StepRecorder(sharded.attn_metadata)
    with recorder:
        with count_traffic() as there:
            logits = subject.logits(model, local, sharded)
            loss = sum(token_mean_loss(x, local["labels"], 256) for x in logits)
            del logits
        recorder.enter(Place(backward=True))
        with count_traffic() as back:
            loss.backward()
    axes = axes_of(mesh)
    by_axis = {"cp": [there.received, back.received]}
    for (place, group), size in recorder.close().collectives.items():
        if size:
            by_axis.setdefault(axis(axes, group), [0, 0])[place.backward] += size
    return {axis: tuple(sizes) for axis, sizes in by_axis.items() if any(sizes)}


def axis(axes, group):
    """DTensor has groups of its own making, of the same ranks."""
    ranks = {tuple(ranks_of(name)): axis for name, axis in axes.items()}
    return axes.get(group) or ranks[tuple(ranks_of(group))]


def ranks_of(name):
    return dist.get_process_group_ranks(process_group(name))


def assert_forecast_is_counted(kind, setup):
    degrees = setup.degrees
    every = run_ranks(counted, degrees.world, kind, setup, timeout=300)
    stated = forecast(SUBJECTS[kind](), setup, ranks=range(degrees.cp))
    for rank in stated.ranks:
        # Ranks of one place on cp are alike; the first of them has this number.
        actual = every[rank.cp_rank * degrees.tp]
        by_axis = {axis: (x.forward, x.backward) for axis, x in stated.by_axis.items()}
        by_axis["cp"] = (rank.received.forward, rank.received.backward)
        assert actual == {axis: sizes for axis, sizes in by_axis.items() if any(sizes)}


def setup_of(degrees, checkpoint=None, **options):
    checkpoint = checkpoint or FullCheckpoint()
    return Setup(degrees, DOCUMENTS, checkpoint=checkpoint, precision=FP32, **options)


def test_forecast_bytes_are_those_of_real_ranks():
    assert_forecast_is_counted("llama", setup_of(Degrees(cp=2, tp=2)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUBJECTS)
@pytest.mark.parametrize(
    "degrees", [Degrees(dp_shard=2, cp=2), Degrees(cp=3), Degrees(dp_replicate=2, cp=2)], ids=str
)
def test_forecast_bytes_of_every_family_are_those_of_real_ranks(kind, degrees):
    layout = Contiguous if degrees.cp == 3 else HeadTail
    documents = Documents(((150, 42, 48),), 240)
    setup = Setup(degrees, documents, layout, checkpoint=NoCheckpoint(), precision=FP32)
    assert_forecast_is_counted(kind, setup)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma4", "qwen3_5", "deepseek_v4", "hf"])
def test_forecast_bytes_with_tensor_parallelism_are_those_of_real_ranks(kind):
    assert_forecast_is_counted(kind, setup_of(Degrees(dp_shard=2, cp=2, tp=2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"attention": UlyssesAttention()},
        {"attention": AllGatherAttention(), "layout": DocumentBalanced},
        {"attention": HybridAttention(inner_ranks=2)},
        {"attention": RingAttention(), "checkpoint": SelectiveCheckpoint()},
        {"attention": RingAttention(), "reshard": False},
    ],
    ids=["ulysses", "all_gather", "hybrid", "selective", "kept"],
)
def test_forecast_bytes_of_strategies_and_checkpoints_are_those_of_real_ranks(options):
    assert_forecast_is_counted("llama", setup_of(Degrees(cp=4), **options))

"""What is forecast of a rank's memory is what torch's tracker sees in a real step of it."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from transformers import AutoConfig

from benchmarks.gpu.memory import cases, compared
from dtcp.distributed.mesh import Degrees
from dtcp.experts import RoutedTokens
from dtcp.models import llama
from dtcp.parallelize import FullCheckpoint, NoCheckpoint, SelectiveCheckpoint
from dtcp.planner import forecast as forecasts
from dtcp.planner.forecast import forecast
from dtcp.planner.peak import _Walk
from dtcp.planner.setup import BF16, Setup
from dtcp.planner.subject import FamilyModel, HuggingFaceModel
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous
from dtcp.softmax import AllGatherAttention, HybridAttention, UlyssesAttention
from tests.harness.tracked_memory import tracked_peak
from tests.planner.test_forecast import EVERY_CHOICE, FP32, SUBJECTS, choosing_evenly

NEAR = 0.05
EVERY = ("llama", "gemma4", "gemma4_e", "qwen3_5", "deepseek_v4", "hf")
DOCUMENTS = Documents(((500, 12, 256, 256),), 1024)


def assert_near(kind, setup, cp_rank=0):
    stated = forecast(SUBJECTS[kind](), setup, ranks=[cp_rank]).memory
    # What nobody has sent is no number, and routers of such tokens are refused.
    no_faults = patch.object(RoutedTokens, "faults", lambda *_: torch.zeros(1, dtype=torch.int64))
    with choosing_evenly(), no_faults:
        held = tracked_peak(SUBJECTS[kind](), setup, cp_rank=cp_rank)
    print(f"{kind} {setup.degrees}: {stated.total / held:.4f} of what a step holds")
    assert stated.total == pytest.approx(held, rel=NEAR)
    return stated


def test_forecast_memory_is_what_a_real_step_holds():
    """Recomputing: the peak is in a block's backward pass, among gathered weights and gradients."""
    documents = Documents(((150, 42, 64),), 256)
    setup = Setup(Degrees(dp_shard=2, cp=2), documents, precision=FP32)
    stated = assert_near("llama", setup)
    assert stated.where.startswith("backward of layers") and stated.gathered and stated.gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "checkpoint", "kind"),
    [
        *((Degrees(dp_shard=2, cp=2), NoCheckpoint(), kind) for kind in EVERY),
        # The others recompute in mixed precision, below.
        *((Degrees(dp_shard=2, cp=2), FullCheckpoint(), kind) for kind in ("gemma4_e", "hf")),
        # gemma4 has tp in its variants of per-layer embeddings and of experts.
        *((Degrees(cp=2, tp=2), SelectiveCheckpoint(), kind) for kind in EVERY if kind != "gemma4"),
    ],
    ids=str,
)
def test_forecast_memory_of_every_family_is_what_a_real_step_holds(degrees, checkpoint, kind):
    assert_near(kind, Setup(degrees, DOCUMENTS, checkpoint=checkpoint, precision=FP32))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma4", "qwen3_5", "deepseek_v4"])
def test_forecast_memory_in_mixed_precision_is_what_a_real_step_holds(kind):
    """Few tokens: what FSDP gathers, casts and sums is most of it."""
    documents = Documents(((150, 42, 64),), 256)
    assert_near(kind, Setup(Degrees(dp_shard=4, cp=2), documents, precision=BF16))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"attention": UlyssesAttention()},
        {"attention": AllGatherAttention(), "layout": Contiguous},
        {"attention": HybridAttention(inner_ranks=2)},
        {"reshard": False},
        {"micro_batches": 2},
    ],
    ids=["ulysses", "all_gather", "hybrid", "kept", "micro_batches"],
)
def test_forecast_memory_of_strategies_is_what_a_real_step_holds(options):
    assert_near("llama", Setup(Degrees(cp=4), DOCUMENTS, precision=FP32, **options), cp_rank=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "setup"),
    [
        ("qwen3_5", Setup(Degrees(cp=2, ep=2), EVERY_CHOICE, precision=FP32)),
        ("qwen3_5", Setup(Degrees(dp_shard=2, cp=2, ep=2), EVERY_CHOICE, precision=FP32)),
        (
            "qwen3_5",
            Setup(Degrees(cp=4, ep=4), EVERY_CHOICE, checkpoint=NoCheckpoint(), precision=BF16),
        ),
        ("qwen3_5", Setup(Degrees(cp=2, tp=2, ep=2, etp=2), EVERY_CHOICE, precision=FP32)),
        (
            "deepseek_v4",
            Setup(Degrees(cp=4, ep=2), EVERY_CHOICE, checkpoint=NoCheckpoint(), precision=FP32),
        ),
        ("gemma4_moe", Setup(Degrees(cp=2, tp=2, ep=4), EVERY_CHOICE, precision=FP32)),
        ("qwen3_5", Setup(Degrees(cp=4, ep=4), EVERY_CHOICE, precision=FP32, ranks_per_node=2)),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.degrees} {type(x.checkpoint).__name__}",
)
def test_forecast_memory_with_experts_on_their_own_ranks_is_what_a_real_step_holds(kind, setup):
    """Routers choose evenly; tokens come back from whoever they were sent to, as many."""
    assert_near(kind, setup)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [FullCheckpoint(), SelectiveCheckpoint()])
def test_forecast_memory_of_what_blocks_share_is_let_go_once(monkeypatch, checkpoint):
    """Gemma 3's cosines are made before its blocks; of 15 alike, one is run."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 256}
    config = AutoConfig.for_model(
        "gemma3_text", num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=2, **sizes
    )
    steps = []
    noted = partial(_noted, steps, forecasts.peak_memory)
    monkeypatch.setattr(forecasts, "peak_memory", noted)
    setup = Setup(Degrees(cp=4), Documents.single(1, 1024), checkpoint=checkpoint)
    forecast(HuggingFaceModel("gemma3", config), setup, ranks=[0])
    for step, of in steps:
        walk = _Walk(step, of)
        walk.forward()
        assert walk.kept > 0
        walk.backward()
        assert 0 <= walk.kept < 100


def _noted(calls, function, *args):
    calls.append(args)
    return function(*args)


def test_the_campaign_compares_a_forecast_with_a_card(monkeypatch):
    """On the CPU, with a peak that is made up."""
    subject = FamilyModel("llama", "llama", llama.tiny())
    setup = Setup(Degrees(cp=2), Documents.single(1, 64))
    stated = forecast(subject, setup, ranks=[0]).memory.total
    found = compared(subject, setup, "cpu", peak=lambda: 2 * stated)
    assert found["ratio"] == pytest.approx(0.5) and not found["right"]
    assert len(cases("cuda")) == 9 and not torch.distributed.is_initialized()

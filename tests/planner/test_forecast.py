"""What is forecast of a step is what real ranks count, to the byte, by axis and direction."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import distributed as dist

from dtcp._torch.fakes import fake_ranks
from dtcp.distributed.groups import group_of
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.experts import AllToAllExchange, NodeExchange
from dtcp.huggingface.small_config import small_config
from dtcp.loss import token_mean_loss
from dtcp.models import deepseek_v4, gemma4, llama, qwen3_5
from dtcp.parallelize import (
    FSDP,
    FullCheckpoint,
    NoCheckpoint,
    SelectiveCheckpoint,
    parallelize,
    parallelize_hf,
)
from dtcp.planner.even_routes import EXPERT_OPS
from dtcp.planner.forecast import forecast
from dtcp.planner.setup import Precision, Setup
from dtcp.planner.step import axes_of
from dtcp.planner.subject import FamilyModel, HuggingFaceModel
from dtcp.planner.trace import Place, StepRecorder
from dtcp.recurrent import RelayoutCP
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention
from tests.harness.hf_models import config_of
from tests.harness.spmd import run_ranks

FP32 = Precision(torch.float32, torch.float32, torch.float32)
DOCUMENTS = Documents(((150, 42, 64),), 256)


def picks_blocks():
    """Qwen4, small; grouped, torch takes experts in bf16 alone."""
    config = small_config("qwen4_exp_text", {}).config
    config._experts_implementation = "batched_mm"
    return HuggingFaceModel("qwen4", config)


SUBJECTS = {
    "llama": lambda: FamilyModel("llama", "llama", llama.tiny()),
    "gemma4": lambda: FamilyModel("gemma4", "gemma4", gemma4.tiny()),
    "gemma4_e": lambda: FamilyModel("gemma4_e", "gemma4", gemma4.tiny_e()),
    "qwen3_5": lambda: FamilyModel("qwen3_5", "qwen3_5", qwen3_5.tiny(experts=True)),
    "deepseek_v4": lambda: FamilyModel("deepseek_v4", "deepseek_v4", deepseek_v4.tiny()),
    "hf": lambda: HuggingFaceModel("mistral", config_of("mistral")),
    "gemma4_moe": lambda: FamilyModel("gemma4_moe", "gemma4", gemma4.tiny_moe()),
    "hf_latents": lambda: HuggingFaceModel(
        "deepseek_v3", small_config("deepseek_v3", {"first_k_dense_replace": 2}).config
    ),
    "hf_picked": lambda: HuggingFaceModel(
        "deepseek_v32", small_config("deepseek_v32", {"mlp_layer_types": ["dense"] * 2}).config
    ),
    "hf_blocks": picks_blocks,
    "hf_moe": lambda: HuggingFaceModel("qwen3_moe", config_of("qwen3_moe")),
}
WITH_EXPERTS = ("deepseek_v4", "gemma4_moe", "hf_moe")
FAMILIES = ("llama", "gemma4", "gemma4_e", "qwen3_5", "deepseek_v4", "hf", "hf_latents")


def counted(_, kind, setup):
    """(forward, backward) bytes that this rank receives in a real step, by axis.

    Of cp and ep, those from other nodes as well.
    """
    subject, nodes = SUBJECTS[kind](), setup.ranks_per_node
    mesh = ParallelMesh.from_degrees(setup.degrees, "cpu", ranks_per_node=nodes)
    torch.manual_seed(0)
    model = subject.build()
    how = {
        "activation_checkpoint": setup.checkpoint,
        "fsdp": FSDP(reshard_after_forward=setup.reshard),
    }
    if isinstance(subject, HuggingFaceModel):
        parallelize_hf(model, mesh, setup.attention, **how)
    else:
        plan = subject.plan(model, mesh, setup.attention, setup.layout)
        parallelize(model, mesh, plan, **how)
    local, sharded = subject.batch(model, mesh, setup.layout, setup.documents)
    recorder = StepRecorder(sharded.attn_metadata)
    with recorder, choosing_evenly():
        with count_traffic() as there:
            logits = subject.logits(model, local, sharded)
            loss = sum(token_mean_loss(x, local["labels"], 256) for x in logits)
            del logits
        recorder.enter(Place(backward=True))
        with count_traffic() as back:
            loss.backward()
    axes = axes_of(mesh)
    experts = [sum(traffic[op].received for op in EXPERT_OPS) for traffic in (there, back)]
    by_axis = {"ep": experts}
    by_axis["cp"] = [there.received - experts[0], back.received - experts[1]]
    if nodes:
        crossed = [crossing(traffic, nodes) for traffic in (there, back)]
        by_axis |= {f"{axis} between": [x[axis] for x in crossed] for axis in ("cp", "ep")}
    for (place, group), size in recorder.close().collectives.items():
        if size:
            by_axis.setdefault(axis(axes, group), [0, 0])[place.backward] += size
    return {axis: tuple(sizes) for axis, sizes in by_axis.items() if any(sizes)}


def crossing(traffic, nodes):
    """Bytes from other nodes to this rank, for cp and for ep."""
    found = {"cp": 0, "ep": 0}
    for op, count in traffic.by_op.items():
        found["ep" if op in EXPERT_OPS else "cp"] += count.crossing(dist.get_rank(), nodes)[1]
    return found


@contextmanager
def choosing_evenly():
    """Routers that choose every expert as often, as a forecast has it; on nodes, all choices."""
    straight, on_nodes = AllToAllExchange.__call__, NodeExchange.__call__

    def evenly(self, tokens, compute):
        chosen = torch.arange(tokens.chosen.numel()).view_as(tokens.chosen) % self.num_experts
        return straight(self, tokens._replace(chosen=chosen), compute)

    def each_choice(self, tokens, compute):
        number, top_k = tokens.chosen.shape
        choices = torch.combinations(torch.arange(self.num_experts), top_k)
        assert number % len(choices) == 0
        chosen = choices.repeat(number // len(choices), 1)
        return on_nodes(self, tokens._replace(chosen=chosen), compute)

    with (
        patch.object(AllToAllExchange, "__call__", evenly),
        patch.object(NodeExchange, "__call__", each_choice),
    ):
        yield


def axis(axes, group):
    """DTensor has groups of its own making, of the same ranks."""
    ranks = {tuple(ranks_of(name)): axis for name, axis in axes.items()}
    return axes.get(group) or ranks[tuple(ranks_of(group))]


def ranks_of(name):
    return dist.get_process_group_ranks(group_of(name))


def assert_forecast_is_counted(kind, setup):
    degrees = setup.degrees
    every = run_ranks(counted, degrees.world, kind, setup, timeout=300)
    stated = forecast(SUBJECTS[kind](), setup, ranks=range(degrees.cp))
    for rank in stated.ranks:
        # Ranks of one place on cp are alike; the first of them has this number.
        actual = every[rank.cp_rank * degrees.tp]
        by_axis = {axis: (x.forward, x.backward) for axis, x in stated.by_axis.items()}
        by_axis["cp"] = (rank.received.forward, rank.received.backward)
        if nodes := setup.ranks_per_node:
            between = {"cp": rank.crossing(degrees.tp, nodes), "ep": stated.crossing_ep(nodes)}
            by_axis |= {f"{axis} between": (x.forward, x.backward) for axis, x in between.items()}
        assert actual == {axis: sizes for axis, sizes in by_axis.items() if any(sizes)}


def setup_of(degrees, checkpoint=None, **options):
    checkpoint = checkpoint or FullCheckpoint()
    return Setup(degrees, DOCUMENTS, checkpoint=checkpoint, precision=FP32, **options)


def test_forecast_bytes_are_those_of_real_ranks():
    assert_forecast_is_counted("llama", setup_of(Degrees(cp=2, tp=2)))


def test_a_forecast_follows_the_layout_as_a_run_does():
    """Where ranks have many pieces, each with a state of its own, tokens move to another layout."""
    subject = SUBJECTS["qwen3_5"]()
    with fake_ranks(2, 0):
        mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
        for layout in (HeadTail, PerDocument):
            styles = subject.plan(subject.build(), mesh, RingAttention(), layout).cp.values()
            assert any(isinstance(x, RelayoutCP) for x in styles) == (layout is PerDocument)


@pytest.mark.slow
def test_forecast_bytes_of_tokens_that_move_to_another_layout_are_those_of_real_ranks():
    assert_forecast_is_counted("qwen3_5", setup_of(Degrees(cp=2), layout=PerDocument))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "kind"),
    [
        # Others have dp_shard beside tp, and dp_replicate beside ep, below.
        *((Degrees(dp_shard=2, cp=2), kind) for kind in ("gemma4_e", "hf_latents", "hf_blocks")),
        *((Degrees(dp_replicate=2, cp=2), x) for x in ("llama", "gemma4_e", "hf", "hf_latents")),
        *((Degrees(cp=3), kind) for kind in (*FAMILIES, "hf_picked", "hf_blocks")),
    ],
    ids=str,
)
def test_forecast_bytes_of_every_family_are_those_of_real_ranks(degrees, kind):
    layout = Contiguous if degrees.cp == 3 else HeadTail
    documents = Documents(((150, 42, 48),), 240)
    setup = Setup(degrees, documents, layout, checkpoint=NoCheckpoint(), precision=FP32)
    assert_forecast_is_counted(kind, setup)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma4", "hf"])
def test_forecast_bytes_with_tensor_parallelism_are_those_of_real_ranks(kind):
    """qwen3_5 and deepseek_v4 have tp beside cp 3 and 4, below."""
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


def test_forecast_bytes_of_experts_on_their_own_ranks_are_those_of_real_ranks():
    assert_forecast_is_counted("qwen3_5", setup_of(Degrees(cp=2, ep=2)))


EVERY_CHOICE = Documents(((150, 42, 480),), 672)
"""Of four ranks, each has a multiple of the ways to choose two of eight experts, or of four."""


@pytest.mark.slow
def test_forecast_bytes_of_two_tiers_are_those_of_real_ranks():
    """Four ranks as two nodes: attention, states and tokens for experts."""
    setup = Setup(Degrees(cp=4, ep=4), EVERY_CHOICE, precision=FP32, ranks_per_node=2)
    assert_forecast_is_counted("qwen3_5", setup)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FAMILIES[2:], "gemma4_moe", "hf_moe"])
def test_forecast_bytes_of_two_tiers_of_every_family_are_those_of_real_ranks(kind):
    ep = 4 if kind in WITH_EXPERTS else 1
    degrees = Degrees(cp=4, ep=ep)
    setup = Setup(degrees, EVERY_CHOICE, precision=FP32, ranks_per_node=2, layout=DocumentBalanced)
    assert_forecast_is_counted(kind, setup)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        (Degrees(cp=2, tp=2), {}),
        (Degrees(dp_shard=2, cp=2), {}),
        (Degrees(cp=4), {"attention": AllGatherAttention()}),
        (Degrees(cp=4), {"attention": UlyssesAttention()}),
        (Degrees(cp=4), {"attention": HybridAttention(inner_ranks=2)}),
        (Degrees(dp_replicate=2, cp=4), {"layout": DocumentBalanced}),
    ],
    ids=str,
)
def test_forecast_bytes_of_two_tiers_beside_other_axes_are_those_of_real_ranks(degrees, options):
    assert_forecast_is_counted("llama", setup_of(degrees, ranks_per_node=2, **options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "nodes"),
    [
        (Degrees(dp_shard=2, cp=2, tp=2, ep=2, etp=2), 0),
        (Degrees(cp=4, tp=2, ep=4, etp=2), 4),
    ],
    ids=str,
)
def test_forecast_bytes_of_experts_that_tp_splits_are_those_of_real_ranks(degrees, nodes):
    documents = EVERY_CHOICE if nodes else DOCUMENTS
    setup = Setup(degrees, documents, precision=FP32, ranks_per_node=nodes)
    assert_forecast_is_counted("qwen3_5", setup)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "degrees"),
    [
        *((x, Degrees(dp_shard=2, cp=2, ep=4)) for x in ("qwen3_5", *WITH_EXPERTS)),
        # qwen3_5 has tp beside ep above and below.
        *((x, Degrees(dp_replicate=2, cp=2, tp=2, ep=2)) for x in WITH_EXPERTS),
    ],
    ids=str,
)
def test_forecast_bytes_of_experts_beside_other_axes_are_those_of_real_ranks(kind, degrees):
    assert_forecast_is_counted(kind, setup_of(degrees))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        (Degrees(dp_shard=2, cp=2, tp=2, ep=4), {"checkpoint": SelectiveCheckpoint()}),
        (Degrees(dp_shard=4, ep=2), {"checkpoint": NoCheckpoint()}),
        (Degrees(cp=2, tp=2, ep=4), {"reshard": False}),
    ],
    ids=str,
)
def test_forecast_bytes_of_experts_under_every_checkpoint_are_those_of_real_ranks(degrees, options):
    assert_forecast_is_counted("qwen3_5", setup_of(degrees, **options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "degrees", "seq_len"),
    [
        ("qwen3_5", Degrees(cp=2), 256),
        ("llama", Degrees(cp=5), 240),
        ("qwen3_5", Degrees(cp=3, tp=2), 240),
        ("gemma4", Degrees(dp_shard=3, cp=2), 256),
        ("llama", Degrees(cp=7), 224),
        ("deepseek_v4", Degrees(cp=4, tp=2), 256),
        ("gemma4", Degrees(cp=8), 256),
        ("hf", Degrees(dp_replicate=2, dp_shard=2, cp=2), 256),
    ],
    ids=str,
)
def test_forecast_bytes_on_2_to_8_ranks_are_those_of_real_ranks(kind, degrees, seq_len):
    documents = Documents(((150, 42, seq_len - 192),), seq_len)
    assert_forecast_is_counted(
        kind, Setup(degrees, documents, checkpoint=FullCheckpoint(), precision=FP32)
    )

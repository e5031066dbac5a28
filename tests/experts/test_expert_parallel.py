"""Whole models with experts on ranks of their own equal the published ones, document by document.

In fp64, packed rows with padding: logits and every gradient, on one axis ep inside cp, across dp,
with tp and over all of them.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.compile import count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.experts import op
from dtcp.huggingface import WholeRows, install_mixers
from dtcp.mixer_metadata import batch_metadata
from dtcp.models.qwen3_5 import Qwen35
from dtcp.parallelize import (
    FullCheckpoint,
    NoCheckpoint,
    SelectiveCheckpoint,
    llama_plan,
    parallelize,
    parallelize_hf,
    qwen3_5_plan,
)
from dtcp.parallelize.expert_exchange import LOAD
from dtcp.parallelize.experts import largest_load
from dtcp.parallelize.hf_experts import hf_expert_plan
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.softmax import RingAttention
from tests.harness.hf_models import build
from tests.harness.parity import CONFIG, GRAPHS, Llama, gradients
from tests.harness.spmd import run_ranks, spmd
from tests.models.test_parity_deepseek_v4 import KEEP_ALL, run
from tests.models.test_parity_gemma4 import on_ranks
from tests.models.test_parity_qwen3_5 import EXPERTS, Cell, step, truth_of

QWEN = [
    Cell("experts", Degrees(cp=2, ep=2)),
    Cell("experts", Degrees(dp_shard=2, ep=2), checkpoint=FullCheckpoint()),
    Cell("experts", Degrees(cp=2, ep=2), checkpoint=FullCheckpoint(), compile=GRAPHS),
    Cell("experts", Degrees(dp_shard=2, cp=2, ep=4), Contiguous, compile=GRAPHS),
    Cell("experts", Degrees(dp_shard=2, cp=2, ep=2)),
    Cell("experts", Degrees(cp=4, ep=2), checkpoint=FullCheckpoint()),
    Cell("experts", Degrees(cp=2, tp=2, ep=4)),
    Cell("experts", Degrees(cp=2, tp=2, ep=2), checkpoint=SelectiveCheckpoint(), compile=GRAPHS),
    Cell("experts", Degrees(dp_shard=2, tp=2, ep=4)),
    Cell("experts", Degrees(dp_replicate=2, tp=2, ep=2)),
    Cell("experts", Degrees(dp_replicate=2, cp=2, ep=2)),
    Cell("experts", Degrees(cp=2, tp=2, ep=2, etp=2), checkpoint=FullCheckpoint()),
    Cell("experts", Degrees(cp=2, tp=2, ep=2, etp=2), compile=GRAPHS),
    Cell("experts", Degrees(dp_shard=2, cp=2, tp=2, ep=2, etp=2)),
]
QUICK = (0, 2, 4)
"""ep is cp, eager and compiled, and recomputed in full; ep is cp beside dp."""


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("truth") / "experts"
    torch.save(truth_of(EXPERTS), path)
    return str(path)


def name_of(cell: Cell) -> str:
    degrees = cell.degrees
    return f"{cell}-ep{degrees.ep}-x{degrees.dp_replicate}-etp{degrees.etp}"


@pytest.mark.slow_where(lambda cell: QWEN.index(cell) not in QUICK)
@pytest.mark.parametrize("cell", QWEN, ids=name_of)
def test_qwen3_5_experts_on_their_own_ranks_equal_transformers(truth, cell):
    """Routed once however much is recomputed; compiled, a graph per kind of layer."""
    layers = EXPERTS.num_layers
    sends = layers if not isinstance(cell.checkpoint, FullCheckpoint) else 2 * layers
    for traffic, graphs, breaks in run_ranks(step, cell.degrees.world, truth, cell):
        assert (graphs, breaks) == ((2, 0) if cell.compile else (0, 0))
        assert traffic["dtcp::route_tokens"].calls == layers
        # Those of forward and of recomputation overlap with the shared expert.
        assert traffic["dtcp::send_tokens"].calls == sends
        # Of the results' gradients.
        assert traffic["dtcp::dispatch_tokens"].calls == layers


DEEPSEEK = [
    (Degrees(cp=2, ep=2), HeadTail, KEEP_ALL, None),
    (Degrees(dp_shard=2, cp=2, ep=4), Contiguous, FullCheckpoint(), None),
    (Degrees(cp=2, ep=2), HeadTail, SelectiveCheckpoint(), GRAPHS),
    (Degrees(tp=2, ep=2), HeadTail, KEEP_ALL, None),
    (Degrees(cp=2, tp=2, ep=2, etp=2), HeadTail, KEEP_ALL, None),
]


@pytest.mark.slow_where(lambda degrees, compile, **_: compile or degrees != DEEPSEEK[0][0])
@pytest.mark.parametrize(("degrees", "layout", "checkpoint", "compile"), DEEPSEEK)
def test_deepseek_v4_experts_on_their_own_ranks_equal_the_published_model(
    degrees, layout, checkpoint, compile
):
    """Hash-routed and scored layers."""
    kinds = (2, 0) if compile else (0, 0)
    counts = run(degrees, layout, checkpoint, compile, op="dtcp::route_tokens")
    assert counts == (*kinds, 2 if compile else 4)


GEMMA = [
    (Degrees(cp=2, ep=2), NoCheckpoint(), None),
    (Degrees(cp=2, tp=2, ep=4), SelectiveCheckpoint(), None),
    (Degrees(dp_shard=2, cp=2, ep=2), FullCheckpoint(), GRAPHS),
    (Degrees(tp=4, ep=2), FullCheckpoint(), None),
    (Degrees(dp_shard=2, tp=2, ep=2, etp=2), NoCheckpoint(), None),
]


@pytest.mark.slow_where(lambda degrees, **_: degrees != GEMMA[0][0])
@pytest.mark.parametrize(("degrees", "checkpoint", "compile"), GEMMA)
def test_gemma4_experts_on_their_own_ranks_equal_the_published_model(degrees, checkpoint, compile):
    for traffic, *_ in on_ranks("moe", degrees, checkpoint=checkpoint, compile=compile):
        assert traffic["dtcp::route_tokens"].calls == 4


@spmd(ranks=2)
def test_expert_parallel_without_experts_is_refused(mesh):
    ranks = ParallelMesh.from_degrees(Degrees(cp=2, ep=2), "cpu")
    with pytest.raises(ValueError, match=r"got ep=2 for a Llama whose plan names no experts: set"):
        parallelize(Llama(CONFIG), ranks, llama_plan(CONFIG, ranks, RingAttention()))


@spmd(ranks=4)
def test_a_pipeline_stage_may_have_no_experts(mesh):
    """Of a stage with the head alone, say, ranks of ep hold nothing of their own."""
    ranks = ParallelMesh.from_degrees(Degrees(pp=2, cp=2, ep=2), "cpu")
    parallelize(Llama(CONFIG), ranks, llama_plan(CONFIG, ranks, RingAttention()))


@pytest.mark.parametrize("exchange", ["all_to_all", "deep_ep", "misspelt"])
def test_expert_exchange_of_a_mesh_without_ep_is_refused(exchange):
    one = ParallelMesh(Degrees(), None, *[None] * 7)
    with pytest.raises(ValueError, match=f"got expert_exchange='{exchange}' for a mesh without ep"):
        hf_expert_plan(Llama(CONFIG), one, exchange)
    assert hf_expert_plan(Llama(CONFIG), one) == {}


@spmd(ranks=3)
def test_expert_parallel_that_does_not_divide_is_refused(mesh):
    ranks = ParallelMesh.from_degrees(Degrees(cp=3, ep=3), "cpu")
    with pytest.raises(ValueError, match=r"num_experts=8 with ep=3: choose an ep that divides"):
        qwen3_5_plan(EXPERTS, ranks, RingAttention())
    with pytest.raises(ValueError, match=r"got ep=2 with dp_shard=1 \* cp=3 \* tp=1 = 3: choose"):
        Degrees(cp=3, ep=2)
    with pytest.raises(ValueError, match=r"got etp=3 with tp=2 and ep=2: give 1, or tp"):
        Degrees(cp=2, tp=2, ep=2, etp=3)
    with pytest.raises(ValueError, match=r"got ep=2 with dp_shard=1 \* cp=1: choose an ep"):
        Degrees(tp=2, ep=2, etp=2)
    assert Qwen35(EXPERTS).layers[0].feed_forward.experts.num_experts == 8


PACKED = ((13, 19), (32,))
PADDED = ((13, 9), (27,))
"""The last tokens of both rows are padding."""


def transformers_truth(name, lengths):
    """Tokens, logits and gradients of a model of transformers on one device, in fp64."""
    model = build(name)
    torch.manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (2, 32))
    install_mixers(model)
    documents = Documents(lengths, 32)
    metadata = batch_metadata(model, documents)
    positions = documents.position_ids()
    logits = model(input_ids=tokens, position_ids=positions, attn_metadata=metadata).logits
    cotangent = torch.randn_like(logits) * (documents.document() >= 0)[..., None]
    logits.backward(cotangent)
    grads = {name: p.grad for name, p in model.named_parameters()}
    return logits.detach(), cotangent, grads


def check_transformers(mesh, name, degrees, lengths=PACKED, ranks_per_node=0, **options):
    logits, cotangent, grads = transformers_truth(name, lengths)
    model = build(name)
    torch.manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (2, 32))
    ranks = ParallelMesh.from_degrees(degrees, "cpu", ranks_per_node=ranks_per_node)
    parallelize_hf(model, ranks, **options)
    mine = slice(ranks.rank("batch"), None, ranks.size("batch"))
    batch = {"input_ids": tokens[mine]}
    documents = Documents(lengths[mine], 32)
    batch["position_ids"] = documents.position_ids()
    local, sharded = shard_batch(batch, ranks, model=model, documents=documents)
    with count_graphs() as graphs, count_traffic() as traffic, noted_counts() as routed:
        out = model(**local, attn_metadata=sharded.attn_metadata).logits
        if isinstance(out, DTensor):
            out = out.full_tensor(grad_placements=[Replicate()])
        out.backward(sharded.shard(cotangent[mine]))
    real = sharded.shard(documents.document()) >= 0
    assert_close(out[real], sharded.shard(logits[mine])[real])
    for key, actual in gradients(model).items():
        expected = grads[key]
        if actual.shape != expected.shape:
            actual = actual.flatten(1, 2) if actual.shape[1] == 2 else actual.flatten(2, 3)
        assert_close(actual, expected, msg=key)
    assert traffic["dtcp::route_tokens"].calls > 0
    loads = [vars(m)[LOAD].sum() for m in model.modules() if LOAD in vars(m)]
    # A recomputed layer counts twice, for all experts alike.
    assert loads and all(load in (2 * real.sum(), 4 * real.sum()) for load in loads)
    assert largest_load([model], ranks.loss) >= 1
    return graphs.breaks, int(real.sum()), routed


@contextmanager
def noted_counts():
    """Collects how many rows this rank sends in each exchange, its own experts' included."""
    rows, own = [], op.Routing

    def note(*parts):
        made = own(*parts)
        rows.append(int(made.counts[0].sum()))
        return made

    op.Routing = note
    try:
        yield rows
    finally:
        op.Routing = own


HF = [
    ("qwen3_moe", Degrees(cp=2, ep=2)),
    ("gpt_oss", Degrees(cp=2, ep=2)),
    ("qwen3_moe", Degrees(dp_shard=2, cp=2, ep=4)),
    ("qwen3_moe", Degrees(cp=2, tp=2, ep=2)),
]


@pytest.mark.slow_where(lambda name, **_: name != "gpt_oss")
@pytest.mark.parametrize(("name", "degrees"), HF)
def test_transformers_experts_on_their_own_ranks_equal_one_device(name, degrees):
    """Experts with biases and alternating channels (gpt_oss), and with a gate before up."""
    answers = run_ranks(check_transformers, degrees.world, name, degrees)
    assert {breaks for breaks, *_ in answers} == {0}


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpoint": FullCheckpoint()},
        pytest.param({"activation_checkpoint": SelectiveCheckpoint()}, marks=pytest.mark.slow),
        pytest.param(
            {"activation_checkpoint": FullCheckpoint(), "compile": GRAPHS}, marks=pytest.mark.slow
        ),
    ],
    ids=["full", "selective", "compiled"],
)
def test_experts_of_a_router_that_writes_into_its_choice_are_recomputed(options):
    """Mixtral's divides the weights of the chosen experts in place."""
    answers = run_ranks(check_transformers, 2, "mixtral", Degrees(cp=2, ep=2), **options)
    assert {breaks for breaks, *_ in answers} == {0}


@pytest.mark.slow_where(lambda options: "activation_checkpoint" in options)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_checkpoint": FullCheckpoint(), "compile": GRAPHS},
    ],
    ids=["eager", "recomputed and compiled"],
)
def test_padding_is_not_routed_to_transformers_experts(options):
    """The rows of every exchange are the choices of real tokens, two of each."""
    degrees = Degrees(cp=2, ep=2)
    for breaks, real, routed in run_ranks(
        check_transformers, 2, "qwen3_moe", degrees, PADDED, **options
    ):
        assert breaks == 0
        assert set(routed) == {2 * real}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "options"),
    [(Degrees(dp_shard=2, ep=2), {}), (Degrees(cp=2, ep=2), {"compile": GRAPHS})],
    ids=["eager", "compiled"],
)
@spmd(ranks=2)
def test_accumulated_gradients_of_transformers_experts_equal_one_device(mesh, degrees, options):
    """Of micro-batches of different lengths, whose tokens choose other experts."""
    reference, model = build("gpt_oss"), build("gpt_oss")
    torch.manual_seed(1)
    parts = [torch.randint(1, reference.config.vocab_size, (2, length)) for length in (24, 16)]
    tokens = sum(ids[:, 1:].numel() for ids in parts)
    ranks = ParallelMesh.from_degrees(degrees, "cpu")
    rows = WholeRows(parallelize_hf(model, ranks, **options), ranks)
    for ids in parts:
        call = {"use_cache": False, "num_items_in_batch": tokens}
        reference(input_ids=ids, labels=ids, **call).loss.backward()
        mine = ids[ranks.rank("batch") :: ranks.size("batch")]
        rows(input_ids=mine, labels=mine, num_items_in_batch=tokens).loss.backward()
    expected = gradients(reference)
    for key, actual in gradients(model).items():
        assert_close(actual.reshape(expected[key].shape), expected[key], msg=key)


@pytest.mark.slow
def test_transformers_experts_on_nodes_equal_one_device():
    """Four ranks of ep on two machines: tokens cross once, and as many rows as tokens at most."""
    degrees = Degrees(dp_shard=2, cp=2, ep=4)
    for _, real, routed in run_ranks(check_transformers, 4, "gpt_oss", degrees, PADDED, 2):
        assert len(routed) == 4 and all(rows <= 2 * real for rows in routed[::2])

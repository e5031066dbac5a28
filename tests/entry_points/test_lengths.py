"""Row A10: batches of more lengths than a compiled model has graphs, padded to few sizes.

The truth is the same model on one device, eager, on the rows as they came. Limits are lowered: a
compiled model has 64 graphs otherwise.
"""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.compile import EagerIsland, count_graphs
from dtcp.cp_utils import BatchSharder, attach_context_parallel_hooks, make_cp_batch_and_ctx
from dtcp.distributed import relayout
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import causal_lm_loss
from dtcp.huggingface.batch import shard_hf_batch
from dtcp.labels import shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.mixer_metadata import batch_metadata
from dtcp.models.deepseek_v4 import DeepseekV4
from dtcp.models.deepseek_v4 import tiny as tiny_deepseek_v4
from dtcp.models.gemma4 import Gemma4, layer_pattern
from dtcp.models.gemma4 import tiny as tiny_gemma4
from dtcp.models.llama import Llama
from dtcp.models.qwen3_5 import Qwen35
from dtcp.parallelize import (
    Compile,
    deepseek_v4_plan,
    gemma4_plan,
    llama_plan,
    parallelize,
    parallelize_hf,
    qwen3_5_plan,
)
from dtcp.sequence.buckets import Buckets, MultiplesOf, OneOf, PowersOfTwo
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.softmax import AllGatherAttention, RingAttention
from tests.cp_utils.test_cp_utils import on_mesh
from tests.harness import reference
from tests.harness.attention_parity import refused
from tests.harness.parity import CONFIG, assert_gradients, gradients, summed
from tests.harness.plain_sdpa_model import VOCAB, Decoder
from tests.harness.row_ids import of_row
from tests.harness.spmd import spmd
from tests.huggingface.test_huggingface import BOUND
from tests.models.test_parity_qwen3_5 import DENSE

VOCABULARY = 64
SMALL_LLAMA = replace(CONFIG, num_layers=2)
FAMILIES = {
    "llama": (Llama, SMALL_LLAMA, partial(llama_plan, attention=RingAttention())),
    "gemma4": (
        Gemma4,
        replace(tiny_gemma4(), vocab_size=VOCABULARY, layer_types=layer_pattern("ssg", 3)),
        partial(gemma4_plan, attention=RingAttention()),
    ),
    "qwen3_5": (Qwen35, DENSE, partial(qwen3_5_plan, attention=RingAttention())),
    "deepseek_v4": (
        DeepseekV4,
        replace(tiny_deepseek_v4(VOCABULARY), num_layers=3, compress_ratios=(0, 4, 16, 0)),
        deepseek_v4_plan,
    ),
}
SIZES = (9, 30, 16, 7, 32, 21)
"""Lengths of rows, in this order: six of them, in buckets of 16 and 32."""


def packed(rows, seq_len):
    """Rows of documents that differ from row to row, and from length to length."""
    lengths = [(seq_len // (row + 2), seq_len - seq_len // (row + 2)) for row in range(rows)]
    return Documents(tuple(lengths), seq_len)


def batch_of(documents):
    ids = torch.randint(VOCABULARY, (documents.batch, documents.seq_len))
    labels = shift_labels(ids, documents)
    return {"input_ids": ids, "labels": labels, "position_ids": documents.position_ids()}


def unpadded_step(model, batch, documents):
    """Loss and gradients on one device, of the rows as they are."""
    model.zero_grad()
    metadata = batch_metadata(model, documents)
    logits = model(batch["input_ids"], batch["position_ids"], metadata)
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    return loss.detach(), gradients(model)


def step(model, mesh, batch, documents, layout=HeadTail, buckets=None):
    """The mean loss and its gradients, whole on every rank; and how the batch was sharded."""
    model.zero_grad()
    local, sharded = shard_batch(
        batch, mesh, layout, model=model, documents=documents, buckets=buckets
    )
    logits = model(local["input_ids"], local["position_ids"], sharded.attn_metadata)
    count = global_token_count(local["labels"], mesh.loss)
    share = token_mean_loss(logits, local["labels"], count)
    share.backward()
    return summed(share, mesh), gradients(model), sharded


def pair_of(family, mesh, **compile):
    """A model on one device, and an equal one on the mesh, compiled."""
    kind, config, plan = FAMILIES[family]
    torch.manual_seed(0)
    plain, model = kind(config).double(), kind(config).double()
    model.load_state_dict(plain.state_dict())
    return plain, parallelize(model, mesh, plan(config, mesh), compile=Compile(**compile))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["A10"])
@spmd(ranks=1)
def test_lengths_in_buckets_on_one_rank_are_exact_and_make_few_graphs(mesh, case):
    assert_exact_in_few_graphs(mesh, "llama")


@pytest.mark.slow_where(lambda family, case: family != "llama")
@pytest.mark.parametrize("case", ["A10"])
@pytest.mark.parametrize("family", FAMILIES)
@spmd(ranks=2)
def test_lengths_in_buckets_are_exact_and_make_few_graphs(mesh, family, case):
    assert_exact_in_few_graphs(mesh, family)


def assert_exact_in_few_graphs(mesh, family):
    """Loss and every gradient; graphs are made for two lengths and for no packing of documents."""
    torch._dynamo.reset()
    mesh = ParallelMesh.from_degrees(Degrees(cp=mesh.size()), "cpu")
    plain, model = pair_of(family, mesh, backend="aot_eager", max_graphs=16)
    buckets = Buckets(PowersOfTwo(least=16))
    made = []
    for seq_len in SIZES:
        documents = packed(2, seq_len)
        batch = batch_of(documents)
        expected = unpadded_step(plain, batch, documents)
        with count_graphs() as graphs:
            loss, grads, sharded = step(model, mesh, batch, documents, buckets=buckets)
        made.append(graphs.graphs)
        assert_close((loss, grads), expected)
        assert sharded.layout.seq_len == (16 if seq_len <= 16 else 32)
        assert sharded.padding_fraction == 1 - seq_len / sharded.layout.seq_len
    assert made[0] == made[1] > 0 == sum(made[2:]), made


@pytest.mark.slow
@pytest.mark.parametrize("case", ["A10"])
@pytest.mark.parametrize("family", ["llama", "gemma4"])
@spmd(ranks=2)
def test_lengths_as_symbols_are_exact_and_make_one_more_graph_at_most(mesh, family, case):
    """No padding. Sizes that were equal when the first graph was traced are one symbol of it."""
    torch._dynamo.reset()
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    plain, model = pair_of(family, mesh, backend="aot_eager", dynamic=True)
    made = []
    for seq_len in SIZES[:4]:
        documents = packed(2, seq_len)
        batch = batch_of(documents)
        expected = unpadded_step(plain, batch, documents)
        with count_graphs() as graphs:
            loss, grads, _ = step(model, mesh, batch, documents)
        made.append(graphs.graphs)
        assert_close((loss, grads), expected)
    assert made[0] >= made[1] and made[0] > 0 == sum(made[2:]), made


@pytest.mark.slow_where(lambda ranks, case: ranks == 2)
@pytest.mark.parametrize("case", ["A10"])
@spmd(ranks=(1, 2))
def test_lengths_beyond_the_limit_are_refused_in_a_sentence(mesh, ranks, case):
    """On all ranks alike, after a warning; a length that has a graph goes on."""
    torch._dynamo.reset()
    mesh = ParallelMesh.from_degrees(Degrees(cp=ranks), "cpu")
    _, model = pair_of("llama", mesh, backend="aot_eager", max_graphs=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seq_len in (8, 16, 24, 32):
            step(model, mesh, batch_of(packed(1, seq_len)), packed(1, seq_len))
            said = [str(x.message) for x in caught if "a graph for each of" in str(x.message)]
            assert len(said) == (seq_len >= 16)
    shard = 40 // ranks
    refused(
        rf"no more than max_graphs=4, got \(1, {shard}, 32\) after 4 sizes .*"
        rf"buckets=Buckets\(PowersOfTwo\(\)\)",
        lambda: step(model, mesh, batch_of(packed(1, 40)), packed(1, 40)),
    )
    loss, *_ = step(model, mesh, batch_of(packed(1, 24)), packed(1, 24))
    assert bool(loss.isfinite())


@pytest.mark.parametrize("case", ["A10"])
@spmd(ranks=2)
def test_graphs_around_an_island_are_refused_too(mesh, case):
    """dynamo would go on in eager mode: slower, without a word. Dtypes, since sizes are dynamic."""
    torch._dynamo.reset()
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    torch.manual_seed(0)
    attention = RingAttention(boundary=EagerIsland())
    model = Llama(SMALL_LLAMA).double()
    plan = llama_plan(SMALL_LLAMA, mesh, attention)
    parallelize(model, mesh, plan, compile=Compile("aot_eager", max_graphs=1))
    for seq_len in (16, 24):
        documents = packed(1, seq_len)
        if seq_len == 16:
            step(model, mesh, batch_of(documents), documents)
        else:
            refused(
                "no more than max_graphs=1, got",
                lambda: step(model, mesh, batch_of(packed(1, 24)), packed(1, 24)),
            )


@pytest.mark.slow
@pytest.mark.parametrize("case", ["A10"])
@spmd(ranks=2)
def test_numbers_of_rows_in_buckets_are_exact(mesh, case):
    """Batches of one to four rows make one graph; what is gathered has the rows that came."""
    torch._dynamo.reset()
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    plain, model = pair_of("llama", mesh, backend="aot_eager", max_graphs=1)
    buckets = Buckets(OneOf((24,)), rows=OneOf((4,)))
    for rows, seq_len in ((3, 17), (1, 24), (4, 20)):
        documents = packed(rows, seq_len)
        batch = batch_of(documents)
        expected = unpadded_step(plain, batch, documents)
        loss, grads, sharded = step(model, mesh, batch, documents, buckets=buckets)
        assert_close((loss, grads), expected)
        assert sharded.padding_fraction == pytest.approx(1 - rows * seq_len / (4 * 24))
        x = torch.randn(rows, seq_len, 3)
        assert torch.equal(sharded.gather(sharded.shard(x)), x)
        ahead = torch.randn(rows, 2, seq_len)
        assert torch.equal(sharded.gather(sharded.shard(ahead, dim=2), dim=2), ahead)
        if rows < 4:
            refused(
                rf"padded from {rows} rows to 4 dim 0 are the rows",
                lambda x=x, shard=sharded.shard: shard(torch.cat((x, x, x, x, x))),
            )


def test_what_has_one_row_or_none_is_left_alone_where_rows_are_added_A10():
    one_rank = ParallelMesh(Degrees(), None, *[None] * 7)
    batch = {
        "input_ids": torch.ones(3, 8, dtype=torch.int64),
        "position_ids": torch.arange(8)[None],
    }
    local, sharded = shard_batch(batch, one_rank, buckets=Buckets(rows=OneOf((4,))))
    assert local["input_ids"].shape == (4, 8)
    assert torch.equal(local["position_ids"], batch["position_ids"])
    for dim in (0, -1):
        assert torch.equal(sharded.gather(torch.arange(8), dim=dim), torch.arange(8))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [HeadTail, Contiguous])
@spmd(ranks=2)
def test_batches_of_transformers_in_buckets_are_exact_A10(mesh, layout):
    """Also with padding of their own, and a last batch of fewer rows."""
    from tests.harness.hf_models import build

    torch._dynamo.reset()
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    plain, model = build("llama"), build("llama")
    model = parallelize_hf(
        model, mesh, attention=AllGatherAttention(), compile=Compile("aot_eager", max_graphs=2)
    )
    buckets = Buckets(MultiplesOf(16), rows=OneOf((2,)))
    for lengths in ((9, 14), (16,), (25, 30), (3, 32)):
        seq_len = max(lengths)
        mask = (torch.arange(seq_len) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(1, VOCABULARY, mask.shape)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
        labels = ids.masked_fill(mask == 0, -100)[:, 1:]
        plain.zero_grad(), model.zero_grad()
        logits = plain(input_ids=ids, attention_mask=mask).logits[:, :-1]
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        expected.backward()
        share = causal_lm_loss(model, batch, mesh, layout, buckets=buckets)
        share.backward()
        assert_close(summed(share, mesh), expected.detach(), rtol=BOUND, atol=0.0)
        assert_gradients(model, gradients(plain), BOUND)
        _, sharded = shard_hf_batch(batch, mesh, layout, model=model, buckets=buckets)
        assert sharded.layout.seq_len == (16 if seq_len <= 16 else 32)
        assert sharded.documents.batch == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", ["A10"])
@spmd(ranks=2)
def test_batches_of_training_loops_in_buckets_are_exact(mesh, case):
    """A model that knows nothing of us, its layers compiled without dynamic sizes."""
    model, plain = Decoder(own_mask=True), Decoder()
    plain.load_state_dict(model.state_dict())
    attach_context_parallel_hooks(model)
    torch._dynamo.reset()
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    sharder = BatchSharder(buckets=Buckets(MultiplesOf(32), rows=OneOf((3,))))
    made = []
    for lengths in (((9, 12), (4, 10, 7)), ((11, 19), (25, 5)), ((30,),), ((5, 6, 7),) * 3):
        seq_len = sum(lengths[0])
        documents = Documents(lengths, seq_len)
        ids = torch.randint(1, VOCAB, (len(lengths), seq_len))
        batch = {
            "input_ids": ids,
            "labels": shift_labels(ids, documents),
            "position_ids": documents.position_ids(),
            "_cp_make_batch_fn": sharder,
        }
        with count_graphs() as graphs:
            loss, grads = on_mesh(model, mesh, batch)
        made.append(graphs.graphs)
        plain.zero_grad()
        seen = reference.visible(lengths, seq_len, reference.causal)[:, None]
        logits = plain(ids, documents.position_ids(), seen)
        expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        expected.backward()
        assert_close(loss, expected.detach())
        assert_close(grads, gradients(plain))
    # Where all rows are alike the context keeps one, which is another graph.
    assert made == [1, 0, 0, 1]


@pytest.mark.parametrize("case", ["A10"])
@spmd(ranks=2)
def test_lengths_of_packed_rows_in_slots_are_kept_in_buckets(mesh, case):
    """seq_lens gets a row for each that was added."""
    ids = torch.randint(1, VOCAB, (2, 10))
    lengths = torch.tensor([[4, 3], [9, -1000]])
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids > 0, -100), "seq_lens": lengths}
    sharder = BatchSharder(buckets=Buckets(OneOf((16,)), rows=OneOf((3,))))
    _, local = make_cp_batch_and_ctx(mesh, {**batch, "_cp_make_batch_fn": sharder})
    assert local["seq_lens"].tolist() == [[4, 3], [9, -1000], [-1000, -1000]]
    assert local["input_ids"].shape == local["position_ids"].shape == (3, 8)
    whole = relayout.gather(local["padding_mask"].long(), HeadTail(16, 2), mesh)
    assert (1 - whole).sum(1).tolist() == [7, 9, 0]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (PowersOfTwo(), [1, 2, 4, 4, 8, 16]),
        (PowersOfTwo(least=4), [4, 4, 4, 4, 8, 16]),
        (PowersOfTwo(most=13), [1, 2, 4, 4, 8, 13]),
        (MultiplesOf(6), [6, 6, 6, 6, 6, 12]),
        (MultiplesOf(5, most=9), [5, 5, 5, 5, 5, 9]),
        (OneOf((3, 9)), [3, 3, 3, 9, 9, 9]),
    ],
    ids=of_row("A10"),
)
def test_sizes_are_rounded_up(rule, expected):
    sizes = [1, 2, 3, 4, 5, 9]
    assert [rule.round_up(size) for size in sizes] == expected
    assert rule.padding_fraction(sizes) == 1 - sum(sizes) / sum(expected)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: PowersOfTwo(least=3), ValueError, "got least=3: give 4"),
        (lambda: PowersOfTwo(least=0), ValueError, "got least=0: give 1"),
        (lambda: PowersOfTwo(least=8, most=4), ValueError, "got most=4 below 8"),
        (lambda: PowersOfTwo(most=8).round_up(9), ValueError, "got size=9 for PowersOfTwo"),
        (lambda: PowersOfTwo().round_up(0), ValueError, "got size=0"),
        (lambda: PowersOfTwo(2.0), TypeError, "2.0"),
        (lambda: MultiplesOf(0), ValueError, "got step=0"),
        (lambda: MultiplesOf(None), TypeError, "got step=None"),
        (lambda: OneOf((4, 4)), ValueError, r"got sizes=\(4, 4\)"),
        (lambda: OneOf((8, 4)), ValueError, r"got sizes=\(8, 4\)"),
        (lambda: OneOf(()), ValueError, r"got sizes=\(\)"),
        (lambda: OneOf(8), ValueError, "got sizes=8"),
        (lambda: OneOf((4, 8)).round_up(9), ValueError, "got size=9 for OneOf"),
        (lambda: Buckets(), ValueError, "got tokens=None, rows=None"),
        (lambda: Buckets(256), TypeError, "got tokens=256"),
        (lambda: Buckets(PowersOfTwo(), rows=(4,)), TypeError, r"got rows=\(4,\)"),
        (lambda: Compile(max_graphs=0), ValueError, "got max_graphs=0"),
        (lambda: Compile(max_graphs=1.5), TypeError, "got max_graphs=1.5"),
    ],
    ids=of_row("A10"),
)
def test_rules_that_are_none_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()

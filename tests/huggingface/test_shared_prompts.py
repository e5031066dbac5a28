"""Rows that begin alike compute what they share once: all that comes out is as if they did not."""

import random
from itertools import combinations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import shard_hf_batch
from dtcp.huggingface.batch import causal_lm_loss
from dtcp.huggingface.documents import documents_of_hf_batch
from dtcp.huggingface.grouped_rows import LEAST, grouped_rows
from dtcp.huggingface.shared_prompts import (
    ANSWERS_TO_A_PROMPT,
    let_prompts_be_shared,
    shares_prompts,
    with_answers,
)
from dtcp.huggingface.whole_rows import WholeRows
from dtcp.labels import IGNORED
from dtcp.parallelize import parallelize_hf
from dtcp.sequence.buckets import Buckets, MultiplesOf
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.softmax import AllGatherAttention, HaloAttention
from tests.harness.hf_models import build
from tests.harness.parity import GRAPHS, assert_gradients, gradients, summed
from tests.harness.spmd import spmd

EXACT = "starcoder2"
"""A family whose norms are computed in fp64; softmax is, by sdpa."""
BOUND = 1e-5
"""For others, whose norms or routers are fp32 in a model of fp64."""
LATENT = {"q_lora_rank": None, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6}
LATENT |= {"v_head_dim": 5, "num_key_value_heads": 4, "n_routed_experts": 4, "head_dim": 4}
LATENT |= {"moe_intermediate_size": 24, "first_k_dense_replace": 2}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 128}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
SHARING = torch.nn.Module()
let_prompts_be_shared(SHARING)


def drawn(seed):
    """A list of tokens of each of a few texts, and how many of each are a prompt's.

    Prompts begin with a common text or not, the answers of one come apart, some are empty, some
    rows are alike, some have nothing in common, and some have losses from their start.
    """
    chance = random.Random(seed)

    def text(most, least=0):
        return [chance.randrange(64) for _ in range(chance.randint(least, most))]

    system = text(24) if chance.random() < 0.7 else []
    texts = []
    for _ in range(chance.randint(1, 3)):
        prompt = [*system, *text(30, least=1)]
        for _ in range(chance.choice((1, 2, 4))):
            answer = text(12) if chance.random() < 0.8 else []
            starts = chance.choice((1, len(prompt), len(prompt), len(prompt)))
            texts.append(([*prompt, *answer], starts))
            if chance.random() < 0.2:
                texts.append(texts[-1])
    chance.shuffle(texts)
    return texts


def padded(texts, *, left=()):
    """Rows with a token more of padding than there must be, some of them on the left."""
    seq_len = max(len(ids) for ids, _ in texts) + 1
    rows = {key: torch.zeros(len(texts), seq_len).long() for key in ("input_ids", "attention_mask")}
    rows["labels"] = torch.full((len(texts), seq_len), IGNORED)
    for row, (ids, starts) in enumerate(texts):
        first = seq_len - len(ids) if row in left else 0
        these = slice(first, first + len(ids))
        rows["input_ids"][row, these], rows["attention_mask"][row, these] = torch.tensor(ids), 1
        rows["labels"][row, first + starts : first + len(ids)] = torch.tensor(ids)[starts:]
    return rows


def packed(texts):
    """Two rows, in which texts are documents."""
    halves = [texts[::2], texts[1::2] or texts[:1]]
    seq_len = max(sum(len(ids) for ids, _ in half) for half in halves)
    rows = {key: torch.zeros(2, seq_len).long() for key in ("input_ids", "attention_mask")}
    rows["labels"] = torch.full((2, seq_len), IGNORED)
    for row, half in enumerate(halves):
        end = 0
        for number, (ids, starts) in enumerate(half):
            start, end = end, end + len(ids)
            rows["input_ids"][row, start:end] = torch.tensor(ids)
            rows["attention_mask"][row, start:end] = number + 1
            rows["labels"][row, start + starts : end] = torch.tensor(ids)[starts:]
    return rows


def texts_of(rows):
    """Where each text lies in the rows, and its labels: (row, first, last, labels)."""
    for row, mask in enumerate(rows["attention_mask"]):
        for number in range(1, int(mask.max()) + 1):
            places = (mask == number).nonzero()[:, 0]
            first, last = int(places[0]), int(places[-1]) + 1
            yield row, first, last, rows["labels"][row, first:last]


def alone(model, rows):
    """Logits, and log-probabilities of next tokens, of an unmodified model, one text at a time."""
    shape = rows["input_ids"].shape
    logits, log_probs, entropies = torch.zeros(*shape, 64).double(), *torch.zeros(2, *shape)
    log_probs, entropies, losses = log_probs.double(), entropies.double(), []
    for row, first, last, labels in texts_of(rows):
        given = model(rows["input_ids"][row : row + 1, first:last]).logits[0]
        of_next, labels = given[:-1].log_softmax(-1), labels[1:]
        has_loss = labels != IGNORED
        picked = of_next.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        logits[row, first:last] = given
        log_probs[row, first : last - 1] = picked * has_loss
        entropies[row, first : last - 1] = -(of_next.exp() * of_next).sum(-1) * has_loss
        losses.append(-picked[has_loss])
    return logits, log_probs[:, :-1], entropies[:, :-1], torch.cat(losses)


def assert_same_gradients(model, reference, bound):
    """Exactly where there is no bound."""
    expected = gradients(reference)
    if bound:
        assert_gradients(model, expected, bound)
    else:
        assert_close(gradients(model), expected)
    for each in (model, reference):
        each.zero_grad()


def compare(rows_model, reference, rows, bound=0.0):
    """The loss, numbers and their gradients, and logits and theirs."""
    close = {"rtol": bound, "atol": bound} if bound else {}
    logits, log_probs, entropies, losses = alone(reference, rows)
    real = rows["attention_mask"] != 0
    chance = torch.Generator().manual_seed(4)
    numbers = rows_model(**rows, fused_lm_head=True)
    assert_close(numbers.log_probs, log_probs, **close)
    assert_close(numbers.entropy, entropies, **close)
    assert numbers.label_mask.equal(log_probs != 0)
    cotangents = torch.randn(2, *log_probs.shape, generator=chance).double()
    (numbers.log_probs * cotangents[0] + numbers.entropy * cotangents[1]).sum().backward()
    retained = {"retain_graph": True}
    (log_probs * cotangents[0] + entropies * cotangents[1]).sum().backward(**retained)
    assert_same_gradients(rows_model.module, reference, bound)
    if not real[:, 0].all():
        return
    if len(losses):
        expected, loss = losses.mean(), rows_model(**rows).loss
        assert_close(loss, expected, **close)
        loss.backward()
        expected.backward(**retained)
        assert_same_gradients(rows_model.module, reference, bound)
    without = {key: x for key, x in rows.items() if key != "labels"}
    given = rows_model(**without).logits * real[..., None]
    assert_close(given, logits, **close)
    cotangent = torch.randn(logits.shape, generator=chance).double()
    (given * cotangent).sum().backward()
    (logits * cotangent).sum().backward()
    assert_same_gradients(rows_model.module, reference, bound)


def on_mesh(kind, degrees, *, options=(), change=(), **placing):
    on = ParallelMesh.from_degrees(degrees, "cpu")
    model = parallelize_hf(build(kind, **dict(change)), on, shared_prompts=True, **placing)
    reference = build(kind, **dict(change))
    if kind == EXACT:
        reference.set_attn_implementation("sdpa")
    return reference, WholeRows(model, on, entropy_gradient=True, **dict(options))


@spmd(ranks=(1, 2, 3))
def test_rows_that_share_prompts_give_what_they_give_alone(mesh, ranks):
    """In fp64: any prompts and answers, padded on either side or packed, by two strategies."""
    bucketed = {"layout": DocumentBalanced, "buckets": Buckets(MultiplesOf(24))}
    cases = ((None, {}, (1, 10)), (AllGatherAttention(), bucketed, (3, 5)))
    for attention, options, seeds in cases:
        degrees = Degrees(cp=ranks)
        reference, rows_model = on_mesh(EXACT, degrees, options=options, attention=attention)
        for seed in seeds:
            texts = drawn(seed)
            for rows in (padded(texts), padded(texts, left=range(0, len(texts), 2)), packed(texts)):
                compare(rows_model, reference, rows)


FULL = {"layer_types": ["full_attention"] * 2}
KINDS = {
    "gpt_oss": FULL,
    "gemma2": FULL,
    "deepseek_v3": LATENT,
    "qwen3_moe": {},
    "gpt2": {},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow_where(lambda kind: kind != "gpt_oss")
@spmd(ranks=2)
def test_families_give_what_they_give_alone(mesh, kind):
    """Sinks, a softcap, latents, experts; and learned positions, of which answers need no more."""
    chance = random.Random(0)
    prompt = [chance.randrange(64) for _ in range(70)]
    texts = [([*prompt, *(chance.randrange(64) for _ in range(30))], 70) for _ in range(4)]
    reference, rows_model = on_mesh(kind, Degrees(cp=2), change=KINDS[kind])
    compare(rows_model, reference, padded(texts), BOUND)


@spmd(axes={"cp": 2, "tp": 2})
def test_rows_that_share_prompts_do_so_under_tp_in_graphs(mesh):
    reference, rows_model = on_mesh("qwen3", Degrees(cp=2, tp=2), compile=GRAPHS)
    compare(rows_model, reference, padded(drawn(1)), BOUND)


def visible_texts(grouped):
    """What each token of the row sees, itself the last: ids."""
    documents = documents_of_hf_batch(grouped.rows)
    given = {key: grouped.rows[key] for key in ("prefix", "block")}
    coords = Coords.of(documents, **given)
    seen = ANSWERS_TO_A_PROMPT.visible(coords, coords)[0]
    return [grouped.rows["input_ids"][0][each].tolist() for each in seen]


def test_each_token_of_rows_put_together_sees_its_own_text():
    fewer = 0
    for seed in range(200):
        texts = drawn(seed)
        for rows in (padded(texts), packed(texts)):
            grouped = grouped_rows(rows)
            if grouped is None:
                continue
            seen, row = visible_texts(grouped), grouped.rows
            positions = with_answers(row, documents_of_hf_batch(row), SHARING)["position_ids"][0]
            for at, first, last, _ in texts_of(rows):
                ids = rows["input_ids"][at, first:last].tolist()
                for place, where in enumerate(grouped.index[at, first:last].tolist()):
                    assert seen[where] == ids[: place + 1]
                    assert positions[where] == place
            assert (row["labels"] != IGNORED).sum() == sum(
                int((labels[1:] != IGNORED).sum()) for *_, labels in texts_of(rows)
            )
            saved = int((rows["attention_mask"] != 0).sum()) - row["input_ids"].shape[1]
            assert saved >= LEAST
            fewer += 1
    assert fewer > 150


def most_saved(texts):
    """Tokens that the best of all groupings saves, each of which is tried."""

    def saved(group):
        free = min(min(len(ids), starts) for ids, starts in group)
        alike = [len(set(column)) == 1 for column in zip(*(ids for ids, _ in group), strict=False)]
        common = min(free, [*alike, False].index(False)) - 1
        return (len(group) - 1) * common if common >= LEAST else 0

    def best(rest):
        if not rest:
            return 0
        first, others = rest[0], range(1, len(rest))
        return max(
            saved([first, *(rest[i] for i in chosen)])
            + best([rest[i] for i in others if i not in chosen])
            for count in range(len(rest))
            for chosen in combinations(others, count)
        )

    return best(list(texts))


def test_rows_are_grouped_by_what_saves_most():
    """A text that all begin with is shared by all only where that saves more than prompts do."""
    chosen = 0
    for seed in range(400):
        texts = drawn(seed)
        if len(texts) > 6 or any(starts < len(ids) <= LEAST for ids, starts in texts):
            continue
        rows = padded([(ids, min(starts, len(ids))) for ids, starts in texts])
        grouped = grouped_rows(rows)
        tokens = int(rows["attention_mask"].sum())
        saved = 0 if grouped is None else tokens - grouped.rows["input_ids"].shape[1]
        free = all(starts != 1 for _, starts in texts)
        assert saved == most_saved(texts) if free else saved <= most_saved(texts)
        chosen += free and saved > 0
    assert chosen > 20


@pytest.mark.parametrize(
    ("texts", "tokens"),
    [
        ([([5] * 30, 30)], None),  # one row
        ([([5] * 30, 30), ([6] * 30, 30)], None),  # nothing in common
        ([([5] * 30, 30)] * 3, 29 + 3),  # alike, without an answer
        ([([5] * 30, 20)] * 3, 19 + 3 * 11),  # alike, each with a loss of its own
        ([([5] * 30, 1)] * 3, None),  # all tokens predicted
        ([([5] * 20, 20), ([5] * 20 + [7], 20)], 19 + 1 + 2),  # a prompt that is a whole row
        ([([5] * LEAST, LEAST)] * 2, None),  # too short
    ],
)
def test_rows_share_what_is_worth_it_and_has_no_loss(texts, tokens):
    grouped = grouped_rows(padded(texts))
    assert (None if grouped is None else grouped.rows["input_ids"].shape[1]) == tokens


def placed(model):
    return parallelize_hf(model, ParallelMesh(Degrees(), None, *[None] * 7), shared_prompts=True)


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("gemma2", {}, r"layers\.0\.self_attn has the mask .*SlidingWindow"),
        ("llama4_text", {}, r"layers\.0\.self_attn has the mask .*AttentionChunks"),
        ("lfm2", {}, r"layers\.0\.conv\..* reads tokens in the order of the row"),
        ("mpt", MPT, r"blocks\.0\.attn adds a bias by distance"),
        (
            "qwen3_moe",
            {"output_router_logits": True},
            "balance loss .*output_router_logits = False",
        ),
        ("llama", DYNAMIC, "rotary frequencies by the longest position"),
    ],
)
def test_never_silent_model_that_reads_answers_in_their_order_is_refused(kind, change, named):
    model = build(kind, **change)
    with pytest.raises(ValueError, match=rf"(?s)Answers share a prompt where .*{named}"):
        placed(model)
    placed_without = parallelize_hf(model, ParallelMesh(Degrees(), None, *[None] * 7))
    assert not shares_prompts(placed_without)


def test_never_silent_classifier_does_not_share_prompts():
    with pytest.raises(ValueError, match="score reads the last token of a row"):
        placed(build("llama", head="SequenceClassification"))


def test_never_silent_labels_of_another_shape_are_refused():
    """Put together, they would be read as those of other tokens."""
    rows_model = WholeRows(placed(build("llama")), ParallelMesh(Degrees(), None, *[None] * 7))
    rows = padded([([5] * 30, 20)] * 3)
    labels = rows.pop("labels")
    for wrong in (labels[:, :-1], labels[:1], torch.cat([labels] * 2), torch.cat([labels] * 2, 1)):
        with pytest.raises(ValueError, match="Labels are shifted in whole rows"):
            rows_model(**rows, labels=wrong)
    with pytest.raises(TypeError, match="got input_ids of type list"):
        rows_model(**rows, labels=labels.tolist())


@spmd(ranks=2)
def test_never_silent_calls_that_would_not_count_prompts_once_per_answer(mesh):
    on, rows = ParallelMesh.from_degrees(Degrees(cp=2), "cpu"), padded(drawn(1))
    halo = parallelize_hf(build("llama"), on, HaloAttention(64), shared_prompts=True)
    with pytest.raises(ValueError, match="HaloAttention"):
        WholeRows(halo, on)(**rows)
    adapted = get_peft_model(
        build("llama"), LoraConfig(lora_dropout=0.1, target_modules=["q_proj"])
    )
    rows_model = WholeRows(parallelize_hf(adapted, on, shared_prompts=True), on)
    with pytest.raises(ValueError, match=r"count once, .*PeftModel.*dropout .*rates to 0\.0"):
        rows_model(**rows)
    rows_model.train(mesh.get_local_rank() == 0)
    with pytest.raises(ValueError, match="count once" if rows_model.training else "rank 0"):
        rows_model(**rows)
    rows_model.eval()(**rows)
    # What one rank finds wrong with its rows, both hear of.
    holes = rows["attention_mask"].clone()
    holes[0, :2] = mesh.get_local_rank()
    with pytest.raises(ValueError, match="padding" if mesh.get_local_rank() == 0 else "rank 0"):
        rows_model(**{**rows, "attention_mask": holes})
    experts = WholeRows(parallelize_hf(build("qwen3_moe"), on, shared_prompts=True), on)
    with pytest.raises(ValueError, match="the balance loss of its experts"):
        experts(**rows, output_router_logits=True)
    plain = parallelize_hf(build("llama"), on)
    given = {key: torch.zeros_like(rows["input_ids"]) for key in ("prefix", "block")}
    with pytest.raises(ValueError, match="pass shared_prompts=True to parallelize_hf"):
        shard_hf_batch({"input_ids": rows["input_ids"], **given}, on, model=plain)
    with pytest.raises(ValueError, match="block of type NoneType: give both"):
        shard_hf_batch({**rows, "prefix": given["prefix"]}, on, model=experts.module)


@spmd(ranks=2)
def test_rows_without_a_prompt_are_what_they_are_in_any_model(mesh):
    """By the functions that put nothing together, with a prefix of their own, and ahead."""
    on, rows = ParallelMesh.from_degrees(Degrees(cp=2), "cpu"), padded(drawn(1))
    model = parallelize_hf(build("llama"), on, shared_prompts=True)
    expected = summed(causal_lm_loss(parallelize_hf(build("llama"), on), rows, on), on)
    assert_close(summed(causal_lm_loss(model, rows, on), on), expected)
    grouped = grouped_rows(rows)
    assert grouped is not None
    assert_close(summed(causal_lm_loss(model, grouped.rows, on), on), expected)
    # Labels of an answer's first token may be there: nothing that ends before it has them.
    labels, block = grouped.rows["labels"], grouped.rows["block"]
    copies = (block > 0) & (block.diff(dim=1, prepend=block[:, :1]) != 0)
    labeled = labels.where(~copies, grouped.rows["input_ids"])
    labeled = {**grouped.rows, "labels": labeled}
    assert_close(summed(causal_lm_loss(model, labeled, on), on), expected)
    rows_model = WholeRows(model, on)
    rows_model.prepare_ahead(rows)
    lengths = []
    model.get_input_embeddings().register_forward_hook(lambda *x: lengths.append(x[1][0].shape))
    rows_model(**rows)
    assert lengths == [(1, -(-grouped.index.max().item() // 4) * 2)]

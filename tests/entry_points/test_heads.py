"""B1, B2: models of transformers with other heads than a language model's, and inner entries."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import LlamaForCausalLM, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import causal_lm_loss, install_mixers, shard_hf_batch
from dtcp.parallelize import Compile, FullCheckpoint, parallelize_hf
from dtcp.sequence.layout import Contiguous, HeadTail
from tests.harness.hf_models import build, config_of
from tests.harness.parity import assert_gradients, gradients, summed
from tests.harness.spmd import spmd

BOUND = 1e-5
"""Relative error: the models' own norms, softmax and rotary tables are fp32 in a model of fp64."""
LENGTHS = (21, 9)
HEAD = {"num_labels": 3, "classifier_dropout": 0.0}
EOS, PAD = 7, 0


def a_batch(pad: int = PAD) -> dict[str, torch.Tensor]:
    """Two rows of 21 and 9 tokens, as a collator of transformers pads them."""
    ids = torch.randint(1, 64, (2, 21), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(21) < torch.tensor(LENGTHS)[:, None]
    ids = ids.where(ids != pad, pad + 1).where(mask, pad)
    return {"input_ids": ids, "attention_mask": mask.long()}


def on_one_device(model: nn.Module, batch: dict[str, torch.Tensor], field: str) -> list:
    """The unmodified model's outputs, each row alone and without padding."""
    rows = [ids[None, :n] for ids, n in zip(batch["input_ids"], LENGTHS, strict=True)]
    return [getattr(model(input_ids=ids), field)[0] for ids in rows]


def assert_rows_equal(kind, degrees, layout=HeadTail, pad=PAD, change=None, **options):
    """A classifier's logits and gradients are those of the unmodified model, on every rank."""
    change = {**HEAD, "pad_token_id": pad, **(change or {})}
    reference = build(kind, head="SequenceClassification", **change)
    model = build(kind, head="SequenceClassification", **change)
    mesh, target = ParallelMesh.from_degrees(degrees, "cpu"), torch.tensor([2, 0])
    parallelize_hf(model, mesh, **options)
    batch = a_batch(pad)
    expected = torch.stack(on_one_device(reference, batch, "logits"))
    F.cross_entropy(expected, target).backward()

    mine = slice(mesh.rank("batch"), None, mesh.size("batch"))
    rows = {key: x[mine] for key, x in {**batch, "labels": target}.items()}
    local, sharded = shard_hf_batch(rows, mesh, layout, model=model)
    labels = local.pop("labels")
    logits = model(**local, attn_metadata=sharded.attn_metadata).logits
    assert_close(logits, expected[mine], rtol=BOUND, atol=BOUND)
    (F.cross_entropy(logits, labels, reduction="sum") / len(target)).backward()
    assert_gradients(model, gradients(reference), BOUND)


@pytest.mark.slow_where(lambda kind: kind in ("gemma3_text", "gpt_oss"))
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss"])
@spmd(ranks=2)
def test_B1_classifier_reads_the_last_token_of_the_row_and_not_of_the_shard(mesh, kind):
    assert_rows_equal(kind, Degrees(cp=2))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Contiguous, HeadTail])
@spmd(ranks=3)
def test_B1_classifier_on_more_ranks_compiled_and_checkpointed(mesh, layout):
    compiled = {"compile": Compile("aot_eager"), "activation_checkpoint": FullCheckpoint()}
    assert_rows_equal("mistral", Degrees(cp=3), layout, **compiled)


@pytest.mark.parametrize("degrees", [Degrees(cp=2, tp=2), Degrees(dp_shard=2, cp=2)])
@spmd(ranks=4)
def test_B1_classifier_beside_other_axes(mesh, degrees):
    assert_rows_equal("llama", degrees)


@spmd(ranks=2)
def test_B1_padding_token_that_ends_rows_too_is_read_as_the_model_reads_it(mesh):
    """Where rows end with the padding token, transformers takes the token before."""
    kind = {"head": "SequenceClassification", **HEAD, "pad_token_id": EOS}
    reference, model = build("llama", **kind), build("llama", **kind)
    parallelize_hf(model, whole := ParallelMesh.from_device_mesh(mesh))
    batch = a_batch(EOS)
    batch["input_ids"][[0, 1], [20, 8]] = EOS
    expected = reference(**batch).logits
    local, sharded = shard_hf_batch(batch, whole, model=model)
    actual = model(**local, attn_metadata=sharded.attn_metadata).logits
    assert_close(actual, expected, rtol=BOUND, atol=BOUND)


def test_B1_padding_that_the_model_would_read_is_refused():
    model = build("llama", head="SequenceClassification", **HEAD, pad_token_id=EOS)
    install_mixers(model)
    with pytest.raises(
        ValueError, match=r"pad_token_id=7, got token 20 of row 1, which is padding"
    ):
        shard_hf_batch(a_batch(PAD), one(), model=model)


def test_B1_padding_token_that_is_set_after_the_model_was_placed_is_refused():
    """As TRL's RewardTrainer sets the tokenizer's: a row's end would have been another token."""
    model = build("llama", head="SequenceClassification", **HEAD, pad_token_id=EOS)
    install_mixers(model)
    model.config.pad_token_id = PAD
    with pytest.raises(ValueError, match=rf"pad_token_id={PAD} for {EOS}: set it before"):
        shard_hf_batch(a_batch(PAD), one(), model=model)


class Rewards(LlamaPreTrainedModel):
    """A reward model as people write them: a value head, and what it gives for one token."""

    def __init__(self, config, pool):
        super().__init__(config)
        self.model = LlamaForCausalLM(config).model
        self.value = nn.Linear(config.hidden_size, 1)
        self.pool = pool
        self.post_init()

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        hidden = self.model(input_ids, position_ids=position_ids, **kwargs).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=self.pool(self, hidden))


def last(model, hidden):
    return model.value(hidden).squeeze(-1)[:, -1]


def rewards(pool) -> nn.Module:
    torch.manual_seed(0)
    return Rewards(config_of("llama", pad_token_id=None), pool).double()


@spmd(ranks=2)
def test_B1_reward_model_of_ones_own_gives_the_last_tokens_reward(mesh):
    reference, model = rewards(last), rewards(last)
    parallelize_hf(model, whole := ParallelMesh.from_device_mesh(mesh))
    ids = a_batch()["input_ids"]
    expected = reference(input_ids=ids).logits
    expected.square().sum().backward()
    local, sharded = shard_hf_batch({"input_ids": ids}, whole, model=model)
    actual = model(**local, attn_metadata=sharded.attn_metadata).logits
    assert_close(actual, expected, rtol=BOUND, atol=BOUND)
    actual.square().sum().backward()
    assert_gradients(model, gradients(reference), BOUND)


def test_B1_pools_that_tokens_read_are_refused_by_name():
    with pytest.raises(ValueError, match=r"the model \(Rewards\): tokens meet in it"):
        install_mixers(rewards(lambda model, hidden: model.value(hidden + hidden[:, -1:])))


@spmd(ranks=2)
def test_B1_token_classifier_keeps_labels_at_their_tokens(mesh):
    kind = {"head": "TokenClassification", **HEAD}
    reference, model = build("llama", **kind), build("llama", **kind)
    parallelize_hf(model, whole := ParallelMesh.from_device_mesh(mesh))
    batch = a_batch()
    batch["labels"] = (batch["input_ids"] % 3).where(batch["attention_mask"] == 1, -100)
    logits = torch.cat(on_one_device(reference, batch, "logits"))
    expected = F.cross_entropy(logits, batch["labels"][batch["attention_mask"] == 1])
    expected.backward()
    share = causal_lm_loss(model, batch, whole)
    share.backward()
    assert_close(summed(share, whole), expected.detach(), rtol=BOUND, atol=BOUND)
    assert_gradients(model, gradients(reference), BOUND)


@spmd(ranks=2)
def test_B1_question_answering_gathers_logits_of_the_row(mesh):
    reference, model = (build("llama", head="QuestionAnswering") for _ in range(2))
    parallelize_hf(model, whole := ParallelMesh.from_device_mesh(mesh))
    batch = {key: x[:1] for key, x in a_batch().items()}
    answer = {"start_positions": torch.tensor([3]), "end_positions": torch.tensor([17])}
    expected = reference(**batch, **answer).loss
    expected.backward()
    local, sharded = shard_hf_batch({**batch, **answer}, whole, model=model)
    ends = [local.pop(key) for key in answer]
    out = model(**local, attn_metadata=sharded.attn_metadata)
    rows = [sharded.gather(x, replicated_loss=True) for x in (out.start_logits, out.end_logits)]
    loss = sum(F.cross_entropy(x, end) for x, end in zip(rows, ends, strict=True)) / 2
    assert_close(loss, expected, rtol=BOUND, atol=BOUND)
    loss.backward()
    assert_gradients(model, gradients(reference), BOUND)


@spmd(ranks=2)
def test_B1_model_without_a_head_keeps_the_sequence(mesh):
    reference, model = build("qwen3", head=""), build("qwen3", head="")
    parallelize_hf(model, whole := ParallelMesh.from_device_mesh(mesh))
    ids = a_batch()["input_ids"]
    local, sharded = shard_hf_batch({"input_ids": ids}, whole, model=model)
    hidden = model(**local, attn_metadata=sharded.attn_metadata).last_hidden_state
    expected = reference(input_ids=ids).last_hidden_state
    assert_close(sharded.gather(hidden), expected, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("head", ["SequenceClassification", "QuestionAnswering"])
def test_B1_loss_of_tokens_is_refused_where_outputs_are_of_rows(head):
    model = build("llama", head=head, **HEAD)
    install_mixers(model)
    with pytest.raises(ValueError, match=f"one output per token, got LlamaFor{head}"):
        causal_lm_loss(model, {**a_batch(), "labels": torch.tensor([0, 1])}, one())


def test_B1_positions_that_a_model_counts_in_a_way_of_its_own_are_refused(monkeypatch):
    """From behind the padding's number, as RoBERTa does, is found; backwards is not."""
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    install_mixers(build("roberta", **quiet))
    model = build("roberta", **quiet)
    count = model.roberta.embeddings.create_position_ids_from_input_ids
    monkeypatch.setattr(
        model.roberta.embeddings,
        "create_position_ids_from_input_ids",
        lambda *args, **kwargs: count(*args, **kwargs).flip(1),
    )
    with pytest.raises(ValueError, match="RobertaForCausalLM does not count the positions"):
        install_mixers(model)


IDS = torch.zeros(1, 8, dtype=torch.int64)


@cache
def with_mixers(head):
    """A model, and what it may be called with."""
    model = build("llama", head=head, **HEAD)
    install_mixers(model)
    local, sharded = shard_hf_batch({"input_ids": IDS + 1}, one(), model=model)
    return model, {**local, "attn_metadata": sharded.attn_metadata}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"position_ids": None}, r"without=\['position_ids'\]"),
        ({"attn_metadata": None}, r"without=\['attn_metadata'\]"),
        ({"position_ids": IDS[:, :4]}, r"position_ids.shape=\(1, 4\) for tokens of \(1, 8\)"),
        ({"attention_mask": IDS + 1}, r"attention_mask of shape \(1, 8\): give it to shard_hf"),
    ],
)
@pytest.mark.parametrize("entry", ["", "model"])
@pytest.mark.parametrize("head", ["CausalLM", "SequenceClassification"])
def test_B2_inner_entries_are_held_to_the_same_rules(head, entry, change, match):
    model, right = with_mixers(head)
    called = model.get_submodule(entry)
    if entry:
        called(**right)
        called(right["input_ids"], **{key: x for key, x in right.items() if key != "input_ids"})
    with pytest.raises(ValueError, match=rf"{match}|with=\['attention_mask'\]"):
        called(**{**right, **change})


def test_B2_model_inside_of_a_model_inside_is_held_to_them_too():
    model = build("opt", ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)
    install_mixers(model)
    with pytest.raises(ValueError, match=r"without=\['position_ids', 'attn_metadata'\]"):
        model.model.decoder(input_ids=IDS)


def one() -> ParallelMesh:
    return ParallelMesh(Degrees(), None, *[None] * 7)

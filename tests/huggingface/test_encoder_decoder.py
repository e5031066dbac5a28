"""Models of transformers with an encoder and a decoder, held against themselves on one device."""

import copy
import tempfile

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from torch.testing import assert_close

from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import WholeRows, causal_lm_loss, install_mixers, shard_hf_batch, survey
from dtcp.mixer_metadata import batch_metadata
from dtcp.parallelize import Compile, SelectiveCheckpoint, load_hf, parallelize_hf
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.softmax import AllGatherAttention, RingAttention, UlyssesAttention
from dtcp.softmax.mixer import CrossAttention
from dtcp.trainers import MeshTrainerMixin
from tests.harness.parity import assert_gradients, gradients, summed
from tests.harness.spmd import spmd

SMALL = {
    "vocab_size": 64,
    "d_model": 32,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "eos_token_id": 2,
}
T5 = {"d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
BART = {
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
KINDS = {
    "t5": T5,
    "mt5": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "umt5": T5,
    "bart": BART,
    "mbart": {**BART, "forced_eos_token_id": None},
    "pegasus": BART,
    "marian": {**BART, "decoder_vocab_size": 64, "forced_eos_token_id": 2},
    "blenderbot": BART,
}
SOURCE, TARGET = 24, 16


def build(kind):
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(kind, **SMALL, **KINDS[kind])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").double()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def adapted(kind):
    """The model with adapters in both stacks, in cross attention and in feed-forwards."""
    targets = ["q", "k", "v", "o", "wi", "wo"]
    if kind == "bart":
        targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    model = build(kind)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        return get_peft_model(model, config).double()


def a_batch():
    """Two rows as DataCollatorForSeq2Seq makes them, without decoder_input_ids: padded, both."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(3, 64, (2, SOURCE), generator=generator)
    labels = torch.randint(3, 64, (2, TARGET), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[1, 17:], labels[0, 13:] = 0, -100
    return {"input_ids": input_ids.where(mask == 1, 0), "attention_mask": mask, "labels": labels}


def assert_step_equal(kind, degrees, layout=HeadTail, attention=None, *, make=build, **options):
    """Assert that loss and all gradients are those of the model's own loss on one device."""
    reference, model = make(kind), make(kind)
    expected = reference(**a_batch(), use_cache=False).loss
    expected.backward()
    mesh = ParallelMesh.from_degrees(degrees, "cpu")
    parallelize_hf(model, mesh, attention or RingAttention(), **options)
    with count_traffic() as traffic:
        mine = slice(mesh.rank("batch"), None, mesh.size("batch"))
        rows = {key: x[mine] for key, x in a_batch().items()}
        loss = causal_lm_loss(model, rows, mesh, layout)
        loss.backward()
    assert_close(summed(loss, mesh), expected.detach(), rtol=1e-7, atol=0.0)
    # Gradients that are rounding alone (a key's bias) are held against the others.
    assert_gradients(model, gradients(reference), 1e-6, floor=1e-3)
    return traffic


@pytest.mark.slow_where(lambda kind: kind != "t5")
@pytest.mark.parametrize("kind", KINDS)
@spmd(ranks=2)
def test_cross_attention_of_encoder_and_decoder_equals_one_device(mesh, kind):
    assert_step_equal(kind, Degrees(cp=2), HeadTail)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bart"])
@spmd(ranks=1)
def test_cross_attention_on_one_rank_equals_one_device(mesh, kind):
    """The others are these two's layers with other norms, activations and positions."""
    assert_step_equal(kind, Degrees(cp=1), HeadTail)


@pytest.mark.slow
@spmd(ranks=3)
def test_cross_attention_on_three_ranks_equals_one_device(mesh):
    """With a bias by distance; test_hf_families.py has learned positions."""
    assert_step_equal("t5", Degrees(cp=3), Contiguous)


@pytest.mark.slow
@pytest.mark.parametrize("attention", [AllGatherAttention(), UlyssesAttention()])
@spmd(ranks=4)
def test_cross_attention_by_every_strategy_equals_one_device(mesh, attention):
    assert_step_equal("t5", Degrees(cp=4), attention=attention)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "degrees"),
    [
        *((kind, Degrees(cp=2, tp=2)) for kind in ("t5", "mt5", "bart")),
        *((kind, Degrees(dp_shard=2, cp=2)) for kind in ("t5", "bart")),
    ],
    ids=str,
)
@spmd(ranks=4)
def test_cross_attention_beside_tp_and_fsdp_equals_one_device(mesh, kind, degrees):
    assert_step_equal(kind, degrees)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "degrees"), [("t5", Degrees(dp_shard=2, cp=2)), ("bart", Degrees(cp=2, tp=2))], ids=str
)
@spmd(ranks=4)
def test_lora_of_encoder_and_decoder_equals_one_device(mesh, kind, degrees):
    """The base is frozen on both, and has no gradient."""
    assert_step_equal(kind, degrees, make=adapted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bart"])
@spmd(ranks=2)
def test_cross_attention_compiled_and_recomputed_equals_one_device(mesh, kind):
    options = {"compile": Compile("aot_eager"), "activation_checkpoint": SelectiveCheckpoint()}
    assert_step_equal(kind, Degrees(cp=2), **options)


@pytest.mark.slow
@spmd(ranks=2)
def test_cross_attention_in_whole_rows_gives_the_models_own_loss(mesh):
    """As trainers call it: whole rows in, the loss of all tokens out, logits in order."""
    reference, model = build("t5"), build("t5")
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    rows = WholeRows(parallelize_hf(model, on), on)
    expected = reference(**a_batch(), use_cache=False)
    assert_close(rows(**a_batch()).loss, expected.loss, rtol=1e-7, atol=0.0)
    batch = a_batch()
    given = {"decoder_input_ids": reference._shift_right(batch.pop("labels"))}
    logits = rows(**batch, **given).logits
    assert_close(logits, expected.logits, rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match="Log-probabilities of next tokens"):
        rows(**a_batch(), fused_lm_head=True)


@pytest.mark.slow
@spmd(ranks=1)
def test_trainer_divides_the_loss_of_a_decoder_by_its_labels(mesh):
    from transformers import Trainer, TrainingArguments

    on = ParallelMesh.from_degrees(Degrees(), "cpu")
    mixed = type("MeshTrainer", (MeshTrainerMixin, Trainer), {})
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, use_cpu=True, report_to=[])
        trainer = mixed(parallelize_hf(build("t5"), on), args, mesh=on)
    batch = a_batch()
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    assert int(items) == int((batch["labels"] != -100).sum())
    expected = build("t5")(**batch, use_cache=False).loss
    assert_close(trainer.training_step(trainer.rows_model, batch, items), expected.detach())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bart"])
@spmd(ranks=2)
def test_cross_attention_of_a_model_from_meta_equals_one_device(mesh, kind):
    """Surveyed by its narrow copy, filled by its weights' names, tied ones among them."""
    reference = build(kind)
    with torch.device("meta"):
        empty = type(reference)(copy.deepcopy(reference.config)).double()
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    model = load_hf(parallelize_hf(empty, on), reference.state_dict(), device="cpu")
    loss = causal_lm_loss(model, a_batch(), on).detach()
    dist.all_reduce(loss)
    assert_close(loss, reference(**a_batch(), use_cache=False).loss.detach(), rtol=1e-7, atol=0.0)


def test_survey_finds_cross_attention_and_gives_t5_a_table_for_its_bias():
    model = build("t5")
    assert model.encoder.block[0].layer[0].SelfAttention.compute_bias(3, 5).shape == (1, 4, 3, 5)
    surveyed = install_mixers(model)
    cross = [each.name for each in surveyed.attentions if each.cross]
    assert cross == [f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(2)]
    assert type(model.get_submodule(f"{cross[0]}.dtcp_mixer")) is CrossAttention
    of_encoder = model.encoder.block[0].layer[0].SelfAttention
    assert of_encoder.compute_bias(10**6, 10**6).shape == (4, 2 * 128 + 1)
    assert model.get_submodule(cross[0]).compute_bias(10**6, 10**6) is None
    documents = Documents.single(1, 8)
    alone = batch_metadata(model, documents, memory=documents)
    with pytest.raises(ValueError, match="An encoder reads the metadata of its own sequence"):
        model.encoder(input_ids=torch.ones(1, 8, dtype=torch.int64), attn_metadata=alone)


class Mixes(torch.nn.Module):
    """In the place of a projection of keys."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x.roll(1, 1))


@pytest.mark.slow
def test_tokens_that_meet_on_the_way_to_keys_of_cross_attention_are_refused():
    model = build("bart")
    attention = model.model.decoder.layers[1].encoder_attn
    attention.k_proj = Mixes(attention.k_proj)
    refused = survey(model).refused
    assert any("layers.1.encoder_attn" in each and "tokens meet in it" in each for each in refused)


@spmd(ranks=1)
def test_batches_of_encoder_and_decoder_that_do_not_fit_are_refused(mesh):
    on = ParallelMesh.from_degrees(Degrees(), "cpu")
    model = parallelize_hf(build("bart"), on)
    batch = a_batch()
    ids = batch["input_ids"]
    packed = torch.tensor([[1] * 9 + [2] * 15] * 2)
    left = batch["attention_mask"].flip(1)
    wrong = {
        "A decoder reads tokens of its own": {"input_ids": ids},
        r"holds what belongs to its two sequences, got \['encoder_outputs'\]": {
            **batch,
            "encoder_outputs": ids,
        },
        "attends to the memory document of its own number": {**batch, "attention_mask": packed},
        "then 0 for padding on the right": {**batch, "attention_mask": left},
        "A memory has the rows of its batch": {**batch, "labels": batch["labels"][:1]},
    }
    for message, each in wrong.items():
        with pytest.raises(ValueError, match=message):
            shard_hf_batch(each, on, model=model)
    with pytest.raises(ValueError, match="A batch to train on has labels"):
        causal_lm_loss(model, {"input_ids": ids, "decoder_input_ids": ids}, on)
    local, sharded = shard_hf_batch(batch, on, model=model)
    local.pop("labels")
    whole = {**local, "attn_metadata": sharded.attn_metadata}
    for key in ("decoder_position_ids", "position_ids"):
        with pytest.raises(ValueError, match="called with the position_ids"):
            model(**{name: x for name, x in whole.items() if name != key})

"""B3: batches as the collators of transformers make them, padded, flattened or stacked."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.testing import assert_close
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import causal_lm_loss, documents_of_hf_batch, install_mixers, shard_hf_batch
from tests.harness.hf_models import build

LENGTHS = (9, 5)
SAMPLES = [torch.arange(1, n + 1).tolist() for n in LENGTHS]


def tokenizer(side="right"):
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side=side)


def samples(**more):
    return [
        {"input_ids": list(ids), **{k: v[i] for k, v in more.items()}}
        for i, ids in enumerate(SAMPLES)
    ]


COLLATORS = {
    "language modeling": lambda: DataCollatorForLanguageModeling(tokenizer(), mlm=False)(samples()),
    "to a multiple": lambda: DataCollatorForLanguageModeling(
        tokenizer(), mlm=False, pad_to_multiple_of=8
    )(samples()),
    "seq2seq": lambda: DataCollatorForSeq2Seq(tokenizer())(samples(labels=SAMPLES)),
    "flattened": lambda: DataCollatorWithFlattening()(samples()),
    "flattened, with all keys": lambda: DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_seq_idx=True
    )(samples()),
    "flattened, without positions": lambda: DataCollatorWithFlattening(
        return_position_ids=False, return_flash_attn_kwargs=True
    )(samples()),
    "flattened, numbered alone": lambda: DataCollatorWithFlattening(
        return_position_ids=False, return_seq_idx=True
    )(samples()),
}


@pytest.fixture(scope="module")
def expected():
    """The mean loss of all samples by the unmodified model, each a row of its own."""
    reference = build("llama")
    losses, count = 0, 0
    for ids in SAMPLES:
        row = torch.tensor([ids])
        losses += reference(input_ids=row, labels=row).loss.detach() * (len(ids) - 1)
        count += len(ids) - 1
    return losses / count


@pytest.fixture(scope="module")
def with_mixers():
    model = build("llama")
    install_mixers(model)
    return model


@pytest.mark.parametrize("name", COLLATORS)
def test_B3_losses_of_collated_batches_equal_the_unmodified_models(with_mixers, expected, name):
    actual = causal_lm_loss(with_mixers, COLLATORS[name](), one())
    assert_close(actual.float(), expected, rtol=1e-5, atol=0)


def test_B3_token_classifiers_labels_are_padded_and_stay_in_place():
    labels = [[1] * n for n in LENGTHS]
    batch = DataCollatorForTokenClassification(tokenizer())(samples(labels=labels))
    model = build("llama", head="TokenClassification", num_labels=3, classifier_dropout=0.0)
    install_mixers(model)
    local, _ = shard_hf_batch(batch, one(), model=model)
    assert_close(local["labels"][:, :9], batch["labels"])
    assert causal_lm_loss(model, batch, one()).isfinite()


@pytest.mark.parametrize("collate", [DataCollatorWithPadding(tokenizer()), default_data_collator])
def test_B3_labels_of_rows_stay_whole(collate):
    features = samples(label=[2, 0])
    if collate is default_data_collator:
        features = [{**each, "input_ids": each["input_ids"][:5]} for each in features]
    batch = collate(features)
    model = build("llama", head="SequenceClassification", num_labels=3)
    install_mixers(model)
    local, _ = shard_hf_batch(batch, one(), model=model)
    assert local["labels"].tolist() == [2, 0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, None])
def test_B3_masks_of_any_dtype_and_none(dtype):
    batch = dict(COLLATORS["language modeling"]())
    expected = documents_of_hf_batch(batch).lengths
    assert expected == ((9,), (5,))
    if dtype is None:
        assert documents_of_hf_batch({**batch, "attention_mask": None}).lengths == ((9,), (9,))
    else:
        mask = batch["attention_mask"].to(dtype)
        assert documents_of_hf_batch({**batch, "attention_mask": mask}).lengths == expected


def test_B3_padding_on_the_left_is_refused_by_row():
    batch = DataCollatorForLanguageModeling(tokenizer("left"), mlm=False)(samples())
    with pytest.raises(
        ValueError, match="token 3 of row 1 with a token after it: pad on the right"
    ):
        documents_of_hf_batch(batch)


def test_B3_positions_that_a_collator_starts_elsewhere_are_refused():
    batch = DataCollatorWithFlattening(position_ids_start=2)(samples())
    with pytest.raises(ValueError, match=r"restart at 0 with each document, got .*2, 3, 4, 5"):
        documents_of_hf_batch(batch)


def one() -> ParallelMesh:
    return ParallelMesh(Degrees(), None, *[None] * 7)

"""Padding that models of transformers read off their ids: in masks, and in what they count."""

from functools import cache

import pytest
import torch
from torch.testing import assert_close

from dtcp import Documents, batch_metadata
from dtcp.batch import shard_batch
from dtcp.check.checked_hf import CheckedHuggingFaceModel
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import causal_lm_loss, shard_hf_batch, survey
from dtcp.parallelize import parallelize_hf
from tests.harness.hf_models import build as tiny
from tests.harness.spmd import spmd

QUIET = {
    "t5gemma": {},
    "m2m_100": {
        **dict.fromkeys(("dropout", "activation_dropout", "attention_dropout"), 0.0),
        **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop"), 0.0),
    },
    "roberta": dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
}


def build(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CheckedHuggingFaceModel(kind, QUIET[kind]).build()


@cache
def placed(kind):
    """A model with its mixers, which these tests only call; and its mesh of one rank."""
    on = ParallelMesh.from_degrees(Degrees(), "cpu")
    return parallelize_hf(build(kind), on), on


def rows(padding):
    """As a collator makes them, and a row whose labels end before it does."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (2, 12), generator=generator)
    labels = torch.randint(3, 64, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:], labels[0, 6:] = 0, -100
    return {"input_ids": ids.where(mask == 1, padding), "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("kind", ["t5gemma", "m2m_100"])
@pytest.mark.slow_where(lambda kind: kind != "m2m_100")
@spmd(ranks=1)
def test_padding_on_the_right_equals_the_unmodified_model(mesh, kind):
    model, on = placed(kind)
    reference = build(kind)
    batch = rows(reference.config.pad_token_id)
    expected = reference(**batch, use_cache=False).loss
    loss = causal_lm_loss(model, batch, on)
    assert_close(loss, expected, rtol=1e-6, atol=0.0, check_dtype=False)


@pytest.mark.slow
@spmd(ranks=1)
def test_padding_that_a_mask_is_made_of_is_hidden_or_refused(mesh):
    """T5Gemma hides it in each sequence, but not where its decoder reads the encoder's."""
    model, on = placed("t5gemma")
    assert survey(build("t5gemma")).hides_padding
    batch = rows(0)
    reference, decoder = build("t5gemma"), torch.tensor([[2, 5, 6, 7, 0, 0], [2, 3, 0, 0, 0, 0]])
    own = {key: batch[key] for key in ("input_ids", "attention_mask")}
    given = {**own, "decoder_input_ids": decoder}
    local, sharded = shard_hf_batch(given, on, model=model)
    assert [sum(each) for each in sharded.documents.lengths] == [4, 2]
    expected = reference(**given, use_cache=False).logits
    actual = model(**local, attn_metadata=sharded.attn_metadata).logits
    for row, length in enumerate((4, 2)):
        pair = actual[row, :length], expected[row, :length]
        assert_close(*pair, rtol=1e-6, atol=1e-6, check_dtype=False)
    for key, where in (("input_ids", "encoder"), ("decoder_input_ids", "decoder")):
        holed = {**given, key: given[key].clone()}
        holed[key][0, 2] = 0
        holed.pop("attention_mask" if where == "encoder" else "", None)
        with pytest.raises(ValueError, match=f"given no mask, got .* of its {where}: pad on"):
            shard_hf_batch(holed, on, model=model)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ({"input_ids": [[5, 0, 6, 7]]}, r"got input_ids\[0, 1\]=0 before a token of its document"),
        ({"input_ids": [[5, 6, 7, 900]]}, r"from 0 to \d+, got input_ids\[0, 3\]=900 for Roberta"),
        ({"input_ids": [[5] * 128]}, r"got one of 128 in row 0 for a RobertaForMaskedLM with 127"),
        (
            {"position_ids": [[7, 8, 127, 128]]},
            r"got position_ids\[0, 2\]=127 for a Roberta.* with 127",
        ),
    ],
)
@spmd(ranks=1)
def test_rows_that_shard_batch_cuts_are_looked_at_as_those_of_collators(mesh, rows, match):
    model, on = placed("roberta")
    batch = {key: torch.tensor(value) for key, value in rows.items()}
    batch.setdefault("input_ids", torch.tensor([[5, 6, 7, 8]]))
    with pytest.raises(ValueError, match=match):
        shard_batch(batch, on, model=model)


@pytest.mark.parametrize("kind", ["m2m_100", "roberta"])
@spmd(ranks=1)
def test_padding_before_a_token_is_refused_where_positions_are_counted_without(mesh, kind):
    """By a table that takes no positions, and by embeddings that are handed those of the batch."""
    model, on = placed(kind)
    padding = model.config.pad_token_id
    batch = rows(padding)
    if kind == "roberta":
        del batch["labels"]
    batch["input_ids"][0, 4] = padding
    with pytest.raises(ValueError, match=rf"input_ids\[0, 4\]={padding} before a token of its"):
        shard_hf_batch(batch, on, model=model)


@spmd(ranks=2)
def test_padding_that_a_layout_adds_may_lie_beyond_the_learned_positions(mesh):
    """Which it counts on to; the ranks that had none of it waited for the one that failed."""
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    reference, model = (tiny("gpt2", max_position_embeddings=34) for _ in range(2))
    parallelize_hf(model, on)
    ids = torch.arange(1, 35)[None]
    loss = causal_lm_loss(model, {"input_ids": ids, "labels": ids}, on).detach()
    torch.distributed.all_reduce(loss)
    assert_close(loss, reference(input_ids=ids, labels=ids).loss.detach(), check_dtype=False)


def test_layers_that_are_left_out_at_random_are_refused():
    quiet = dict.fromkeys(("dropout", "activation_dropout", "attention_dropout"), 0.0)
    refused = survey(CheckedHuggingFaceModel("m2m_100", quiet).build()).refused
    assert any("layers are left out at random in training (layerdrop=0.05)" in x for x in refused)


def test_routers_that_give_places_by_the_whole_batch_are_refused():
    refused = survey(CheckedHuggingFaceModel("nllb-moe").build()).refused
    assert any("experts take expert_capacity=64 tokens of a batch" in each for each in refused)


def test_never_silent_tokens_beyond_the_learned_positions_where_no_rows_are_cut():
    """One device's metadata are made without ids; only padding is let count on."""
    alone, length = ParallelMesh(Degrees(), None, *[None] * 7), 35
    model = parallelize_hf(tiny("gpt2", max_position_embeddings=34), alone)
    call = {
        "input_ids": torch.ones(1, length, dtype=torch.int64),
        "position_ids": torch.arange(length)[None],
        "attn_metadata": batch_metadata(model, Documents(((length,),), length)),
    }
    with pytest.raises(IndexError, match="index out of range"):
        model(**call)

"""Heads that read whole rows (a mean, the first token), held against one device's, row by row."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import LlamaModel
from transformers.modeling_outputs import SequenceClassifierOutput

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import install_mixers, shard_hf_batch, survey
from dtcp.huggingface.whole_rows import WholeRows
from dtcp.parallelize import Compile, FullCheckpoint, parallelize_hf
from dtcp.sequence.buckets import Buckets, OneOf
from tests.entry_points.test_heads import BOUND, HEAD, LENGTHS, Rewards, a_batch, one, rewards
from tests.harness.hf_models import build
from tests.harness.parity import assert_gradients, gradients, summed
from tests.harness.spmd import spmd

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0}
WINDOWS = {"local_attention": 8, "global_attn_every_n_layers": 2, "embedding_dropout": 0.0}
KINDS = {
    "pooler": ("bert", QUIET),
    "head": ("roberta", QUIET),
    "first token": ("modernbert", {"classifier_pooling": "cls", **WINDOWS}),
    "mean": ("modernbert", {"classifier_pooling": "mean", **WINDOWS}),
    "mean of logits": ("eurobert", {"classifier_pooling": "late"}),
}
TARGET = torch.tensor([2, 0])


def classifier(name: str, **change) -> nn.Module:
    kind, options = KINDS[name]
    return build(kind, head="SequenceClassification", **{**HEAD, **options, **change})


def alone(model: nn.Module) -> torch.Tensor:
    """The logits of the unmodified model, each row by itself and without padding."""
    rows = [ids[None, :n] for ids, n in zip(a_batch()["input_ids"], LENGTHS, strict=True)]
    return torch.cat([model(input_ids=ids).logits for ids in rows])


def assert_rows_equal(name: str, degrees: Degrees, **options) -> None:
    """Logits on every rank, and the gradients of all weights."""
    reference, model = classifier(name), classifier(name)
    mesh = ParallelMesh.from_degrees(degrees, "cpu")
    parallelize_hf(model, mesh, **options)
    expected = alone(reference)
    F.cross_entropy(expected, TARGET).backward()
    mine = slice(mesh.rank("batch"), None, mesh.size("batch"))
    rows = {key: x[mine] for key, x in {**a_batch(), "labels": TARGET}.items()}
    local, sharded = shard_hf_batch(rows, mesh, model=model)
    labels = local.pop("labels")
    logits = model(**local, attn_metadata=sharded.attn_metadata).logits
    assert_close(logits, expected[mine], rtol=BOUND, atol=BOUND)
    (F.cross_entropy(logits, labels, reduction="sum") / len(TARGET)).backward()
    assert_gradients(model, gradients(reference), BOUND, floor=1e-6)


@pytest.mark.parametrize("name", KINDS)
@spmd(ranks=2)
def test_heads_that_pool_give_every_rank_what_one_device_gives(mesh, name):
    assert_rows_equal(name, Degrees(cp=2))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("degrees", [Degrees(cp=2, tp=2), Degrees(dp_shard=2, cp=2)])
@spmd(ranks=4)
def test_heads_that_pool_beside_other_axes(mesh, name, degrees):
    assert_rows_equal(name, degrees)


@pytest.mark.slow_where(lambda name: name != "mean")
@pytest.mark.parametrize("name", KINDS)
@spmd(ranks=3)
def test_heads_that_pool_on_three_ranks_compiled_and_recomputed(mesh, name):
    options = {"compile": Compile("aot_eager"), "activation_checkpoint": FullCheckpoint()}
    assert_rows_equal(name, Degrees(cp=3), **options)


@spmd(ranks=2)
def test_model_that_pools_gives_hidden_states_of_its_own_tokens_as_well(mesh):
    """AutoModel of BERT: a loss of tokens and one of rows, of which either has its gradients."""
    reference, model = (build("bert", head="", **QUIET) for _ in range(2))
    whole = ParallelMesh.from_device_mesh(mesh)
    parallelize_hf(model, whole)
    ids = a_batch()["input_ids"][:1]
    out = reference(input_ids=ids)
    expected = out.last_hidden_state.square().sum() + out.pooler_output.sin().sum()
    expected.backward()
    local, sharded = shard_hf_batch({"input_ids": ids}, whole, model=model)
    padding = local.pop("padding_mask", None)
    out = model(**local, attn_metadata=sharded.attn_metadata)
    squares = out.last_hidden_state.square()
    of_tokens = squares.sum() if padding is None else squares[~padding].sum()
    of_rows = out.pooler_output.sin().sum()
    assert_close(summed(of_tokens, whole) + of_rows, expected, rtol=BOUND, atol=BOUND)
    (of_tokens + of_rows).backward()
    assert_gradients(model, gradients(reference), BOUND, floor=1e-6)


@spmd(ranks=2)
def test_rows_that_a_bucket_adds_have_no_gradient(mesh):
    """A mean over no token would be NaN."""
    reference, model = classifier("mean"), classifier("mean")
    whole = ParallelMesh.from_device_mesh(mesh)
    parallelize_hf(model, whole)
    expected = F.cross_entropy(alone(reference), TARGET)
    expected.backward()
    rows_model = WholeRows(model, whole, buckets=Buckets(tokens=OneOf((32,)), rows=OneOf((3,))))
    out = rows_model(**a_batch(), labels=TARGET)
    assert out.logits.shape[0] == 2
    assert_close(out.loss, expected, rtol=BOUND, atol=BOUND)
    out.loss.backward()
    assert_gradients(model, gradients(reference), BOUND, floor=1e-6)


POOLS = {
    "mean": lambda model, hidden: model.value(hidden.mean(1)),
    "first": lambda model, hidden: model.value(hidden[:, 0]),
    "last hidden": lambda model, hidden: model.value(hidden[:, -1]),
    "greatest": lambda model, hidden: model.value(hidden).amax(1),
}


@pytest.mark.parametrize("pool", POOLS)
@spmd(ranks=2)
def test_heads_of_ones_own_pool_rows_of_one_length(mesh, pool):
    """One that hears nothing of padding is given none, that of a layout neither."""
    reference, model = rewards(POOLS[pool]), rewards(POOLS[pool])
    whole = ParallelMesh.from_device_mesh(mesh)
    parallelize_hf(model, whole)
    batch = a_batch()
    ids = batch["input_ids"]  # 21 tokens: a layout of two ranks pads them.
    expected = reference(input_ids=ids).logits
    expected.square().sum().backward()
    local, sharded = shard_hf_batch({"input_ids": ids}, whole, model=model)
    actual = model(**local, attn_metadata=sharded.attn_metadata).logits
    assert_close(actual, expected, rtol=BOUND, atol=BOUND)
    actual.square().sum().backward()
    assert_gradients(model, gradients(reference), BOUND, floor=1e-6)
    if pool != "first":
        with pytest.raises(ValueError, match=r"pools padding as it does tokens, got 9 tokens in r"):
            shard_hf_batch(batch, whole, model=model)


class TwoPools(Rewards):
    """What a pooler inside of a trunk hides at first: its model pools, too."""

    def __init__(self, config, pool):
        super().__init__(config, pool)
        self.pooler = FirstToken()

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, **kwargs):
        given = {"position_ids": position_ids, "attention_mask": attention_mask, **kwargs}
        hidden = self.model(input_ids, **given).last_hidden_state
        return SequenceClassifierOutput(logits=self.pool(self, hidden, self.pooler(hidden)))


class FirstToken(nn.Module):
    def forward(self, hidden):
        return hidden[:, 0]


def two_pools(pool) -> nn.Module:
    model = rewards(pool)
    model.pooler = FirstToken()
    model.__class__ = TwoPools
    return model


@spmd(ranks=2)
def test_pools_of_a_module_and_of_the_model_around_it_are_both_found(mesh):
    def pool(model, hidden, first):
        return model.value(hidden.mean(1)) + 2 * model.value(first)

    reference, model = two_pools(pool), two_pools(pool)
    whole = ParallelMesh.from_device_mesh(mesh)
    parallelize_hf(model, whole)
    ids = a_batch()["input_ids"]
    expected = reference(input_ids=ids).logits
    expected.square().sum().backward()
    local, sharded = shard_hf_batch({"input_ids": ids}, whole, model=model)
    actual = model(**local, attn_metadata=sharded.attn_metadata).logits
    assert_close(actual, expected, rtol=BOUND, atol=BOUND)
    actual.square().sum().backward()
    assert_gradients(model, gradients(reference), BOUND, floor=1e-6)


def test_pooled_rows_that_reach_tokens_are_refused_by_name():
    def pool(model, hidden, first):
        return model.value(hidden + first[:, None])

    (said,) = survey(two_pools(pool)).refused
    assert said.startswith("pooler (FirstToken): tokens meet in it")


class InATuple(TwoPools):
    def forward(self, input_ids=None, position_ids=None, attention_mask=None, **kwargs):
        out = super().forward(input_ids, position_ids, attention_mask, **kwargs)
        return SequenceClassifierOutput(logits=out.logits, hidden_states=(2 * out.logits,))


def test_outputs_of_rows_in_a_tuple_are_refused_by_name():
    """What was made of them had its gradients once per rank."""
    model = two_pools(lambda model, hidden, first: model.value(first))
    model.__class__ = InATuple
    (said, *_) = survey(model).refused
    assert said.startswith("InATuple: gives outputs of shapes [(1, 1), (1, 1)]"), said


class Doubled(LlamaModel):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.hidden_states = (2 * out.last_hidden_state,)
        return out


def test_heads_that_read_more_than_last_hidden_states_are_refused_by_name():
    class Other(Rewards):
        def forward(self, input_ids=None, position_ids=None, **kwargs):
            out = self.model(input_ids, position_ids=position_ids, **kwargs)
            return SequenceClassifierOutput(logits=self.value(out.hidden_states[0].mean(1)))

    model = rewards(None)
    model.__class__, model.model.__class__ = Other, Doubled
    (said, *_) = survey(model).refused
    assert said.startswith("Other: gives outputs of shapes [(1, 1)]")


def test_packed_rows_of_a_head_that_pools_are_refused():
    model = classifier("mean")
    install_mixers(model)
    position_ids = torch.cat([torch.arange(9), torch.arange(12)])[None]
    rows = {"input_ids": a_batch()["input_ids"][:1], "position_ids": position_ids}
    with pytest.raises(ValueError, match="one output per row, got 2 documents in row 0"):
        shard_hf_batch(rows, one(), model=model)


def test_dropout_of_tokens_in_a_head_is_refused_by_name():
    model = rewards(lambda model, hidden: model.value(model.drop(hidden).mean(1)))
    model.drop = nn.Dropout(0.1)
    (said,) = survey(model).refused
    assert said.startswith("drop (Dropout): drops tokens of whole rows")


def test_dropout_of_pooled_rows_is_refused_by_name():
    (said,) = survey(classifier("pooler", classifier_dropout=0.1)).refused
    assert said.startswith("dropout (Dropout): dropout=0.1 in training would depend on the mesh")

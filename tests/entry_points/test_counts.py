"""A4, A7: losses of no token at all, and losses that every rank computes alike."""

import re
from dataclasses import dataclass

from dtcp.torchtitan.loss import TokenLoss

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from dtcp import token_log_probs
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import causal_lm_loss, shard_hf_batch
from dtcp.labels import IGNORED, shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.parallelize import parallelize_hf
from dtcp.pretrain.data import PackedDocuments
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from tests.harness import train_run
from tests.harness.hf_models import build
from tests.harness.parity import assert_gradients, gradients, summed
from tests.harness.spmd import spmd
from tests.pretrain.test_train import micro

BOUND = 1e-5
"""Relative error: the models' own norms, softmax and rotary tables are fp32 in a model of fp64."""
IDS = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(1))
LENGTHS = ((5, 11), (16,))


def of_one_device(model, labels):
    """The log-probability of each label, [B, S], each document alone; 0 where there is none."""
    rows = []
    for ids, targets, lengths in zip(IDS, labels, LENGTHS, strict=True):
        documents = zip(ids.split(lengths), targets.split(lengths), strict=True)
        for document, target in documents:
            logits = model(input_ids=document[None], use_cache=False).logits[0]
            rows.append(-F.cross_entropy(logits, target, reduction="none"))
    return torch.cat(rows).view(2, 16)


@spmd(ranks=2)
def test_A4_loss_of_a_batch_where_no_token_of_some_part_has_one(mesh):
    reference, model = build("llama"), build("llama")
    parallelize_hf(model, whole := ParallelMesh.from_device_mesh(mesh))
    for empty in ("batch", "rank", "document", "row of padding", "batch row"):
        reference.zero_grad()
        model.zero_grad()
        assert_loss_where_none_has_one(reference, model, whole, empty)


def assert_loss_where_none_has_one(reference, model, whole, empty):
    labels = IDS.clone()
    batch = {"input_ids": IDS, "position_ids": Documents(LENGTHS, 16).position_ids()}
    if empty == "batch":
        labels[:] = IGNORED
    elif empty == "rank":
        labels[:, 8:] = IGNORED
    elif empty == "document":
        labels[0, :5] = IGNORED
    elif empty == "row of padding":
        labels[0] = IGNORED
        batch = {"input_ids": IDS, "attention_mask": torch.tensor([[0] * 16, [1] * 16])}
    else:
        labels[0] = IGNORED
    share = causal_lm_loss(model, {**batch, "labels": labels}, whole, Contiguous)
    share.backward()
    targets = shift_labels(labels, Documents(LENGTHS, 16))
    count = int((targets != IGNORED).sum())
    expected = -of_one_device(reference, targets).sum() / max(count, 1)
    expected.backward()
    total = summed(share, whole)
    assert_close(total, expected.detach(), rtol=BOUND, atol=0)
    if empty == "batch":
        assert total == 0
        assert not any(grad.any() for grad in gradients(model).values())
    assert_gradients(model, gradients(reference), BOUND)


@spmd(ranks=2)
def test_A4_micro_batch_without_a_token_adds_nothing(mesh):
    """Each divided by the tokens of both."""
    reference, model = build("llama"), build("llama")
    parallelize_hf(model, whole := ParallelMesh.from_device_mesh(mesh))
    documents = Documents(LENGTHS, 16)
    labels = [IDS, torch.full_like(IDS, IGNORED)]
    batch = {"input_ids": IDS, "position_ids": documents.position_ids()}
    parts = [shard_hf_batch({**batch, "labels": x}, whole, model=model) for x in labels]
    tokens = sum(global_token_count(local["labels"], whole.loss) for local, _ in parts)
    for local, sharded in parts:
        targets = local.pop("labels")
        logits = model(**local, attn_metadata=sharded.attn_metadata).logits
        token_mean_loss(logits, targets, tokens).backward()
    targets = shift_labels(IDS, documents)
    (-of_one_device(reference, targets).sum() / (targets != IGNORED).sum()).backward()
    assert_gradients(model, gradients(reference), BOUND)


def test_A4_loss_of_the_trainer_is_0_where_no_token_has_one():
    logits = torch.randn(1, 4, 7, requires_grad=True)
    labels = torch.full((1, 4), IGNORED)
    loss, _ = TokenLoss(TokenLoss.Config())(logits, labels, torch.tensor(0))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


class HalfUnlabeled(PackedDocuments):
    """Batches without a token that has a loss: the first, and all from the third on.

    With two of them a step: a micro-batch of the first step, and all of the second.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(PackedDocuments.Config):
        pass

    def __iter__(self):
        for index, (batch, labels) in enumerate(super().__iter__()):
            yield batch, labels if index == 1 else torch.full_like(labels, IGNORED)


def half_unlabeled():
    config = micro()
    config.dataloader = HalfUnlabeled.Config()
    config.validator.dataloader = HalfUnlabeled.Config(part="validation")
    config.training.steps, config.validator.freq = 2, 2
    config.training.local_batch_size, config.training.global_batch_size = 1, 2
    return config


def test_A4_steps_and_validation_without_a_token_train_on(tmp_path):
    folder, module = ("--dump_folder", str(tmp_path)), "tests.entry_points.test_counts"
    output = train_run.trained(*folder, module=module, config="half_unlabeled")
    losses = train_run.losses(output)
    assert losses[1] > 1
    assert losses[2] == 0
    assert re.search(r"validation loss +0\.00000", output)
    assert "nan" not in output


@pytest.mark.slow_where(lambda ranks, **_: ranks == 4)
@pytest.mark.parametrize("vocabulary", ["whole", "sharded"])
@spmd(ranks=(2, 4))
def test_A7_losses_of_sums_over_documents_have_the_gradients_of_one_device(mesh, ranks, vocabulary):
    """As in preference tuning: of whole answers, the same on every rank; questions have none."""
    tp = 2 if vocabulary == "sharded" else 1
    whole = ParallelMesh.from_degrees(Degrees(cp=ranks // tp, tp=tp), "cpu")
    reference, model = build("llama"), build("llama")
    parallelize_hf(model, whole)
    documents = Documents(LENGTHS, 16)
    labels = IDS.clone()
    labels[:, :3] = IGNORED
    batch = {"input_ids": IDS, "labels": labels, "position_ids": documents.position_ids()}
    local, sharded = shard_hf_batch(batch, whole, HeadTail, model=model)
    targets = local.pop("labels")
    logits = model(**local, attn_metadata=sharded.attn_metadata).logits
    answers = sharded.sum_by_document(token_log_probs(logits, targets))

    each = of_one_device(reference, shift_labels(labels, documents))
    expected = torch.stack(
        (each[0, :5].sum(), each[0, 5:].sum(), each[1].sum(), each.new_zeros(()))
    )
    assert_close(answers.flatten(), expected, rtol=BOUND, atol=0)
    for sums in (answers, expected.view(2, 2)):
        (-F.logsigmoid(sums[0, 0] - 0.1 * sums[1, 0]) + sums[0, 1].tanh()).backward()
    assert_gradients(model, gradients(reference), BOUND)


@spmd(axes={"tp": 2})
def test_A7_log_probabilities_of_a_sharded_vocabulary_equal_the_whole_ones(mesh):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 6, IGNORED, 3, 2], [4, 4, 1, IGNORED, 5]])
    expected = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    sharded = DTensor.from_local(logits, mesh, [Replicate()]).redistribute(placements=[Shard(2)])
    actual = token_log_probs(sharded, labels)
    assert_close(actual, expected)
    weight = torch.randn(2, 5, dtype=torch.float64)
    grads = [torch.autograd.grad((x * weight).sum(), logits)[0] for x in (actual, expected)]
    assert_close(*grads)


def test_A7_numbers_of_other_tokens_are_refused():
    whole = ParallelMesh(Degrees(), None, *[None] * 7)
    model = build("llama")
    parallelize_hf(model, whole)
    _, sharded = shard_hf_batch({"input_ids": IDS}, whole, model=model)
    with pytest.raises(ValueError, match=r"x.shape=\(2, 15\): give \[B, L\] = \(2, 16\)"):
        sharded.sum_by_document(torch.zeros(2, 15))

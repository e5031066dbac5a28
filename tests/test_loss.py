"""The loss is the mean over all tokens, however they fall on ranks."""

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import functional as F
from torch.testing import assert_close

from dtcp import logit_sums
from dtcp.labels import IGNORED
from dtcp.loss import global_token_count, token_mean_loss
from tests.harness.spmd import spmd


def a_batch(dtype=torch.float64, vocab_size=11):
    logits = torch.randn(2, 6, vocab_size, dtype=torch.float64).mul(3).to(dtype)
    labels = torch.randint(vocab_size, (2, 6))
    labels[0, 2:] = IGNORED
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("chunk", [1, 25, 2**24])
def test_loss_equals_torch_cross_entropy(monkeypatch, chunk):
    """With one row a chunk, two, and all."""
    monkeypatch.setattr(logit_sums, "LOGITS_PER_CHUNK", chunk)
    logits, labels = a_batch()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    actual = token_mean_loss(logits, labels, global_token_count(labels, None))
    assert_close(actual, expected)
    for scale in (1.0, 7.0):
        assert_close(
            torch.autograd.grad(actual * scale, logits, retain_graph=True),
            torch.autograd.grad(expected * scale, logits, retain_graph=True),
        )


def test_bf16_logits_have_an_fp32_loss_and_a_bf16_gradient():
    logits, labels = a_batch(torch.bfloat16)
    wide = logits.detach().double().requires_grad_()
    actual, expected = (token_mean_loss(x, labels, 8) for x in (logits, wide))
    assert actual.dtype == torch.float32
    assert_close(actual.double(), expected, rtol=1e-6, atol=0)
    (grad,), (wide_grad,) = (
        torch.autograd.grad(y, x) for y, x in ((actual, logits), (expected, wide))
    )
    assert_close(grad, wide_grad.bfloat16(), rtol=2**-7, atol=0)


def test_rank_without_a_loss_gives_zero_and_zero_gradients():
    """Even where its logits are not numbers."""
    logits, labels = a_batch()
    logits.data[0, 0] = torch.nan
    actual = token_mean_loss(logits, torch.full_like(labels, IGNORED), 5)
    assert actual == 0
    assert not torch.autograd.grad(actual, logits)[0].any()


def test_label_outside_the_vocabulary_gives_inf():
    logits, labels = a_batch()
    labels[0, 0] = 11
    assert token_mean_loss(logits, labels, 8) == torch.inf


@spmd(ranks=(2, 3))
def test_shares_of_all_ranks_add_up_to_the_mean(mesh, ranks):
    """Rank 0 has all of a row without a loss; gradients are slices of the whole one's."""
    logits, labels = a_batch()
    labels[:, : 6 // ranks] = IGNORED
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    mine = labels.chunk(ranks, dim=1)[mesh.get_local_rank()]
    tokens = global_token_count(mine, mesh)
    share = token_mean_loss(logits.chunk(ranks, dim=1)[mesh.get_local_rank()], mine, tokens)
    total = DTensor.from_local(share.detach(), mesh, [Partial()]).full_tensor()
    grad = torch.autograd.grad(share, logits)[0]
    grad = DTensor.from_local(grad, mesh, [Partial()]).full_tensor()

    assert_close(total, expected.detach())
    assert_close(grad, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("placement", [Shard(2), Replicate()])
@pytest.mark.parametrize("vocab_size", [12, 11, 5])
@spmd(axes={"tp": 4})
def test_loss_of_a_sharded_vocabulary_equals_the_whole_ones(mesh, vocab_size, placement):
    """Shards may be uneven, and the last ones empty."""
    logits, labels = a_batch(vocab_size=vocab_size)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected_grad = torch.autograd.grad(expected, logits)[0]

    whole = DTensor.from_local(logits, mesh, [Replicate()])
    sharded = whole.redistribute(placements=[placement])
    actual = token_mean_loss(sharded, labels, global_token_count(labels, None))
    assert_close(actual, expected)
    assert_close(torch.autograd.grad(actual, logits)[0], expected_grad)


@spmd(ranks=2)
def test_logits_sharded_in_another_way_are_refused(mesh):
    logits, labels = a_batch()
    sharded = DTensor.from_local(logits, mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"whole or sharded in the vocabulary.*Shard\(dim=1\)"):
        token_mean_loss(sharded, labels, 8)


def test_a_mean_over_tokens_is_divided_by_one_number():
    logits, labels = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"divided by one number, got global_tokens.shape=\(2,\)"):
        token_mean_loss(logits, labels, torch.tensor([3, 3]))

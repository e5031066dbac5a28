"""Losses made of logits, over sharded vocabularies and rows, held against torch's in fp64."""

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dtcp import linear_logits, logit_sums
from dtcp import token_entropy as entropies
from dtcp.distillation import token_divergence
from dtcp.labels import IGNORED
from dtcp.linear_logits import LinearLogits
from dtcp.loss import global_token_count, token_log_probs, token_mean_loss
from dtcp.router_balance import balance_loss
from dtcp.token_entropy import token_entropy
from tests.harness.spmd import spmd

VOCABULARY, WIDTH = 11, 5
SMOOTHED = {"label_smoothing": 0.1, "z_loss": 0.01}


def a_head(dtype=torch.float64):
    """Hidden states [2, 6, 5], weight [11, 5], bias [11] and labels [2, 6]."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((2, 6, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    made = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    labels = torch.randint(VOCABULARY, (2, 6), generator=generator)
    labels[0, 3:] = IGNORED
    return [x.to(dtype).requires_grad_() for x in made], labels


def plain_loss(logits, labels, *, label_smoothing=0.0, z_loss=0.0):
    """By torch's cross-entropy, on whole logits."""
    flat = labels.flatten()
    loss = F.cross_entropy(logits.flatten(0, 1), flat, label_smoothing=label_smoothing)
    return loss + z_loss * logits.flatten(0, 1)[flat != IGNORED].logsumexp(-1).square().mean()


def capped(hidden, weight, bias):
    return 3.0 * torch.tanh(2.0 * F.linear(hidden, weight, bias) / 3.0)


def plain_log_probs(logits, labels):
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return picked.where(labels != IGNORED, 0)


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_log_probs_of_a_head_and_its_losses_equal_those_of_whole_logits(monkeypatch, rows):
    """Chunks of one row, of some, and all rows in one."""
    for module in (linear_logits, logit_sums):
        monkeypatch.setattr(module, "LOGITS_PER_CHUNK", rows * VOCABULARY)
    parts, labels = a_head()
    whole = capped(*parts)
    for logits in (whole, LinearLogits(*parts, scale=2.0, softcap=3.0)):
        actual = token_mean_loss(logits, labels, 9, **SMOOTHED)
        expected = plain_loss(whole, labels, **SMOOTHED)
        assert_close(actual, expected)
        grads = [torch.autograd.grad(7 * y, parts, retain_graph=True) for y in (actual, expected)]
        assert_close(*grads)
        actual, expected = token_log_probs(logits, labels), plain_log_probs(whole, labels)
        assert_close(actual, expected)
        grad = torch.randn_like(actual)
        grads = [torch.autograd.grad(y, parts, grad, retain_graph=True) for y in (actual, expected)]
        assert_close(*grads)


def plain_entropy(logits, labels):
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1).where(labels != IGNORED, 0)


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_entropies_and_their_gradient_equal_those_of_whole_logits(monkeypatch, rows):
    monkeypatch.setattr(entropies, "LOGITS_PER_CHUNK", rows * VOCABULARY)
    (hidden, weight, bias), labels = a_head()
    logits = F.linear(hidden, weight, bias)
    actual, expected = token_entropy(logits, labels), plain_entropy(logits, labels)
    assert_close(actual, expected)
    grad, parts = torch.randn_like(actual), (hidden, weight, bias)
    grads = [torch.autograd.grad(y, parts, grad, retain_graph=True) for y in (actual, expected)]
    assert_close(*grads)


@spmd(axes={"tp": 4})
def test_entropies_over_a_sharded_vocabulary_equal_the_whole_ones(mesh):
    """Eleven entries on four ranks: shards are uneven."""
    (hidden, weight, bias), labels = a_head()
    logits = F.linear(hidden, weight, bias).detach().requires_grad_()
    shard = distribute_tensor(logits.detach(), mesh, [Shard(2)]).requires_grad_()
    actual, expected = token_entropy(shard, labels), plain_entropy(logits, labels)
    assert_close(actual, expected)
    grad = torch.randn(labels.shape, dtype=actual.dtype, generator=torch.Generator().manual_seed(1))
    (of_shard,) = torch.autograd.grad(actual, shard, grad)
    (of_whole,) = torch.autograd.grad(expected, logits, grad)
    assert_close(of_shard.full_tensor(), of_whole)


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
@spmd(axes={"tp": 4})
def test_log_probs_of_a_sharded_head_equal_the_whole_ones(mesh, placement):
    """Eleven entries on four ranks: shards are uneven."""
    (hidden, weight, bias), labels = a_head()
    whole = F.linear(hidden, weight, bias)
    shards = [
        distribute_tensor(x.detach(), mesh, [placement]).requires_grad_() for x in (weight, bias)
    ]
    actual = token_mean_loss(LinearLogits(hidden, *shards), labels, 9, **SMOOTHED)
    expected = plain_loss(whole, labels, **SMOOTHED)
    assert_close(actual, expected)
    expected_grads = torch.autograd.grad(expected, (hidden, weight, bias))
    grads = torch.autograd.grad(actual, (hidden, *shards))
    assert_close(
        [x.full_tensor() if isinstance(x, DTensor) else x for x in grads], list(expected_grads)
    )


@spmd(axes={"tp": 2})
def test_log_probs_smoothed_over_a_sharded_vocabulary_equal_the_whole_ones(mesh):
    (hidden, weight, bias), labels = a_head()
    logits = F.linear(hidden, weight, bias).detach().requires_grad_()
    sharded = DTensor.from_local(logits, mesh, [Replicate()]).redistribute(placements=[Shard(2)])
    actual = token_mean_loss(sharded, labels, 9, **SMOOTHED)
    expected = plain_loss(logits, labels, **SMOOTHED)
    assert_close(actual, expected)
    assert_close(*(torch.autograd.grad(y, logits) for y in (actual, expected)))


def test_log_probs_of_a_head_in_bf16_are_as_near_as_those_of_whole_logits():
    parts, labels = a_head(torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in parts]
    loss = token_mean_loss(LinearLogits(*parts), labels, 9)
    expected = plain_loss(F.linear(*wide), labels)
    assert loss.dtype == torch.float32
    assert_close(loss.double(), expected, rtol=2**-7, atol=0)
    grads, wide_grads = (torch.autograd.grad(y, x) for y, x in ((loss, parts), (expected, wide)))
    for grad, wide_grad in zip(grads, wide_grads, strict=True):
        assert (grad.double() - wide_grad).norm() < 2**-6 * wide_grad.norm()


@pytest.mark.parametrize("label", [IGNORED, VOCABULARY])
def test_log_probs_of_a_head_follow_the_labels_that_are_none(label):
    """Without a label zero, with zero gradients; -inf outside of the vocabulary."""
    parts, labels = a_head()
    log_probs = token_log_probs(LinearLogits(*parts), torch.full_like(labels, label))
    assert (log_probs == (0 if label == IGNORED else -torch.inf)).all()
    if label == IGNORED:
        assert not any(x.any() for x in torch.autograd.grad(log_probs.sum(), parts))


@pytest.mark.parametrize("sharded", [False, True])
@spmd(axes={"tp": 4})
def test_divergence_from_a_teacher_over_log_probs_equals_torch(mesh, sharded):
    """KL of whole distributions, and the gradient of the student's logits."""
    (hidden, weight, bias), labels = a_head()
    student = F.linear(hidden, weight, bias).detach().requires_grad_()
    teacher = F.linear(hidden, weight).detach().flip(1)
    log_probs = [(x / 2.0).log_softmax(-1) for x in (student, teacher)]
    expected = F.kl_div(*log_probs, reduction="none", log_target=True).sum(-1)
    expected = expected.where(labels != IGNORED, 0)
    given = [student, teacher]
    if sharded:
        whole = [DTensor.from_local(x, mesh, [Replicate()]) for x in given]
        given = [x.redistribute(placements=[Shard(2)]) for x in whole]
    actual = token_divergence(*given, labels, temperature=2.0)
    assert_close(actual, expected)
    grad = torch.randn(2, 6, dtype=torch.float64)
    assert_close(*(torch.autograd.grad(y, student, grad) for y in (actual, expected)))


@pytest.mark.parametrize("both", [False, True])
def test_divergence_leaves_out_what_the_teacher_rules_out(both):
    """Logits of -inf, as of a padded vocabulary: as where these columns are not there at all."""
    (hidden, weight, bias), labels = a_head()
    student = F.linear(hidden, weight, bias).detach().requires_grad_()
    teacher = F.linear(hidden, weight).detach().flip(1)
    out = torch.tensor([1, 4])
    given = [student.index_fill(-1, out, -torch.inf) if both else student for _ in range(2)]
    log_probs = given[0].log_softmax(-1)
    kept = [i for i in range(VOCABULARY) if i not in out]
    target = teacher[..., kept].log_softmax(-1)
    expected = F.kl_div(log_probs[..., kept], target, reduction="none", log_target=True).sum(-1)
    expected = expected.where(labels != IGNORED, 0)
    actual = token_divergence(given[1], teacher.index_fill(-1, out, -torch.inf), labels)
    assert_close(actual, expected)
    grad = torch.randn(2, 6, dtype=torch.float64)
    assert_close(*(torch.autograd.grad(y, student, grad) for y in (actual, expected)))


@spmd(ranks=(1, 2, 3))
def test_balance_loss_beside_log_probs_is_that_of_all_tokens(mesh, ranks):
    """Two layers, padding left out; each rank has the gradient of its own tokens."""
    logits = torch.randn(2, 2, 6, 4, dtype=torch.float64, requires_grad=True)  # [layers, B, S, E]
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, 4:] = 0
    probability = logits[:, mask > 0].flatten(0, 1).softmax(-1)  # [layers * tokens, E]
    chosen = F.one_hot(probability.topk(2).indices, 4).sum(1).double()
    expected = 4 * (chosen.mean(0) * probability.mean(0)).sum()
    theirs = load_balancing_loss_func(tuple(x.flatten(0, 1) for x in logits), 4, 2, mask)
    assert_close(expected.float(), theirs)
    rank = mesh.get_local_rank()
    mine = [x.chunk(ranks, dim=1)[rank] for x in logits]
    padding = (mask == 0).chunk(ranks, dim=1)[rank]
    axis = mesh if ranks > 1 else None
    actual = balance_loss(mine, axis, experts_per_token=2, padding_mask=padding)
    assert_close(actual, expected)
    (grad,), (whole,) = (torch.autograd.grad(y, logits) for y in (actual, expected))
    assert_close(grad.chunk(ranks, dim=2)[rank], whole.chunk(ranks, dim=2)[rank])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x, y: token_mean_loss(x, y, 9, label_smoothing=1.5), r"label_smoothing=1\.5"),
        (lambda x, y: token_mean_loss(x, y, 9, z_loss=-1.0), r"z_loss=-1\.0"),
        (lambda x, y: token_divergence(x, x, y, temperature=0.0), r"temperature=0\.0"),
        (lambda x, y: token_divergence(x, x, y, temperature=float("inf")), "temperature=inf"),
        (lambda x, y: token_divergence(x, x[..., :3], y), "two distributions over one"),
        (lambda x, y: token_log_probs(LinearLogits(x, x[0, :, :3]), y), "the head's own input"),
        (lambda x, y: token_log_probs(LinearLogits(x, x[0]), y[:, :3]), "a label for each token"),
        (lambda x, y: balance_loss([], None, experts_per_token=2), "routers' logits"),
        (
            lambda x, y: balance_loss([x], None, experts_per_token=2, padding_mask=y[:, :3] == 0),
            "mask of these tokens",
        ),
    ],
)
def test_losses_of_log_probs_refuse_what_they_would_get_wrong(call, match):
    (hidden, _, _), labels = a_head()
    with pytest.raises(ValueError, match=match):
        call(hidden, labels)


def test_heads_that_do_not_fit_together_are_refused():
    (hidden, weight, bias), labels = a_head()
    for other, match in (
        (LinearLogits(hidden, weight, bias[:1]), r"got bias.shape=\(1,\)"),
        (LinearLogits(hidden, weight, bias.float()), "in one floating dtype, got"),
        (LinearLogits(hidden.bfloat16(), weight), "in one floating dtype, got"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            token_mean_loss(other, labels, 9)


@spmd(axes={"tp": 2})
def test_a_bias_that_is_not_placed_as_its_weight_is_refused(mesh):
    (hidden, weight, bias), labels = a_head()
    sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)])
    for other in (bias, distribute_tensor(bias.detach(), mesh, [Replicate()])):
        with pytest.raises(ValueError, match="placed as the weight is"):
            token_mean_loss(LinearLogits(hidden, sharded, other), labels, 9)


def test_second_derivatives_of_losses_are_refused():
    """Gradients that follow from saved logits would count as constants."""
    (hidden, weight, _), labels = a_head()
    teacher = torch.randn(2, 6, VOCABULARY, dtype=torch.float64)
    for loss in (
        lambda: token_mean_loss(F.linear(hidden, weight), labels, 9),
        lambda: token_mean_loss(LinearLogits(hidden, weight), labels, 9),
        lambda: token_divergence(F.linear(hidden, weight), teacher, labels).sum(),
    ):
        (grad,) = torch.autograd.grad(loss(), hidden, create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiated once, got a second"):
            torch.autograd.grad(grad.square().sum(), hidden)


@spmd(ranks=2)
def test_labels_of_several_ranks_in_one_tensor_are_refused(mesh):
    labels = distribute_tensor(torch.zeros(2, 4, dtype=torch.int64), mesh, [Shard(1)])
    for call in (
        lambda: token_mean_loss(torch.zeros(2, 4, 3), labels, 8),
        lambda: global_token_count(labels, mesh),
    ):
        with pytest.raises(TypeError, match=r"got a DTensor placed \(Shard\(dim=1\),\)"):
            call()

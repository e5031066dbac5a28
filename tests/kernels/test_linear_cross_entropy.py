"""Liger's fused loss of a linear head: its arguments, on a stand-in, and when it is chosen."""

import logging
import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from dtcp import linear_logits
from dtcp.kernels import linear_cross_entropy
from dtcp.kernels.linear_cross_entropy import CHUNKED, LIGER, HeadDemand, head_kernel
from dtcp.labels import IGNORED
from dtcp.linear_logits import LinearLogits
from dtcp.loss import token_mean_loss

GPU = HeadDemand("cuda", (torch.bfloat16,) * 2, sharded=False, hidden_grad=True)
FUNCTION = "liger_fused_linear_cross_entropy"


def stand_in(
    input,
    weight,
    target,
    bias=None,
    ce_weight=None,
    ignore_index=-100,
    lse_square_scale=0.0,
    label_smoothing=0.0,
    reduction="mean",
    softcap=None,
    return_z_loss=False,
    accum_dtype=None,
    use_token_scaling=False,
    return_token_accuracy=False,
    return_predicted_tokens=False,
    chunk_mem_const=1,
):
    """liger_kernel.transformers.functional's, of Liger 0.8.5: its signature and conventions."""
    assert (input.ndim, weight.ndim, target.ndim) == (2, 2, 1) and input.dtype == weight.dtype
    assert accum_dtype == torch.float32 and reduction == "sum" and chunk_mem_const == 1
    unused = (ce_weight, return_z_loss, use_token_scaling)
    assert not any((*unused, return_token_accuracy, return_predicted_tokens))
    # The kernel reads the logit of each label that is not ignored, wherever that is.
    assert bool(((target == ignore_index) | ((target >= 0) & (target < len(weight)))).all())
    logits = F.linear(input, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    options = {"ignore_index": ignore_index, "reduction": "sum"}
    loss = F.cross_entropy(logits, target, label_smoothing=label_smoothing, **options)
    lse = logits.logsumexp(-1).masked_fill(target == ignore_index, 0)
    return loss + lse_square_scale * lse.square().sum()


@pytest.fixture
def liger(monkeypatch):
    """Liger, as if it were installed and the tensors on a GPU."""
    module = ModuleType("liger_kernel.transformers.functional")
    setattr(module, FUNCTION, stand_in)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(linear_logits, "head_kernel", lambda demand, name: LIGER)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_fused_loss_of_a_head_equals_that_of_chunks(liger, monkeypatch, softcap):
    """In fp64, with every gradient: scaled, capped, smoothed, with a z-loss and a bias."""
    torch.manual_seed(0)
    parts = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((2, 5, 8), (11, 8), 11)]
    labels = torch.randint(11, (2, 5)).masked_fill(torch.arange(5) == 2, IGNORED)
    losses = []
    for kernel in (LIGER, CHUNKED):
        monkeypatch.setattr(linear_logits, "head_kernel", lambda *_, chosen=kernel: chosen)
        logits = LinearLogits(*parts, scale=2.0, softcap=softcap)
        losses.append(token_mean_loss(logits, labels, 7, label_smoothing=0.1, z_loss=0.01))
    assert_close(*losses)
    assert_close(*(torch.autograd.grad(7 * loss, parts) for loss in losses))


def test_fused_loss_of_a_label_outside_of_the_vocabulary_is_inf(liger):
    hidden, weight = torch.randn(1, 3, 8), torch.randn(11, 8)
    for label in (11, -3):
        loss = token_mean_loss(LinearLogits(hidden, weight), torch.tensor([[1, label, 2]]), 3)
        assert loss == torch.inf


def test_second_derivative_of_a_fused_loss_is_refused(liger):
    """Its gradients are made in forward, and would count as constants."""
    parts = [torch.randn(s).requires_grad_() for s in ((1, 3, 8), (11, 8), 11)]
    loss = token_mean_loss(LinearLogits(*parts), torch.tensor([[1, 2, 3]]), 3)
    for grad in torch.autograd.grad(loss, parts, create_graph=True):
        with pytest.raises(NotImplementedError, match="differentiated once, got a second"):
            grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize(("scale", "softcap"), [(torch.inf, 0.0), (1.0, torch.inf), (1.0, -1.0)])
def test_scores_of_a_head_without_bounds_are_refused(scale, softcap):
    logits = LinearLogits(torch.zeros(1, 3, 8), torch.zeros(11, 8), scale=scale, softcap=softcap)
    with pytest.raises(ValueError, match=f"got scale={scale}, softcap={softcap}: give"):
        token_mean_loss(logits, torch.tensor([[1, 2, 3]]), 3)


@pytest.mark.parametrize(
    ("demand", "match"),
    [
        (HeadDemand("cpu", GPU.dtypes, sharded=False, hidden_grad=True), "needs a GPU, not cpu"),
        (HeadDemand("cuda", GPU.dtypes, sharded=True, hidden_grad=True), "whole on each rank"),
        (
            HeadDemand("cuda", (torch.float64,) * 2, sharded=False, hidden_grad=True),
            "not float64, float64",
        ),
        (
            HeadDemand("cuda", (torch.bfloat16, torch.float32), sharded=False, hidden_grad=True),
            "one dtype",
        ),
        (HeadDemand("cuda", GPU.dtypes, sharded=False, hidden_grad=False), "gives no gradient"),
        (GPU, "not installed: pip install liger-kernel"),
    ],
)
def test_fused_loss_is_passed_over_and_said_to_be(monkeypatch, caplog, demand, match):
    monkeypatch.setattr(linear_cross_entropy, "find_spec", lambda name: None)
    head_kernel.cache_clear()
    with caplog.at_level(logging.INFO, "dtcp.kernels"):
        assert head_kernel(demand, "auto") == head_kernel(demand, "auto") == CHUNKED
    (said,) = caplog.messages
    assert "computed by chunked; liger is passed over: it " in said and match in said
    with pytest.raises(ValueError, match=f"got kernel='liger', which .*{match}"):
        head_kernel(demand, LIGER)
    head_kernel.cache_clear()


def test_fused_loss_is_taken_on_a_gpu_where_it_is_installed(monkeypatch, caplog):
    monkeypatch.setattr(linear_cross_entropy, "find_spec", lambda name: name)
    head_kernel.cache_clear()
    with caplog.at_level(logging.INFO, "dtcp.kernels"):
        assert head_kernel(GPU, "auto") == head_kernel(GPU, LIGER) == LIGER
    assert "computed by liger" in caplog.messages[0]
    assert head_kernel(GPU, CHUNKED) == CHUNKED
    head_kernel.cache_clear()


def test_fused_loss_of_a_kernel_that_there_is_not_is_refused():
    logits = LinearLogits(torch.randn(1, 3, 8), torch.randn(11, 8), kernel="fused")
    with pytest.raises(ValueError, match="auto, chunked, liger, got kernel='fused'"):
        token_mean_loss(logits, torch.zeros(1, 3, dtype=torch.int64), 3)

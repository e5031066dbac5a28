"""What recurrent mixers round in bf16: what they return and each gradient, once."""

import torch
from torch.testing import assert_close

from dtcp.kernels.delta_rule.chunks import running_sum
from dtcp.mixer_metadata import batch_metadata
from dtcp.recurrent import CausalConv1d, GatedDeltaRule, GatedLinearAttention
from dtcp.sequence.documents import Documents

DOCUMENTS = Documents(((9, 15), (24,)), 24)
B, L, W = 2, 24, 4


def assert_rounded_once(mixer, inputs, metadata):
    """Assert that numbers of bf16 give what they give in fp32, rounded: output and gradients.

    Args:
        inputs: in the dtypes that the mixer is given.
    """
    wide = [x.float().requires_grad_() for x in inputs]
    given = [x.requires_grad_() for x in inputs]
    out, expected = mixer(*given, metadata), mixer(*wide, metadata)
    assert_close(out, expected.to(out.dtype), rtol=0, atol=0)
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, given, cotangent)
    wide_grads = torch.autograd.grad(expected, wide, cotangent.float())
    for actual, right in zip(grads, wide_grads, strict=True):
        assert_close(actual, right.to(actual.dtype), rtol=0, atol=0)


def test_convolution_in_bf16_rounds_its_output_and_gradients_once():
    """A token's gradient is a sum over w outputs, and a bias is added before rounding."""
    torch.manual_seed(0)
    mixer = CausalConv1d(W)
    x, weight, bias = torch.randn(B, L, 6), torch.randn(6, W), torch.randn(6)
    inputs = [each.bfloat16() for each in (x, weight, bias)]

    def with_bias(x, weight, bias, metadata):
        return mixer(x, weight, metadata, bias=bias)

    assert_rounded_once(with_bias, inputs, batch_metadata(mixer, DOCUMENTS))


def test_unit_queries_of_a_delta_rule_in_bf16_are_rounded_once():
    torch.manual_seed(0)
    q, k = (torch.randn(B, L, 2, 6).bfloat16() for _ in range(2))
    mixer = GatedDeltaRule()
    for actual, right in zip(mixer.unit(q, k), mixer.unit(q.float(), k.float()), strict=True):
        assert_close(actual, right.bfloat16(), rtol=0, atol=0)


def test_mamba_takes_values_in_fp32_beside_bf16():
    """Those of Mamba-2 are products, which transformers does not round."""
    torch.manual_seed(0)
    mixer = GatedLinearAttention(scale=1.0)
    q, k = (torch.randn(B, L, 2, 6).bfloat16() for _ in range(2))
    v, g = torch.randn(B, L, 4, 5), -torch.randn(B, L, 4).abs()
    assert_rounded_once(mixer, [q, k, v, g], batch_metadata(mixer, DOCUMENTS))


class OnGpu(torch.Tensor):
    """What torch says there under use_deterministic_algorithms."""

    is_cuda = True

    def cumsum(self, dim):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")


def test_decays_on_a_gpu_are_summed_where_torch_is_asked_for_what_repeats_itself(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for tokens in (1, 2, 3, 16, 50, 64):
        x = torch.randn(2, 3, tokens, 4, dtype=torch.float64)
        assert_close(running_sum(x.as_subclass(OnGpu)).as_subclass(torch.Tensor), x.cumsum(-2))

"""Attention of tensors whose channels do not lie side by side, and of expanded gradients."""

import torch
from torch.testing import assert_close

from dtcp.mixer_metadata import batch_metadata
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import Causal
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness import reference

DOCUMENTS = Documents(((5, 3), (7,)), 8)


def test_attention_reads_channels_wherever_they_lie():
    """torch's kernel for CPUs takes them to be neighbours, and does not look."""
    apart = torch.randn(4, 2, 8, 2, 3, dtype=torch.float64)
    leaves = [x.permute(3, 2, 1, 0).requires_grad_() for x in apart.unbind(-1)]
    assert not any(x.stride(-1) == 1 for x in leaves)
    mixer = SoftmaxAttention(Causal())
    out = mixer(*leaves, batch_metadata(mixer, DOCUMENTS))
    visible = reference.visible(DOCUMENTS.lengths, 8, reference.causal)
    expected, _ = reference.attention(*leaves, visible)
    assert_close(out, expected)
    # An expanded gradient, as of a sum; and one whose channels are apart.
    for cotangent in (torch.ones(()).double().expand(out.shape), torch.randn_like(leaves[0])):
        grads, right = (
            torch.autograd.grad(x, leaves, cotangent, retain_graph=True) for x in (out, expected)
        )
        assert_close(grads, right)

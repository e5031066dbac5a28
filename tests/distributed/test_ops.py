"""What every op promises, whatever it computes."""

import pytest
import torch
from torch.autograd import forward_ad

from dtcp.distributed.collectives import all_gather
from dtcp.mixer_metadata import batch_metadata
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import Causal
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness.spmd import spmd


def test_attention_in_forward_mode_is_refused():
    """torch would give it no tangent, or zeros, without a word."""
    mixer = SoftmaxAttention(Causal())
    metadata = batch_metadata(mixer, Documents.single(1, 4))
    q, k, v = (torch.randn(1, 4, 1, 2) for _ in range(3))
    match = "dtcp::attention is differentiated in reverse alone, got a dual tensor"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=match):
        mixer(q, k, forward_ad.make_dual(v, v), metadata)
    with forward_ad.dual_level():
        assert mixer(q, k, v, metadata).shape == q.shape


@spmd(ranks=2)
def test_collectives_in_forward_mode_are_refused(mesh):
    x = torch.ones(2)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="dtcp::all_gather is"):
        all_gather(forward_ad.make_dual(x, x), mesh, dim=0)

"""What every op promises, whatever it computes."""

from functools import partial

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.testing import assert_close

from dtcp.distributed.collectives import all_gather
from dtcp.loss import token_log_probs
from dtcp.mixer_metadata import batch_metadata
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import Causal
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness.spmd import spmd


def attention():
    """Causal attention of one short row, as a function of q, k and v."""
    mixer = SoftmaxAttention(Causal())
    return partial(mixer, attn_metadata=batch_metadata(mixer, Documents.single(1, 4)))


def test_attention_in_forward_mode_is_refused():
    """torch would give it no tangent, or zeros, without a word."""
    attend = attention()
    q, k, v = (torch.randn(1, 4, 1, 2) for _ in range(3))
    match = "dtcp::attention is differentiated in reverse alone, got a dual tensor"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=match):
        attend(q, k, forward_ad.make_dual(v, v))
    with forward_ad.dual_level():
        assert attend(q, k, v).shape == q.shape


def test_forward_mode_inside_of_a_graph_is_refused():
    """A graph held the op without its tangent: the sum had the rest of its own."""
    attend = attention()

    def tangent(x):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x)
            return forward_ad.unpack_dual(2 * dual + attend(dual, x, x)).tangent

    with pytest.raises(NotImplementedError, match="dtcp::attention is differentiated in reverse"):
        torch.compile(tangent, backend="aot_eager")(torch.randn(1, 4, 1, 2))


def dual_inside(f):
    """The tangent of f by forward_ad, within a transform that knows nothing of it."""

    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    return func.grad(lambda x: tangent(x).sum())


TRANSFORMS = {
    "jvp": lambda f: lambda x: func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f: func.jacfwd(f),
    "forward_ad": dual_inside,
    "grad": lambda f: func.grad(lambda x: f(x).sum()),
    "vjp": lambda f: lambda x: func.vjp(f, x),
    "hessian": lambda f: func.hessian(lambda x: f(x).sum()),
    "vmap": lambda f: lambda x: func.vmap(f)(x[None]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_what_they_differentiate_or_map_are_refused(transform):
    """torch would give no tangent under jvp, without a word."""
    attend, labels = attention(), torch.zeros(1, 4, dtype=torch.int64)
    calls = {
        "dtcp::attention takes no part": (lambda x: attend(x, x, x), (1, 4, 1, 2)),
        "A loss over a vocabulary takes no": (lambda x: token_log_probs(x, labels), (1, 4, 3)),
    }
    for match, (call, shape) in calls.items():
        with pytest.raises(NotImplementedError, match=match):
            transform(call)(torch.randn(shape))


def test_what_is_constant_to_a_transform_is_what_it_is_without_one():
    """A frozen model inside of it, say; what autograd sees of it from outside is right, too."""
    attend, x = attention(), torch.randn(1, 4, 1, 2, dtype=torch.float64, requires_grad=True)
    out = attend(x, x, x)
    (expected,) = torch.autograd.grad(out.sin().sum(), x)

    def product(factor):
        return factor * attend(1 * x, x, x)

    ones = torch.ones_like(x)
    found = func.grad(lambda factor: product(factor).sum())(ones)
    assert_close(found, out)
    assert_close(torch.autograd.grad(found.sin().sum(), x)[0], expected)
    assert_close(func.jvp(product, (ones,), (ones,))[1], out)
    assert_close(func.vmap(product)(ones[None])[0], out)
    assert_close(func.functionalize(lambda x: attend(x, x, x).add_(1))(x.detach()), out + 1)


def test_second_derivatives_of_attention_are_refused():
    attend, x = attention(), torch.randn(1, 4, 1, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(attend(x, x, x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_backward has no derivative of its"):
        grad.sum().backward()


@spmd(ranks=2)
def test_collectives_in_forward_mode_are_refused(mesh):
    x = torch.ones(2)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="dtcp::all_gather is"):
        all_gather(forward_ad.make_dual(x, x), mesh, dim=0)

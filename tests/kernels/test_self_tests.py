"""What a wrong kernel of attention might do, one thing at a time: the self-test finds each."""

import re
from dataclasses import replace

import pytest
import torch

from dtcp.kernels.softmax.calls import CallKind
from dtcp.kernels.softmax.reference import ReferenceAttention
from dtcp.kernels.softmax.score_bias import PARTS
from dtcp.kernels.softmax.self_test import fault_of
from dtcp.kernels.sparse.reference import ReferenceSparseAttention
from dtcp.kernels.sparse.self_test import SparseReads, fault_of_sparse
from tests.harness.stand_in_kernels import PLAIN, PlainAttention
from tests.kernels.test_backends import HOPPER

DOCUMENTS = {"kinds": frozenset({CallKind.CAUSAL, CallKind.RECTANGLE}), "packed": True}


class Spoiled:
    """flash-attn-4's stand-in, wrong in what a test says."""

    def __init__(self, inputs=None, out=None, grads=None):
        self.plain = PLAIN["flash"]()
        nothing = lambda x, window: x  # noqa: E731
        self.inputs, self.out, self.grads = inputs or nothing, out or nothing, grads or nothing

    def forward(self, q, k, v, window, params):
        q, k, v = self.inputs((q, k, v), window)
        return self.out(self.plain.forward(q, k, v, window, params), window)

    def backward(self, saved, q, k, v, window, params):
        return self.grads(self.plain.backward(saved, q, k, v, window, params), window)


def as_if_contiguous(x):
    """What is read where strides are not."""
    whole = x.new_zeros(x.numel())
    memory = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    whole.copy_(memory[x.storage_offset() :][: x.numel()])
    return whole.view(x.shape)


def of_first_row(x, window):
    """Keys and values of the first row for all of them."""
    q, k, v = x
    return (q, k, v) if window.lengths else (q, *(y[:1].expand_as(y) for y in (k, v)))


def short_sequences(window, length):
    """Where sequences of one token start."""
    starts = window.lengths.q
    return starts[:-1][starts.diff() == length].long()


def without_single_tokens(x, window):
    """Wrong where a document is one token."""
    out, lse = x
    if window.lengths is not None:
        out[short_sequences(window, 1)] = 0
    return out, lse


def without_blind(x, window):
    """NaN for queries that see nothing."""
    out, lse = x
    return out.masked_fill((lse == -torch.inf).mT[..., None], torch.nan), lse


def without_last(x, window):
    """Wrong in the last query, which is behind the last whole block."""
    return torch.cat((x[0][..., :-1, :, :], 0 * x[0][..., -1:, :, :]), -3), x[1]


def without_last_key(grads, window):
    dq, dk, dv = grads
    dk[..., -1, :, :] = 0
    return dq, dk, dv


def causal_only(change):
    """Wrong in one kind of call alone, and packed ones at that."""
    return lambda grads, window: change(grads) if window.causal and window.lengths else grads


WRONG = {
    "lse by a twentieth": ({"out": lambda x, window: (x[0], x[1] + 0.05)}, {}, "in lse"),
    "strides": (
        {"inputs": lambda x, window: (x[0], as_if_contiguous(x[1]), x[2])},
        {},
        "in (out|lse)",
    ),
    "rows": ({"inputs": of_first_row}, {}, "in (out|lse)"),
    "last query": ({"out": without_last}, {}, "in out"),
    "last key": ({"grads": without_last_key}, {}, "in dk"),
    "nothing seen": ({"out": without_blind}, DOCUMENTS, "documents.* nan in out"),
    "single tokens": ({"out": without_single_tokens}, DOCUMENTS, "documents.* in out"),
    "packed causal calls": (
        {"grads": causal_only(lambda grads: (1.2 * grads[0], *grads[1:]))},
        DOCUMENTS,
        "documents, causal.* in dq",
    ),
    "not a number": (
        {"grads": lambda grads, window: (*grads[:2], grads[2] * torch.nan)},
        {},
        "nan in dv",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_self_test_finds_a_kernel_that_is_wrong_in_one_thing(wrong):
    spoiled, asked, text = WRONG[wrong]
    asked = replace(HOPPER, arch=0, key_width=16, value_width=16, group=2, **asked)
    said = fault_of(lambda calls: PlainAttention(Spoiled(), calls), ReferenceAttention(), asked)
    assert said is None
    made = lambda calls: PlainAttention(Spoiled(**spoiled), calls)  # noqa: E731
    said = fault_of(made, ReferenceAttention(), asked)
    assert said is not None and re.search(text, said), said


class SpoiledSparse(ReferenceSparseAttention):
    """Plain torch that reads other things than it should."""

    def __init__(self, change):
        self.change = change

    def forward(self, q, keys, sink, scale):
        return super().forward(q, self.change(keys), sink, scale)


def in_sight(**fields):
    """Change tables of what is seen."""

    def change(keys):
        sight = keys.sight
        changed = {name: each(getattr(sight, name)) for name, each in fields.items()}
        return keys._replace(sight=sight._replace(**changed))

    return change


SPARSE_WRONG = {
    "places that hold no entry": (
        SparseReads.RUNS,
        in_sight(closing=lambda x: x.where(x < 1000, 40)),
    ),
    "documents": (SparseReads.RUNS, in_sight(first=lambda x: 0 * x)),
    "windows of the second document": (
        SparseReads.WINDOW,
        in_sight(window_first=lambda x: (torch.arange(x.shape[1]) - 23).clamp(0).expand_as(x)),
    ),
    "padding": (
        SparseReads.WINDOW,
        in_sight(last=lambda x: torch.arange(x.shape[1]).expand_as(x).int()),
    ),
    "the second row's picks": (
        SparseReads.SELECTED,
        lambda keys: keys._replace(selected=keys.selected[:1].expand_as(keys.selected)),
    ),
    "the last key": (
        SparseReads.WINDOW,
        lambda keys: keys._replace(keys=torch.cat((keys.keys[:, :-1], 0 * keys.keys[:, -1:]), 1)),
    ),
}


@pytest.mark.parametrize("wrong", SPARSE_WRONG)
@pytest.mark.parametrize("has_sink", [False, True])
def test_the_self_test_finds_a_sparse_kernel_that_is_wrong_in_one_thing(wrong, has_sink):
    reads, change = SPARSE_WRONG[wrong]
    asked = (ReferenceSparseAttention(), torch.bfloat16, torch.device("cpu"), 32)
    of = {"heads": 4, "reads": reads, "has_sink": has_sink}
    assert fault_of_sparse(lambda: SpoiledSparse(lambda keys: keys), *asked, **of) is None
    said = fault_of_sparse(lambda: SpoiledSparse(change), *asked, **of)
    assert said is not None and reads.value in said


@pytest.mark.parametrize("part", PARTS)
def test_a_kernel_that_leaves_out_a_part_of_a_score_bias_is_found(part):
    """In its scores, or in a gradient alone."""
    names = {"relative", "profiles"} if part in ("relative", "profiles") else {part}
    demand = replace(
        HOPPER, bias=frozenset(names), device=torch.device("cpu"), key_width=16, value_width=16
    )

    class Unbiased(ReferenceAttention):
        def attend(self, state, queries, *args):
            super().attend(state, queries._replace(bias=None), *args)

    class WithoutGradient(ReferenceAttention):
        def attend_backward(self, grads, saved, queries, *args):
            super().attend_backward(grads, saved, queries, *args)
            queries.bias.gradients[PARTS.index(part)].zero_()

    right, wrong, other = (
        fault_of(lambda calls, kernel=kernel: kernel(), ReferenceAttention(), demand)
        for kernel in (ReferenceAttention, Unbiased, WithoutGradient)
    )
    assert right is None and "failed its self-test" in wrong and f"in {part}" in other


def test_self_tests_hold_where_new_tensors_are_of_another_device():
    """As under torch.set_default_device("cuda"): all kernels would be passed over."""
    demand = replace(HOPPER, arch=0, key_width=16, value_width=16, group=2, **DOCUMENTS)
    of_sparse = ReferenceSparseAttention(), torch.bfloat16, torch.device("cpu"), 32
    with torch.device("meta"):
        assert fault_of(lambda calls: ReferenceAttention(), ReferenceAttention(), demand) is None
        assert fault_of_sparse(ReferenceSparseAttention, *of_sparse, heads=4) is None

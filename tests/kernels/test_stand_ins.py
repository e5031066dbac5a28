"""The glue to kernels of others, on stand-ins that compute in fp64, against dense attention."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from dtcp.kernels.softmax import api
from dtcp.kernels.softmax.api import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
    attend,
    attend_backward,
    attend_once,
    attend_once_backward,
    zeros_for,
)
from dtcp.kernels.softmax.block_ranges import block_ranges
from dtcp.kernels.softmax.pieces import find_pieces
from dtcp.sequence.coords import Coords
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.softmax import (
    AllGatherAttention,
    HaloAttention,
    HybridAttention,
    RingAttention,
    UlyssesAttention,
)
from tests.harness import packings
from tests.harness.attention_parity import (
    BIDIRECTIONAL,
    CAUSAL,
    IMAGES,
    MASK_CASES,
    WINDOW,
    Case,
    assert_equals_one_device,
    mixer_on,
    truth,
)
from tests.harness.spmd import spmd
from tests.harness.stand_in_kernels import PLAIN, StandInKernels
from tests.harness.stand_ins.drift import signature_drift


@pytest.fixture(params=PLAIN)
def kernels(request, monkeypatch):
    """The stand-in of one backend, wherever it can do what is asked."""
    # Lists of blocks do not repeat themselves; nothing here depends on that.
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    made = StandInKernels(request.param)
    monkeypatch.setattr(api, "attention_kernel", made)
    return made


def problem(case, tokens=None):
    """Queries, and keys of each part, of a case."""
    documents = case.documents(4)
    coords = Coords.of(
        documents,
        prefix=packings.prefix_of_tokens(documents),
        block=packings.blocks_of_tokens(documents),
    )
    first, last = case.mask_case.mask.intervals(coords)
    q, k, v = (x.detach() for x in truth(case, 4).inputs[:3])
    parts = []
    ends = list(zip(first, last, strict=True)) if first.ndim == 3 else [(first, last)]
    for index in tokens or [torch.arange(case.seq_len)]:
        ranges = torch.stack([block_ranges(*each, index) for each in ends])
        tiles = ranges.shape[2]
        pieces = torch.stack([find_pieces(*each, index, tiles=tiles) for each in ends])
        if first.ndim == 2:
            (ranges,), (pieces,) = ranges, pieces
        parts.append(Keys(k[:, index], v[:, index], index.int(), ranges, pieces))
    return Queries.of(q, first, last), parts


def cases():
    for mask_case, packing in itertools.product(
        MASK_CASES, (packings.one_document, packings.two_rows, packings.equal_rows)
    ):
        yield Case(mask_case, packing, softcap=3.0 if mask_case is WINDOW else 0.0, sink=False)


def test_backends_on_stand_ins_compute_every_mask_at_once(kernels):
    for case in cases():
        queries, (keys,) = problem(case)
        params, expected = SoftmaxParams(case.key_dim**-0.5, case.softcap), truth(case, 4)
        out, lse = attend_once(queries, keys, params)
        assert_close(out, expected.out)
        saved = SavedForward(expected.grad_out, out, lse)
        grads = attend_once_backward(saved, queries, keys, params)
        assert_close(grads, expected.grads)
    expected_use = {
        "flash": {"interval", "packed causal", "causal", "window", "packed rectangle"},
        "cudnn": {"causal", "rectangle", "another"},
        "ffpa": {"causal", "rectangle", "packed causal", "another"},
    }
    others = {"packed causal", "causal", "window", "packed rectangle", "another"}
    used = set(kernels.used)
    assert used >= expected_use.get(kernels.name, others)
    assert ("another" in used) == (kernels.name != "flash")


def test_backends_on_stand_ins_merge_parts(kernels):
    """Keys in two parts: results merged, gradients from out and lse over both."""
    halves = [torch.arange(24), torch.arange(24, 48)]
    for case in (Case(CAUSAL, packings.one_document), Case(WINDOW, packings.two_rows)):
        queries, parts = problem(case, halves)
        params, expected = SoftmaxParams(case.key_dim**-0.5), truth(case, 4)
        sink = None if expected.inputs[3] is None else expected.inputs[3].detach()
        state = OnlineSoftmax.empty(queries.q, case.value_dim)
        for keys in parts:
            attend(state, queries, keys, params)
        out, lse = state.finish(sink, queries.q.dtype)
        assert_close(out, expected.out)
        dq, saved = zeros_for(queries.q), SavedForward(expected.grad_out, out, lse)
        dk, dv = (torch.empty_like(x) for x in expected.grads[1:3])
        for index, keys in zip(halves, parts, strict=True):
            grads = GradAccumulators(dq, zeros_for(keys.k), zeros_for(keys.v))
            attend_backward(grads, saved, queries, keys, params)
            dk[:, index], dv[:, index] = grads.dk, grads.dv
        assert_close((dq, dk, dv), expected.grads[:3])


def beside_a_gate(x):
    """The same heads where one projection has a number of each token behind them."""
    rows = x.new_zeros(*x.shape[:2], x.shape[2:].numel() + 1)
    rows[..., :-1] = x.flatten(2)
    return rows[..., :-1].unflatten(2, x.shape[2:])


def test_backends_on_stand_ins_load_heads_that_are_at_odd_places(kernels):
    """As kernels do, 16 bytes at a time; packed, in windows, in rows of several calls."""
    for packing in (packings.one_document, packings.two_rows):
        case = Case(IMAGES if kernels.name == "flash" else CAUSAL, packing, sink=False)
        queries, (keys,) = problem(case)
        queries = queries._replace(q=beside_a_gate(queries.q))
        keys = keys._replace(k=beside_a_gate(keys.k), v=beside_a_gate(keys.v))
        params, expected = SoftmaxParams(case.key_dim**-0.5), truth(case, 4)
        out, lse = attend_once(queries, keys, params)
        assert_close(out, expected.out)
        saved = SavedForward(beside_a_gate(expected.grad_out), out, lse)
        grads = attend_once_backward(saved, queries, keys, params)
        assert_close(grads, expected.grads)


STRATEGIES = (
    (RingAttention(), HeadTail, CAUSAL),
    (RingAttention(), Contiguous, WINDOW),
    (AllGatherAttention(), HeadTail, CAUSAL),
    (UlyssesAttention(), HeadTail, BIDIRECTIONAL),
    (HaloAttention(7), Contiguous, WINDOW),
)


@pytest.mark.parametrize("name", ["flash", "aten_flash"])
@spmd(ranks=2)
def test_strategies_with_a_stand_in_equal_one_device(mesh, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
        for style, layout, mask_case in STRATEGIES:
            kernels = StandInKernels(name)
            patch.setattr(api, "attention_kernel", kernels)
            for packing in (packings.one_document, packings.across_borders):
                case = Case(mask_case, packing)
                mixer = mixer_on(mesh, style, mask_case.mask)
                assert_equals_one_device(case, mixer, mixer, mesh, layout)
            assert kernels.used and "another" not in kernels.used


@spmd(ranks=4)
def test_hybrid_attention_with_a_stand_in_equals_one_device(mesh):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
        patch.setattr(api, "attention_kernel", StandInKernels("flash"))
        case = Case(CAUSAL, packings.across_borders)
        mixer = mixer_on(mesh, HybridAttention(inner_ranks=2), CAUSAL.mask)
        assert_equals_one_device(case, mixer, mixer, mesh, HeadTail)


def test_stand_ins_have_the_signatures_of_what_is_installed():
    """torch's own ops at least; run with flash-attn-4 and ffpa-attn on the path for theirs."""
    drift = dict(signature_drift())
    assert sum(name.startswith("aten::") for name in drift) == 4
    assert {name: text for name, text in drift.items() if text} == {}

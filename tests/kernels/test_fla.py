"""fla's kernels equal the reference; a GPU that does not run them says once why."""

import importlib.util
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from dtcp.kernels.delta_rule import api, fla_inside
from dtcp.kernels.delta_rule.fla import FlaDeltaRule, whole_chunks
from dtcp.kernels.delta_rule.fla_channel import FlaChannelDeltaRule
from dtcp.kernels.delta_rule.reference import ReferenceDeltaRule
from dtcp.kernels.delta_rule.self_test import fault_of_delta_rule
from dtcp.kernels.delta_rule.types import DeltaGradients, DeltaInputs
from tests.harness.run_script import lines_of


def test_fla_kernels_equal_the_reference():
    """In Triton's interpreter, in fp32: output, summaries, every gradient; documents as decay."""
    (errors,) = lines_of("tests.harness.fla_interpreted", TRITON_INTERPRET="1")
    assert len(errors) == 13
    assert {name: error for name, error in errors.items() if not error < 2e-5} == {}


def test_chunks_of_a_long_row_are_taken_in_pieces(monkeypatch):
    """Which give the same gradients, and hold so many tokens of all rows at a time."""
    draw = torch.Generator().manual_seed(0)
    rows, chunks, chunk, groups, heads, key, value = 2, 5, 8, 2, 4, 6, 3
    tokens = (rows, chunks * chunk)
    sizes = [
        (*tokens, groups, key),
        (*tokens, groups, key),
        (*tokens, heads),
        (*tokens, heads, value),
        (rows, chunks, heads, key, value),
        (*tokens, heads, value),
        (rows, chunks, heads, key, value),
        (*tokens, heads, value),
    ]
    q, k, decay, *rest = (torch.randn(size, generator=draw) for size in sizes)
    x = dict(zip(("new", "h", "grad", "d_h", "d_new"), rest, strict=True))
    whole = fla_inside.inside_chunks_in_torch(q, k, -decay.abs(), **x)
    monkeypatch.setattr(fla_inside, "TOKENS_AT_ONCE", rows * 2 * chunk)
    most, by_chunk = [], fla_inside._by_chunk
    watched = lambda part, size: most.append(part.shape[1]) or by_chunk(part, size)  # noqa: E731
    monkeypatch.setattr(fla_inside, "_by_chunk", watched)
    parts = fla_inside.inside_chunks_in_torch(q, k, -decay.abs(), **x)
    assert max(most) == 2 * chunk
    assert [part.shape for part in parts] == [part.shape for part in whole]
    assert_close(parts, whole)
    assert all(part.is_contiguous() for part in parts)


def test_whole_chunks_are_not_copied():
    """Of a long row q, k, v and the gradient are gigabytes."""
    x = torch.randn(1, 128, 2, 3)
    assert whole_chunks(x) is x
    padded = whole_chunks(x[:, :70])
    assert padded.shape[1] == 128 and padded.is_contiguous()
    assert torch.equal(padded[:, :70], x[:, :70]) and not padded[:, 70:].any()


def on_a_gpu(**changes):
    """Tensors without storage: a kernel is chosen by shapes and device alone."""
    sizes = {"q": (2, 8), "k": (2, 8), "v": (4, 8), "g": (4, 8), "beta": (4,), "starts": ()}
    parts = {name: torch.empty(1, 64, *size, device="cuda") for name, size in sizes.items()}
    return DeltaInputs(**parts)._replace(**changes)


@pytest.fixture
def ampere(monkeypatch):
    """A GPU whose self-tests pass; no choice of it outlives the test."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(api, "_fault", lambda sizes, device: None)
    caches = (api._has_fla, api._say_plain_torch)
    for each in caches:
        each.cache_clear()
    with FakeTensorMode():
        yield monkeypatch
    for each in caches:
        each.cache_clear()


def test_a_gpu_without_fla_says_so_once(ampere, caplog):
    """And runs the reference."""
    ampere.setattr(importlib.util, "find_spec", lambda name: None)
    for _ in range(2):
        assert isinstance(api.delta_kernel(on_a_gpu()), ReferenceDeltaRule)
    assert "are not installed: pip install fla-core" in caplog.text
    assert len(caplog.records) == 1


def test_decays_by_channel_run_on_kernels_of_their_own(ampere):
    x = on_a_gpu()
    by_head = x._replace(g=torch.empty(1, 64, 4, device="cuda"))
    assert isinstance(api.delta_kernel(x), FlaChannelDeltaRule)
    assert type(api.delta_kernel(by_head)) is FlaDeltaRule


def test_what_fla_does_not_take_is_said(ampere, caplog):
    wide = torch.empty(1, 64, 2, 512, device="cuda")
    double = torch.empty(1, 64, 4, 8, device="cuda", dtype=torch.float64)
    for x in (on_a_gpu(q=wide, k=wide), on_a_gpu(v=double)):
        assert isinstance(api.delta_kernel(x), ReferenceDeltaRule)
    ampere.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert isinstance(api.delta_kernel(on_a_gpu()), ReferenceDeltaRule)
    for reason in ("take keys of at most 256", "do not compute in fp64", "GPUs from Ampere on"):
        assert reason in caplog.text


def test_kernels_that_fail_their_self_test_are_not_used(ampere, caplog):
    fault = "failed its self-test (delta rule: an error of 1.0e+00 in dk)"
    ampere.setattr(api, "_fault", lambda sizes, device: fault)
    assert isinstance(api.delta_kernel(on_a_gpu()), ReferenceDeltaRule)
    assert fault in caplog.text


class Wrong(ReferenceDeltaRule):
    """Right but for the sign of one result, or for summaries that miss what decays slowly."""

    def __init__(self, result):
        self.result = result

    def forward(self, parts, carry):
        broken = carry
        if self.result == "summary":
            broken = lambda summary: carry(0 * summary)  # noqa: E731
        outs, state = super().forward(parts, broken)
        return ([-out for out in outs] if self.result == "out" else outs), state

    def backward(self, *args):
        (grads,) = super().backward(*args)
        if self.result not in grads._fields:
            return [grads]
        return [grads._replace(**{self.result: getattr(grads, self.result).roll(1, dims=1)})]


@pytest.mark.parametrize("by_channel", [False, True])
def test_the_self_test_finds_what_is_wrong(by_channel):
    """Of out, summaries and each gradient; and nothing in what is right."""
    decay = (4, 8) if by_channel else (4,)
    sizes = ((2, 8), (2, 8), (4, 6), decay, (4,))
    parts = (torch.empty(1, 1, *size, dtype=torch.bfloat16) for size in sizes)
    like = DeltaInputs(*parts, torch.empty(1, 1, dtype=torch.int32))
    find = partial(fault_of_delta_rule, reference=ReferenceDeltaRule(), like=like, tokens=256)
    assert find(ReferenceDeltaRule) is None
    for result in ("out", "summary", *DeltaGradients._fields):
        name = result if result in ("out", "summary") else f"d{result}"
        assert f"in {name})" in find(lambda result=result: Wrong(result))
    assert "ZeroDivisionError" in find(lambda: 1 // 0)


@pytest.mark.slow
def test_fla_kernels_of_decays_by_channel_equal_the_reference():
    """In Triton's interpreter, in fp32; with 60 documents of one token in a chunk, too."""
    (errors,) = lines_of("tests.harness.fla_interpreted", "channels", TRITON_INTERPRET="1")
    assert len(errors) == 8
    assert {name: error for name, error in errors.items() if not error < 5e-5} == {}

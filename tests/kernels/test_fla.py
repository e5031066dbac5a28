"""fla's kernels equal the reference; a GPU without kernels for a case warns once."""

import importlib.util
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from dtcp.kernels.delta_rule import api, fla_inside
from dtcp.kernels.delta_rule.fla import FlaDeltaRule, whole_chunks
from dtcp.kernels.delta_rule.fla_channel import FlaChannelDeltaRule
from dtcp.kernels.delta_rule.reference import ReferenceDeltaRule
from dtcp.kernels.delta_rule.types import DeltaInputs
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


def test_a_gpu_without_fla_warns_once(monkeypatch):
    """And runs the reference."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    api._has_fla.cache_clear()
    try:
        with pytest.warns(UserWarning, match="pip install fla-core"):
            assert not api._has_fla()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not api._has_fla()
    finally:
        api._has_fla.cache_clear()


def test_decays_by_channel_run_on_kernels_of_their_own(monkeypatch):
    """A kernel is chosen by shapes and device alone, so these tensors have no storage."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    sizes = {"q": (2, 8), "k": (2, 8), "v": (4, 8), "g": (4, 8), "beta": (4,), "starts": ()}
    with FakeTensorMode():
        x = DeltaInputs(**{n: torch.empty(1, 64, *s, device="cuda") for n, s in sizes.items()})
        by_head = x._replace(g=torch.empty(1, 64, 4, device="cuda"))
        wide = x._replace(v=torch.empty(1, 64, 4, 8, device="cuda", dtype=torch.float64))
    assert isinstance(api.delta_kernel(x), FlaChannelDeltaRule)
    assert type(api.delta_kernel(by_head)) is FlaDeltaRule
    assert isinstance(api.delta_kernel(wide), ReferenceDeltaRule)


@pytest.mark.slow
def test_fla_kernels_of_decays_by_channel_equal_the_reference():
    """In Triton's interpreter, in fp32; with 60 documents of one token in a chunk, too."""
    (errors,) = lines_of("tests.harness.fla_interpreted", "channels", TRITON_INTERPRET="1")
    assert len(errors) == 8
    assert {name: error for name, error in errors.items() if not error < 5e-5} == {}

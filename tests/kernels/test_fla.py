"""fla's kernels equal the reference; a GPU without kernels for a case warns once."""

import importlib.util
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dtcp.kernels.delta_rule import api
from dtcp.kernels.delta_rule.fla import FlaDeltaRule
from dtcp.kernels.delta_rule.fla_channel import FlaChannelDeltaRule
from dtcp.kernels.delta_rule.reference import ReferenceDeltaRule
from dtcp.kernels.delta_rule.types import DeltaInputs
from tests.harness.run_script import lines_of


def test_fla_kernels_equal_the_reference():
    """In Triton's interpreter, in fp32: output, summaries, every gradient; documents as decay."""
    (errors,) = lines_of("tests.harness.fla_interpreted", TRITON_INTERPRET="1")
    assert len(errors) == 13
    assert {name: error for name, error in errors.items() if not error < 2e-5} == {}


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

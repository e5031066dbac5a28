"""fla's kernels compute the rule of the reference; where they are missing, it says so once."""

import importlib.util
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dtcp.kernels.delta_rule import fla
from dtcp.kernels.delta_rule import reference as delta_rule
from dtcp.kernels.delta_rule.reference import Inputs
from tests.harness.run_script import lines_of


def test_fla_kernels_equal_the_reference():
    """In Triton's interpreter, in fp32: states, summaries, every gradient; documents as decay."""
    (errors,) = lines_of("tests.harness.fla_interpreted", TRITON_INTERPRET="1")
    assert len(errors) == 13
    assert {name: error for name, error in errors.items() if not error < 2e-5} == {}


def test_a_gpu_without_fla_says_so_once(monkeypatch):
    """And carries on with the reference."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fla._has_fla.cache_clear()
    try:
        with pytest.warns(UserWarning, match="pip install fla-core"):
            assert not fla._has_fla()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not fla._has_fla()
    finally:
        fla._has_fla.cache_clear()


def test_decays_by_channel_run_on_the_reference_and_a_gpu_says_so_once():
    """A kernel is chosen by shapes and device alone: these tensors hold nothing."""
    sizes = {"q": (2, 8), "k": (2, 8), "v": (4, 8), "g": (4, 8), "beta": (4,), "starts": ()}
    with FakeTensorMode():
        x = Inputs(**{n: torch.empty(1, 64, *s, device="cuda") for n, s in sizes.items()})
    fla._say_channels.cache_clear()
    with pytest.warns(UserWarning, match="decay for each key channel"):
        assert fla.delta_kernel(x) is delta_rule
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fla.delta_kernel(x) is delta_rule

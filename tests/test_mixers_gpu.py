"""Every token mixer on a GPU equals itself in fp64: python -m pytest -m gpu.

The same cases run in fp32 on a CPU, so that what a GPU will run is known to be right.
"""

import pytest
import torch

from tests.harness.mixer_cases import mixer_cases, mixer_errors

BOUND = {torch.float32: 2e-5, torch.bfloat16: 2.5e-2}
"""Norms relative to fp64's. In bf16 each of several steps rounds by 2e-3."""


@pytest.mark.parametrize("name", mixer_cases())
def test_cases_of_mixers_for_a_gpu_are_right_in_fp32(name):
    errors = mixer_errors(mixer_cases()[name], "cpu", torch.float32)
    assert {name: error for name, error in errors.items() if not error <= 2e-5} == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", mixer_cases())
def test_every_mixer_on_a_gpu_equals_itself_in_fp64(name, dtype):
    errors = mixer_errors(mixer_cases()[name], "cuda", dtype)
    assert {name: error for name, error in errors.items() if not error <= BOUND[dtype]} == {}


@pytest.mark.gpu
def test_picked_latents_of_published_widths_run_on_tritons_kernels():
    """128 heads of 512 + 64 channels, each gradient against fp64."""
    from benchmarks.gpu import other_kernels

    (case,) = (x for x in other_kernels.cases("cuda") if x.name == "sparse, picked latents")
    result = case.run()
    assert result["right"] and result["kernel"] == "TritonSparseAttention", result


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama ring 2 ranks", "qwen3_5 ring 2 ranks"])
def test_ranks_that_share_a_gpu_equal_one_device(name):
    from benchmarks.gpu import shared

    (case,) = (case for case in shared.cases("cuda") if case.name == name)
    assert case.run()["right"]

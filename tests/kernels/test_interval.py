"""Attention's kernels without a GPU: interpreted, they are exact; compiled, they fit."""

import pytest
import torch

from dtcp.kernels.softmax.api import Keys, Queries, attention_kernel
from dtcp.kernels.softmax.reference import ReferenceAttention
from dtcp.sequence.documents import Documents
from tests.harness import packings
from tests.harness.bias_cases import biased_cases
from tests.harness.run_script import lines_of, run_python

BOUND = {"half": 2**-10}
"""Weights and results are rounded to fp16, each by half of this; all else must be as in fp32."""
BOUND_OF_BIAS = {
    # What out is rounded by, in sums that come near 0 or times distances: as in plain torch.
    ("bias, half, all", "slope"): 8e-3,
    ("bias, half, all", "table"): 2e-3,
    ("bias, table of one number", "table"): 2e-4,
}
KERNELS = {"forward_kernel", "query_gradient_kernel", "key_gradient_kernel"}


def test_interval_kernels_equal_the_reference():
    """Each mask, heads of many widths, keys in parts, a ring: out, lse and every gradient.

    Where neighbours lie 2**31 numbers apart, the same bits as where they are neighbours. On ranks
    that hold whole tiles of queries or whole heads, the bits of one, but for gradients of keys,
    which ranks by tokens sum.
    """
    (errors_of,) = lines_of("tests.harness.interval_interpreted", TRITON_INTERPRET="1")
    with_a_bias = {name: errors_of.pop(name) for name in [*errors_of] if name.startswith("bias")}
    assert_no_bias_is_wrong(with_a_bias)
    assert len(errors_of) == 13
    whole, windowed, cut = (
        errors_of.pop(f"on ranks, {name}") for name in ("causal", "window", "cut tiles")
    )
    assert set(whole.values()) == set(windowed.values()) == {0} and len(whole) == 8
    assert cut["out"] > 0, "a test that sees no tile that is cut elsewhere proves nothing"
    assert sum(map(len, errors_of.values())) == 50
    assert set(errors_of.pop("far apart").values()) == {0.0}
    far = {
        (case, name): error
        for case, errors in errors_of.items()
        for name, error in errors.items()
        if not error <= BOUND.get(case.partition(",")[0], 2e-6)
    }
    assert far == {}


def assert_no_bias_is_wrong(errors_of):
    """Tables, slopes and profiles, alone and together, in a ring and in goes."""
    assert len(errors_of) == len(biased_cases())
    far = {
        (case, name): error
        for case, errors in errors_of.items()
        for name, error in errors.items()
        if not error <= BOUND_OF_BIAS.get((case, name), 2**-10 if "half" in case else 2e-6)
    }
    assert far == {}


@pytest.mark.slow
def test_interval_kernels_compile_for_gpus_of_each_size(tmp_path):
    """As they are launched; Triton refuses what exceeds the GPU's shared memory."""
    shapes = (
        "float16,24,16,30.0",
        "rtx:bfloat16,128,128",
        # What the campaign for a GPU launches first, and the widest of its blocks on Blackwell.
        "bfloat16,128,128",
        "b200:bfloat16,256,256",
        "bfloat16,128,128,0.0,relative",
        "a100:bfloat16,256,256,0.0,table,slope,relative",
    )
    reports = lines_of("tests.harness.interval_compiled", *shapes, TRITON_CACHE_DIR=str(tmp_path))
    for report in reports:
        assert set(report["kernels"]) >= KERNELS, report
    assert [report["wanted"] for report in reports] == list(shapes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_a_gpu_attention_is_plain_torch(dtype):
    q, k, v = packings.qkv(Documents.single(1, 8), dtype=dtype)
    interval = torch.zeros(1, 8, dtype=torch.int32)
    kernel = attention_kernel(Queries(q, interval, interval), Keys(k, v, interval[0]))
    assert isinstance(kernel, ReferenceAttention)


def test_without_triton_attention_is_plain_torch():
    """And no module of dtcp imports Triton on the way."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, dtcp\n"
        "from dtcp.sequence.documents import Documents\n"
        "from dtcp.sequence.masks import Causal\n"
        "from dtcp.mixer_metadata import batch_metadata\n"
        "from dtcp.softmax.mixer import SoftmaxAttention\n"
        "mixer, x = SoftmaxAttention(Causal()), torch.ones(1, 8, 2, 4)\n"
        "print(mixer(x, x, x, batch_metadata(mixer, Documents.single(1, 8))).sum().item())\n"
    )
    ended = run_python("-c", script)
    assert (ended.code, ended.printed.split()) == (0, ["64.0"]), ended.errors[-2000:]

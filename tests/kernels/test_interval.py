"""The GPU's attention kernels: interpreted, they are exact; compiled for sm_90, they fit."""

import pytest
import torch

from dtcp.kernels.softmax import reference as tiles
from dtcp.kernels.softmax.api import Keys, Queries, attention_kernel
from dtcp.sequence.documents import Documents
from tests.harness import packings as cases
from tests.harness.run_script import lines_of, run_python

BOUND = {"half": 2**-10}
"""Weights and results are rounded to fp16, to half of that each; all else must be fp32's."""


def test_interval_kernels_equal_the_reference():
    """Each mask, heads of many widths, keys in parts, a ring: out, lse and every gradient."""
    (found,) = lines_of("tests.harness.interval_interpreted", TRITON_INTERPRET="1")
    assert len(found) == 9
    assert sum(map(len, found.values())) == 45
    far = {
        (case, name): error
        for case, errors in found.items()
        for name, error in errors.items()
        if not error <= BOUND.get(case.partition(",")[0], 2e-6)
    }
    assert far == {}


def test_interval_kernels_compile_for_gpus_of_each_size(tmp_path):
    """As they are launched; Triton refuses what is past the GPU's shared memory."""
    shapes = ("float16,24,16,30.0", "rtx:bfloat16,128,128")
    found = lines_of("tests.harness.interval_compiled", *shapes, TRITON_CACHE_DIR=str(tmp_path))
    for shape in found:
        assert {"attend_tile", "query_gradients", "key_gradients"} <= set(shape["kernels"]), shape
    assert [shape["wanted"] for shape in found] == list(shapes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_a_gpu_attention_is_plain_torch(dtype):
    q, k, v = cases.qkv(Documents.single(1, 8), dtype=dtype)
    table = torch.zeros(1, 8, dtype=torch.int32)
    assert attention_kernel(Queries(q, table, table), Keys(k, v, table[0])) is tiles


def test_without_triton_attention_is_plain_torch():
    """Where there is none, or one that the kernels' module cannot import."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, dtcp\n"
        "from dtcp.sequence.documents import Documents\n"
        "from dtcp.sequence.masks import Causal\n"
        "from dtcp.mixer import batch_metadata\n"
        "from dtcp.softmax.mixer import SoftmaxAttention\n"
        "mixer, x = SoftmaxAttention(Causal()), torch.ones(1, 8, 2, 4)\n"
        "print(mixer(x, x, x, batch_metadata(mixer, Documents.single(1, 8))).sum().item())\n"
    )
    ended = run_python("-c", script)
    assert (ended.code, ended.printed.split()) == (0, ["64.0"]), ended.errors[-2000:]

"""Sparse attention's kernels: right in Triton's interpreter, and compiled for a GPU without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dtcp.kernels import sparse, sparse_op
from dtcp.kernels.sparse import Gathered, Sight

ROOT = Path(__file__).parents[1]


def run(module: str, **environment: str) -> dict[str, float]:
    """What a script prints last, as json; Triton reads its environment at import."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_kernels_equal_dense_attention():
    """In fp32: out, lse and every gradient of windows, runs of entries, and picked ones."""
    errors = run("tests.sparse_interpreted", TRITON_INTERPRET="1")
    assert len(errors) == 4 + 3 * 6
    assert {name: error for name, error in errors.items() if not error < 2e-6} == {}


def test_kernels_compile_for_a_gpu_within_its_shared_memory(tmp_path):
    """At the sizes of Flash, in bf16, for sm_90: those that read picks, and the one of runs."""
    shared = run("tests.sparse_compiled", TRITON_CACHE_DIR=str(tmp_path))
    assert set(shared) == {"attend", "query_gradients", "run_gradients", "pick_gradients"}
    assert max(shared.values()) <= 227 * 1024


def test_calls_that_kernels_do_not_take_are_computed_in_torch(monkeypatch):
    """And those that they take in another order, where torch is told to be deterministic."""
    monkeypatch.setattr(sparse_op, "usable", lambda x: x.dtype != torch.float64)
    torch.use_deterministic_algorithms(False)
    nothing = Sight(*[torch.empty(0)] * len(Sight._fields))

    def kernel(dtype=torch.float32, keys=torch.float32, dim=8, selected=None):
        q = torch.empty(1, 2, 3, dim, dtype=dtype)
        given = Gathered(torch.empty(1, 2, dim, dtype=keys), None, selected, nothing)
        return sparse_op.sparse_kernel(q, given)

    picks = torch.empty(1, 2, 4)
    assert kernel(torch.float64, torch.float64) is sparse
    assert kernel(keys=torch.bfloat16) is sparse
    assert kernel(dim=576) is sparse
    with_kernels = kernel(selected=picks)
    assert with_kernels is not sparse and kernel() is with_kernels
    torch.use_deterministic_algorithms(True)
    assert kernel(selected=picks) is sparse and kernel() is with_kernels

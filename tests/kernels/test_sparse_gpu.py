"""Sparse attention's kernels without a GPU: interpreted, they are exact; compiled, they fit."""

import pytest
import torch

from dtcp.kernels import triton_support
from dtcp.kernels.sparse import api
from dtcp.kernels.sparse.reference import ReferenceSparseAttention
from dtcp.kernels.sparse.types import Sight, SparseKeys
from tests.harness.run_script import lines_of


@pytest.mark.slow
def test_sparse_kernels_equal_dense_attention():
    """In fp32: out, lse and every gradient; windows, runs of entries, selected entries.

    And pass the self-test that they take on a GPU.
    """
    errors, faults = lines_of("tests.harness.sparse_interpreted", TRITON_INTERPRET="1")
    assert len(faults) == 3 and set(faults.values()) == {None}
    assert len(errors) == 4 + 4 + 3 * 6
    assert {name: error for name, error in errors.items() if not error < 2e-6} == {}


@pytest.mark.slow
def test_sparse_kernels_compile_for_hopper(tmp_path):
    """As they are launched at the sizes of V4-Flash: in shared memory, with no sums spilled."""
    (report,) = lines_of(
        "tests.harness.sparse_compiled", "bfloat16,64,512,512", TRITON_CACHE_DIR=str(tmp_path)
    )
    kernels = report["kernels"]
    assert set(kernels) == {
        "sparse_forward_kernel",
        "sparse_query_gradient_kernel",
        "sparse_key_gradient_kernel",
        "selected_gradient_kernel",
    }
    assert max(used["shared"] for used in kernels.values()) <= 227 * 1024
    # A block's sums take 128 registers of each thread: spilled, they alone are 512 bytes.
    assert max(used["stack"] for used in kernels.values()) < 512


def test_offsets_of_heads_stay_below_31_bits():
    """With heads outermost in memory some offsets would be larger: those tensors are copied."""
    from dtcp.kernels.sparse.triton.forward import head_rows

    for tokens, kept in ((65_536, False), (65_535, True)):
        x = torch.empty(64, 1, tokens, 512, device="meta").permute(1, 2, 0, 3)
        assert (head_rows(x).strides == x.stride()[:3]) is kept


def test_calls_that_kernels_do_not_take_are_computed_in_torch(monkeypatch):
    """And, where torch is asked for deterministic algorithms, those that sum in any order."""
    monkeypatch.setattr(api, "triton_runs_on", lambda x: x.dtype != torch.float64)
    torch.use_deterministic_algorithms(False)
    nothing = Sight(*[torch.empty(0)] * len(Sight._fields))

    def in_torch(dtype=torch.float32, key_dtype=torch.float32, dim=8, selected=None):
        q = torch.empty(1, 2, 3, dim, dtype=dtype)
        keys = SparseKeys(torch.empty(1, 2, dim, dtype=key_dtype), None, selected, nothing)
        return isinstance(api.sparse_kernel(q, keys), ReferenceSparseAttention)

    selected = torch.empty(1, 2, 4)
    assert in_torch(torch.float64, torch.float64)
    assert in_torch(key_dtype=torch.bfloat16)
    assert in_torch(dim=576)
    monkeypatch.setattr(triton_support, "_shared_memory", lambda x: 163 * 1024)
    assert in_torch(dim=512)
    assert not in_torch(dim=256)
    assert not in_torch(selected=selected) and not in_torch()
    torch.use_deterministic_algorithms(True)
    assert in_torch(selected=selected) and not in_torch()

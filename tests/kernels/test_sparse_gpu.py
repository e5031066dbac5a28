"""Sparse attention's kernels: right in Triton's interpreter, and compiled for a GPU without one."""

import torch

from dtcp.kernels import triton_support
from dtcp.kernels.sparse import reference as sparse
from dtcp.kernels.sparse.reference import Gathered, Sight
from dtcp.sparse import op as sparse_op
from tests.harness.run_script import lines_of


def test_sparse_kernels_equal_dense_attention():
    """In fp32: out, lse and every gradient of windows, runs of entries, and picked ones."""
    (errors,) = lines_of("tests.harness.sparse_interpreted", TRITON_INTERPRET="1")
    assert len(errors) == 4 + 3 * 6
    assert {name: error for name, error in errors.items() if not error < 2e-6} == {}


def test_sparse_kernels_compile_for_hopper(tmp_path):
    """At the sizes of Flash, as they are launched: in shared memory, with no sums spilled."""
    (found,) = lines_of(
        "tests.harness.sparse_compiled", "bfloat16,64,512,512", TRITON_CACHE_DIR=str(tmp_path)
    )
    kernels = found["kernels"]
    assert set(kernels) == {"attend", "query_gradients", "run_gradients", "pick_gradients"}
    assert max(used["shared"] for used in kernels.values()) <= 227 * 1024
    # A block's sums are 128 registers of each thread: spilled, they alone were 512 bytes.
    assert max(used["stack"] for used in kernels.values()) < 512


def test_offsets_of_heads_stay_below_31_bits():
    """Heads outermost, kernels would number some past it: those are laid out anew."""
    from dtcp.kernels.sparse.triton.forward import View

    for tokens, kept in ((65_536, False), (65_535, True)):
        x = torch.empty(64, 1, tokens, 512, device="meta").permute(1, 2, 0, 3)
        assert (View.of(x).strides == x.stride()[:3]) is kept


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
    monkeypatch.setattr(triton_support, "_shared_memory", lambda x: 163 * 1024)
    assert kernel(dim=512) is sparse
    assert kernel(dim=256) is not sparse
    with_kernels = kernel(selected=picks)
    assert with_kernels is not sparse and kernel() is with_kernels
    torch.use_deterministic_algorithms(True)
    assert kernel(selected=picks) is sparse and kernel() is with_kernels

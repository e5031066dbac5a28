"""Sparse attention's kernels without a GPU: interpreted, they are exact; compiled, they fit."""

import pytest
import torch

from dtcp.kernels import triton_support
from dtcp.kernels.sparse import api
from dtcp.kernels.sparse.reference import ReferenceSparseAttention
from dtcp.kernels.sparse.types import Sight, SparseKeys
from dtcp.sparse.op import sparse_attention
from tests.harness.run_script import lines_of


@pytest.mark.slow
def test_sparse_kernels_equal_dense_attention():
    """In fp32: out, lse and every gradient; windows, runs of entries, selected entries, latents.

    And pass the self-test that they take on a GPU.
    """
    errors, faults = lines_of("tests.harness.sparse_interpreted", TRITON_INTERPRET="1")
    assert len(faults) == 6 and set(faults.values()) == {None}
    assert len(errors) == 4 + 3 * 4 + 4 * 6
    assert {name: error for name, error in errors.items() if not error < 2e-6} == {}


@pytest.mark.slow
def test_an_indexers_kernel_picks_what_plain_torch_picks():
    """Scores are exact where numbers are whole; of equal ones the earlier, however they are cut."""
    errors, alike, faults = lines_of("tests.harness.index_interpreted", TRITON_INTERPRET="1")
    assert errors and set(errors.values()) == {0.0}
    assert errors.keys() | {"far"} == alike.keys() and all(alike.values())
    assert faults["right"] is None and "in scores" in faults["wrong"]


@pytest.mark.slow
def test_sparse_kernels_compile(tmp_path):
    """As they are launched at the sizes of V4-Flash on an H100, and at those of V3.2 on each GPU.

    In the shared memory that the table of blocks states, with no sums spilled.
    """
    gpus = ("h100", "b200", "a100", "rtx")
    calls = ["bfloat16,64,512,512", *(f"{gpu}:bfloat16,128,512+64,512" for gpu in gpus)]
    calls += [f"{gpu}:bfloat16,64,128" for gpu in gpus]
    reports = lines_of("tests.harness.sparse_compiled", *calls, TRITON_CACHE_DIR=str(tmp_path))
    for report in reports[-len(gpus) :]:
        (used,) = report["kernels"].values()
        assert used["stack"] == 0 and used["shared"] <= 99 * 1024
        assert report["loaded"] == 1  # for whichever queries and keys
    for call, report in zip(calls, reports[: -len(gpus)], strict=False):
        kernels = report["kernels"]
        assert set(kernels) == {
            "sparse_forward_kernel",
            "sparse_query_gradient_kernel",
            "sparse_key_gradient_kernel",
            "selected_gradient_kernel",
        }
        shared = max(used["shared"] for used in kernels.values())
        assert shared == report["stated"] or (call is calls[0] and shared < report["stated"])
        # A block's sums take 128 registers of each thread: spilled, they alone are 512 bytes.
        assert max(used["stack"] for used in kernels.values()) < 512


@pytest.mark.slow
def test_kernels_on_picked_blocks_equal_plain_torch():
    """At Qwen4's widths, 256 channels of a value and 256 of a key behind them; at MiniMax-M3's."""
    both = lines_of("tests.harness.sparse_blocks_interpreted", TRITON_INTERPRET="1")
    assert len(both) == 2
    for errors in both:
        assert errors.pop("picked") == 0
        assert len(errors) == 4 and all(error < 2e-6 for error in errors.values()), errors


@pytest.mark.slow
def test_kernels_compile_for_picked_blocks(tmp_path):
    calls = [f"{gpu}:bfloat16,8,256+256,1024" for gpu in ("h100", "b200", "a100", "rtx")]
    reports = lines_of("tests.harness.sparse_compiled", *calls, TRITON_CACHE_DIR=str(tmp_path))
    for report in reports:
        assert len(report["kernels"]) == 4
        assert max(used["shared"] for used in report["kernels"].values()) <= report["stated"]
        assert max(used["stack"] for used in report["kernels"].values()) < 512


@pytest.mark.slow
def test_blocks_of_other_widths_take_the_shared_memory_that_is_stated(tmp_path):
    """Up to 256 channels, and in fp32, whose three products of each spill."""
    calls = [
        "rtx:bfloat16,64,256,512",
        "rtx:float32,64,256,512",
        "a100:float32,64,512,512",
        "h100:float32,64,512+64,512",
        "b200:bfloat16,64,256,512",
    ]
    reports = lines_of("tests.harness.sparse_compiled", *calls, TRITON_CACHE_DIR=str(tmp_path))
    for call, report in zip(calls, reports, strict=True):
        shared = max(used["shared"] for used in report["kernels"].values())
        assert shared == report["stated"] or (call is calls[-1] and shared < report["stated"])


def test_offsets_of_heads_stay_below_31_bits():
    """With heads outermost in memory some offsets would be larger: those tensors are copied.

    So they are where the tokens of a block are as far apart.
    """
    from dtcp.kernels.sparse.triton.forward import head_rows

    for tokens, kept in ((65_536, False), (65_534, True)):
        x = torch.empty(64, 1, tokens, 512, device="meta").permute(1, 2, 0, 3)
        assert (head_rows(x).strides == x.stride()[:3]) is kept
    for rows, kept in ((65_536, False), (65_000, True)):
        x = torch.empty(3, rows, 1, 512, device="meta").transpose(0, 1)[:2]
        assert (head_rows(x).strides == x.stride()[:3]) is kept


def test_channels_that_do_not_fit_are_refused():
    """A kernel on a GPU would read beyond a row."""
    q, rows = torch.empty(1, 4, 2, 8), torch.empty(1, 4, 8)
    sight = Sight(*[torch.empty(1, 4)] * len(Sight._fields))
    for width in (9, 0):
        with pytest.raises(ValueError, match=f"first channels of its key, got value_dim={width}"):
            sparse_attention(q, rows, None, None, None, sight, scale=1.0, value_dim=width)
    for keys, entries in ((rows, rows[..., :7]), (rows[..., :7], None)):
        with pytest.raises(ValueError, match=r"as many channels, got \[8, .*7\]"):
            sparse_attention(q, keys, entries, None, None, sight, scale=1.0)


def test_calls_that_kernels_do_not_take_are_computed_in_torch(monkeypatch):
    """And, where torch is asked for deterministic algorithms, those that sum in any order."""
    monkeypatch.setattr(api, "triton_runs_on", lambda x: x.dtype != torch.float64)
    torch.use_deterministic_algorithms(False)
    nothing = Sight(*[torch.empty(0)] * len(Sight._fields))

    def in_torch(
        dtype=torch.float32, key_dtype=torch.float32, dim=8, selected=None, value_dim=None
    ):
        q = torch.empty(1, 2, 3, dim, dtype=dtype)
        rows = torch.empty(1, 2, dim, dtype=key_dtype)
        keys = SparseKeys(rows, None, selected, nothing, value_dim or dim)
        return isinstance(api.sparse_kernel(q, keys), ReferenceSparseAttention)

    selected = torch.empty(1, 2, 4)
    assert in_torch(torch.float64, torch.float64)
    assert in_torch(key_dtype=torch.bfloat16)
    half = (torch.bfloat16, torch.bfloat16)
    assert in_torch(dim=576) and not in_torch(dim=576, value_dim=512)
    monkeypatch.setattr(triton_support, "shared_memory", lambda x: 99 * 1024)
    monkeypatch.setattr(api, "shared_memory", lambda x: 99 * 1024)
    assert in_torch(dim=512) and not in_torch(dim=256)
    assert not in_torch(*half, dim=576, value_dim=512) and in_torch(*half, dim=577, value_dim=512)
    assert not in_torch(selected=selected) and not in_torch()
    torch.use_deterministic_algorithms(True)
    assert in_torch(selected=selected) and not in_torch()

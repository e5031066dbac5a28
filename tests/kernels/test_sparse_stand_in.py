"""Sparse attention over gathered keys, on a stand-in of flash-attn-4's interface."""

import pytest
import torch
from torch.testing import assert_close

from dtcp.kernels.sparse import api
from dtcp.kernels.sparse.flash4 import (
    BLOCK,
    GatheredFlashAttention,
    GatheredFunctions,
    gathered_places,
)
from dtcp.kernels.sparse.reference import ReferenceSparseAttention
from dtcp.kernels.sparse.self_test import SparseReads, fault_of_sparse, sparse_problem
from dtcp.kernels.sparse.types import SparseKeys
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sparse.metadata import Compression
from dtcp.sparse.style import rank_metadata
from tests.harness import stand_ins
from tests.harness.sparse_interpreted import chosen_by_index

FUNCTIONS = GatheredFunctions(stand_ins.flash4_forward, stand_ins.flash4_sparse_backward)
CPU = torch.device("cpu")


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("layout", [Contiguous(32, 4), HeadTail(32, 2)])
@pytest.mark.parametrize("number", [3, 9, 18])
def test_gathered_keys_on_a_stand_in_equal_the_reference(layout, number):
    """On one rank of several, packed documents and padding, in fp64: out, lse, every gradient."""
    coords = Coords.of(Documents(((9, 2, 20), (32,)), 32))
    compression = Compression(4, selected=number)
    metadata = rank_metadata(coords, layout, 1, 5, compression)
    (rows, queries), entries = metadata.first.shape, metadata.closing.shape[1]
    draw = torch.Generator().manual_seed(0)
    selected = chosen_by_index(metadata, min(number, entries), draw)
    q, keys, values, grad, sink = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in (
            (rows, queries, 3, 8),
            (rows, metadata.key_token_index.numel(), 8),
            (rows, entries, 8),
            (rows, queries, 3, 8),
            (3,),
        )
    )
    given = SparseKeys(keys, values, selected, metadata.sight, 8)
    assert gathered_places(given).shape[-1] % BLOCK == 0
    ours, right = GatheredFlashAttention(FUNCTIONS), ReferenceSparseAttention()
    for own_sink in (sink, None):
        out, lse = right.forward(q, given, own_sink, 0.3)
        assert_close(ours.forward(q, given, own_sink, 0.3), (out, lse))
        saved = (grad, q, given, own_sink, out, lse, 0.3)
        pairs = zip(ours.backward(*saved), right.backward(*saved), strict=True)
        for one, other in pairs:
            assert (one is None) == (other is None)
            if one is not None:
                assert_close(one.double(), other, atol=1e-6, rtol=1e-5)


def test_a_backend_of_gathered_keys_is_held_to_the_reference_before_it_is_used():
    made = GatheredFlashAttention(FUNCTIONS)
    assert (
        fault_of_sparse(lambda: made, ReferenceSparseAttention(), torch.bfloat16, CPU, 32) is None
    )

    def wrong(*args, **kwargs):
        out, *rest = stand_ins.flash4_forward(*args, **kwargs)
        return 1.1 * out, *rest

    broken = GatheredFlashAttention(FUNCTIONS._replace(forward=wrong))
    fault = fault_of_sparse(lambda: broken, ReferenceSparseAttention(), torch.bfloat16, CPU, 32)
    assert fault is not None and "failed its self-test" in fault


@pytest.mark.parametrize("spoiled", ["q", "keys", "entries", "sink"])
@pytest.mark.parametrize("reads", list(SparseReads))
def test_a_wrong_gradient_of_a_sparse_kernel_is_found_whatever_it_reads(reads, spoiled):
    asked, right = (torch.bfloat16, CPU, 32), ReferenceSparseAttention()
    of = {"value_dim": 24, "heads": 4, "reads": reads}
    assert fault_of_sparse(lambda: right, right, *asked, **of) is None
    if reads is SparseReads.WINDOW and spoiled == "entries":
        return

    class Wrong(ReferenceSparseAttention):
        def backward(self, *arguments):
            grads = super().backward(*arguments)
            return grads._replace(**{spoiled: 1.1 * getattr(grads, spoiled)})

    fault = fault_of_sparse(Wrong, right, *asked, **of)
    assert fault is not None and reads.value in fault and f"in d{spoiled}" in fault


def test_kernels_that_do_not_compile_leave_sparse_attention_to_torch(monkeypatch, caplog):
    """Triton's exceptions are no RuntimeError."""

    class NotCompiled(Exception):
        pass

    def compile_it():
        raise NotCompiled("out of resource: shared memory")

    monkeypatch.setattr(api, "triton_kernel", compile_it)
    asked = (torch.bfloat16, CPU, 24, 24, 3, SparseReads.RUNS, True)
    fault = api._triton_fault(*asked)
    assert "NotCompiled: out of resource" in fault
    with caplog.at_level("WARNING", "dtcp.kernels"):
        api._say_plain_torch(torch.bfloat16, 24, fault)
    assert "heads of 24, bfloat16) is computed by plain torch" in caplog.text
    assert "triton failed its self-test (NotCompiled" in caplog.text
    api._triton_fault.cache_clear()
    api._say_plain_torch.cache_clear()


def test_gathered_keys_are_tried_with_as_many_heads_as_a_call_has(monkeypatch):
    """Up to 64 heads flash-attn-4's backward is another kernel than beyond."""
    tried = []
    monkeypatch.setattr(api, "missing", lambda package: None)
    monkeypatch.setattr(api, "fault_of_sparse", lambda *_, heads: tried.append(heads))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    torch.use_deterministic_algorithms(False)
    try:
        for heads in (64, 128, 64):
            q, keys, _ = sparse_problem(torch.bfloat16, CPU, 512, heads=heads)
            assert api._gathered_refusal(q.as_subclass(OnGpu), keys) is None
    finally:
        torch.use_deterministic_algorithms(True)
        api._fault.cache_clear()
    assert tried == [64, 128]


def test_our_own_kernels_say_what_they_do_not_take(monkeypatch):
    """DeepSeek-V3.2's latents with their rotary keys, 512 + 64 channels, they do take."""
    torch.use_deterministic_algorithms(False)
    q, keys, _ = sparse_problem(torch.bfloat16, CPU, 512)
    assert "runs on GPUs" in api.refusal_of_triton(q, keys)
    monkeypatch.setattr(api, "triton_runs_on", lambda _: True)
    assert api.refusal_of_triton(q, keys) is None
    latents = sparse_problem(torch.bfloat16, CPU, 576, 512)[:2]
    assert api.refusal_of_triton(*latents) is None
    reason = api.refusal_of_triton(*sparse_problem(torch.bfloat16, CPU, 576)[:2])
    assert "at most 576" in reason and "here 1024 + 0" in reason
    assert "here 512 + 128" in api.refusal_of_triton(
        *sparse_problem(torch.bfloat16, CPU, 577, 512)[:2]
    )
    assert "of one dtype" in api.refusal_of_triton(q.float(), keys)
    torch.use_deterministic_algorithms(True)
    assert "bit by bit" in api.refusal_of_triton(q, keys)


def test_what_a_sparse_call_reads_is_what_its_kernel_is_compiled_for():
    for reads in SparseReads:
        keys = sparse_problem(torch.float32, CPU, 8, heads=2, reads=reads)[1]
        assert SparseReads.of(keys) is reads
    every = torch.zeros(1, 93, 203, dtype=torch.int32)
    assert SparseReads.of(keys._replace(selected=every)) is SparseReads.RUNS


def test_a_backend_of_gathered_keys_says_what_it_does_not_take(monkeypatch):
    torch.use_deterministic_algorithms(False)
    q, keys, _ = sparse_problem(torch.bfloat16, CPU, 512)
    assert api.refusal_of_gathered(q, keys) is None
    assert "heads of 512" in api.refusal_of_gathered(q[..., :256], keys)
    assert "all of them values" in api.refusal_of_gathered(q, keys._replace(value_dim=448))
    assert "selected entries" in api.refusal_of_gathered(q, keys._replace(selected=None))
    assert "bfloat16" in api.refusal_of_gathered(q.float(), keys)
    assert "bfloat16" in api.refusal_of_gathered(q, keys._replace(keys=keys.keys.float()))
    torch.use_deterministic_algorithms(True)
    assert "bit by bit" in api.refusal_of_gathered(q, keys)

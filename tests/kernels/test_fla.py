"""fla's kernels equal the reference; a GPU that does not run them says once why."""

import importlib.util
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from dtcp.kernels import fla_support
from dtcp.kernels.delta_rule import fla_inside, self_test
from dtcp.kernels.delta_rule.api import delta_kernel
from dtcp.kernels.delta_rule.fla import FlaDeltaRule, whole_chunks
from dtcp.kernels.delta_rule.fla_channel import FlaChannelDeltaRule
from dtcp.kernels.delta_rule.reference import ReferenceDeltaRule
from dtcp.kernels.delta_rule.types import DeltaInputs
from dtcp.kernels.linear_attention.api import linear_kernel
from dtcp.kernels.linear_attention.fla import FlaLinearAttention
from dtcp.kernels.linear_attention.reference import ReferenceLinearAttention
from dtcp.kernels.linear_attention.types import LinearInputs
from tests.harness.run_script import lines_of


def test_fla_kernels_equal_the_reference():
    """In Triton's interpreter, in fp32: output, summaries, every gradient; documents as decay.

    Of the delta rule and of gated linear attention, with and without the guard of Hopper.
    """
    (errors,) = lines_of("tests.harness.fla_interpreted", TRITON_INTERPRET="1")
    assert len(errors) == 2 * (10 + 9)
    # 60 documents' starts in a chunk come to a sum of 2,800, of which fp32 has halves of 2.4e-4.
    bounds = {name: 1.7e-4 if name.startswith("linear") else 2e-5 for name in errors}
    assert {name: error for name, error in errors.items() if not error < bounds[name]} == {}


def test_chunks_of_a_long_row_are_taken_in_pieces(monkeypatch):
    """Which give the same gradients, and hold so many tokens of all rows at a time."""
    draw = torch.Generator().manual_seed(0)
    rows, chunks, chunk, groups, heads, key, value = 2, 5, 8, 2, 4, 6, 3
    tokens = (rows, chunks * chunk)
    sizes = [
        (*tokens, groups, key),
        (*tokens, groups, key),
        (*tokens, heads),
        (*tokens, heads, value),
        (rows, chunks, heads, key, value),
        (*tokens, heads, value),
        (rows, chunks, heads, key, value),
        (*tokens, heads, value),
    ]
    q, k, decay, *rest = (torch.randn(size, generator=draw) for size in sizes)
    x = dict(zip(("new", "h", "grad", "d_h", "d_new"), rest, strict=True))
    whole = fla_inside.inside_chunks_in_torch(q, k, -decay.abs(), **x)
    monkeypatch.setattr(fla_inside, "TOKENS_AT_ONCE", rows * 2 * chunk)
    most, by_chunk = [], fla_inside._by_chunk
    watched = lambda part, size: most.append(part.shape[1]) or by_chunk(part, size)  # noqa: E731
    monkeypatch.setattr(fla_inside, "_by_chunk", watched)
    parts = fla_inside.inside_chunks_in_torch(q, k, -decay.abs(), **x)
    assert max(most) == 2 * chunk
    assert [part.shape for part in parts] == [part.shape for part in whole]
    assert_close(parts, whole)
    assert all(part.is_contiguous() for part in parts)


def test_whole_chunks_are_not_copied():
    """Of a long row q, k, v and the gradient are gigabytes."""
    x = torch.randn(1, 128, 2, 3)
    assert whole_chunks(x) is x
    padded = whole_chunks(x[:, :70])
    assert padded.shape[1] == 128 and padded.is_contiguous()
    assert torch.equal(padded[:, :70], x[:, :70]) and not padded[:, 70:].any()


SIZES = {"q": (2, 8), "k": (2, 8), "v": (4, 8), "g": (4, 8), "beta": (4,), "starts": ()}


def on_a_gpu(inputs=DeltaInputs, **changes):
    """Tensors without storage: a kernel is chosen by shapes and device alone."""
    parts = {name: torch.empty(1, 64, *SIZES[name], device="cuda") for name in inputs._fields}
    return inputs(**parts)._replace(**changes)


@pytest.fixture
def ampere(monkeypatch):
    """A GPU whose self-tests pass; nothing that is kept of it outlives the test."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(self_test, "fault_in_stretches", lambda *found_for: None)
    caches = (fla_support.has_fla, fla_support.say_plain_torch, self_test._fault)
    for each in caches:
        each.cache_clear()
    with FakeTensorMode():
        yield monkeypatch
    for each in caches:
        each.cache_clear()


def test_a_gpu_without_fla_says_so_once(ampere, caplog):
    """And runs the reference."""
    ampere.setattr(importlib.util, "find_spec", lambda name: None)
    for _ in range(2):
        assert isinstance(delta_kernel(on_a_gpu()), ReferenceDeltaRule)
    assert "are not installed: pip install fla-core" in caplog.text
    assert len(caplog.records) == 1


def test_each_rule_and_decay_has_kernels_of_its_own(ampere, caplog):
    by_channel, by_head = on_a_gpu(), torch.empty(1, 64, 4, device="cuda")
    linear = on_a_gpu(LinearInputs)
    assert isinstance(delta_kernel(by_channel), FlaChannelDeltaRule)
    assert type(delta_kernel(by_channel._replace(g=by_head))) is FlaDeltaRule
    assert isinstance(linear_kernel(linear._replace(g=by_head)), FlaLinearAttention)
    assert not caplog.records
    assert isinstance(linear_kernel(linear), ReferenceLinearAttention)
    assert "decays by head, not by channel" in caplog.text


def test_what_fla_does_not_take_is_said(ampere, caplog):
    wide = torch.empty(1, 64, 2, 512, device="cuda")
    odd = torch.empty(1, 64, 4, 7, device="cuda", dtype=torch.bfloat16)
    for x in (on_a_gpu(q=wide, k=wide), on_a_gpu(v=odd), on_a_gpu(v=odd.double())):
        assert isinstance(delta_kernel(x), ReferenceDeltaRule)
    ampere.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert isinstance(delta_kernel(on_a_gpu()), ReferenceDeltaRule)
    for reason in (
        "take keys of at most 256",
        "an even number of channels in half precision, not (8, 7)",
        "do not compute in fp64",
        "run on GPUs from Ampere on",
    ):
        assert reason in caplog.text


def test_kernels_that_fail_their_self_test_are_not_used(ampere, caplog):
    fault = "failed its self-test (stretches: an error of 1.0e+00 in dk)"
    ampere.setattr(self_test, "fault_in_stretches", lambda *found_for: fault)
    by_head = torch.empty(1, 64, 4, device="cuda")
    assert isinstance(delta_kernel(on_a_gpu()), ReferenceDeltaRule)
    assert isinstance(linear_kernel(on_a_gpu(LinearInputs, g=by_head)), ReferenceLinearAttention)
    assert caplog.text.count(fault) == 2


class Wrong:
    """A kernel that is right but for one result."""

    def __init__(self, kernel, result, value_dim=8):
        self.kernel, self.result, self.value_dim = kernel, result, value_dim

    def carried(self, carry, name):
        return (lambda summary: carry(self.spoil(summary, name))) if carry else carry

    def spoil(self, summary, name):
        """A tenth of what becomes of a state is lost, or of what is written."""
        through, written = summary.tensor_split((-self.value_dim,), dim=-1)
        halves = {name: written, name.replace("summary", "transition"): through}
        if self.result in halves:
            halves[self.result] = 0.9 * halves[self.result]
        return torch.cat(tuple(reversed(halves.values())), dim=-1)

    def forward(self, parts, carry):
        outs, state = self.kernel.forward(parts, self.carried(carry, "summary"))
        return ([-out for out in outs] if self.result == "out" else outs), state

    def backward(self, parts, grads_out, state, carry):
        carry = self.carried(carry, "dsummary")
        (grads,) = self.kernel.backward(parts, grads_out, state, carry)
        name = self.result.removeprefix("d")
        if name not in grads._fields:
            return [grads]
        return [grads._replace(**{name: getattr(grads, name).roll(1, dims=1)})]


@pytest.mark.parametrize(
    ("inputs", "reference", "by_channel"),
    [
        (DeltaInputs, ReferenceDeltaRule, False),
        (DeltaInputs, ReferenceDeltaRule, True),
        (LinearInputs, ReferenceLinearAttention, False),
    ],
)
def test_the_self_test_finds_what_is_wrong(inputs, reference, by_channel):
    """Of out, summaries and each gradient; and nothing in what is right. It draws nothing."""
    shapes = SIZES if by_channel else SIZES | {"g": (4,)}
    like = [torch.empty(1, 1, *shapes[name], dtype=torch.bfloat16) for name in inputs._fields]
    sizes = self_test.Sizes.of(inputs(*like[:-1], like[-1].int()))
    find = partial(self_test.fault_in_stretches, reference=reference(), sizes=sizes, tokens=256)
    state = torch.get_rng_state()
    assert find(lambda x: reference()) is None
    # In the first step of a run, between what a checkpointed block draws and what it draws again.
    assert torch.equal(torch.get_rng_state(), state)
    wrong = [f"d{name}" for name in inputs._fields if name != "starts"]
    summaries = ("summary", "dsummary", "transition", "dtransition")
    for result in ("out", *summaries, *wrong):
        assert f"in {result})" in find(lambda x, result=result: Wrong(reference(), result))
    assert "ZeroDivisionError" in find(lambda x: 1 // 0)


@pytest.mark.slow
def test_fla_kernels_of_decays_by_channel_equal_the_reference():
    """In Triton's interpreter, in fp32; with 60 documents of one token in a chunk, too."""
    (errors,) = lines_of("tests.harness.fla_interpreted", "channels", TRITON_INTERPRET="1")
    assert len(errors) == 10
    assert {name: error for name, error in errors.items() if not error < 5e-5} == {}

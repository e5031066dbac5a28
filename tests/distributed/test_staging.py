"""Transfers of ranks that share a GPU go through host memory; here CPU tensors stand for its."""

import logging

import pytest
import torch
from torch import distributed as dist

from dtcp._torch.fakes import fake_tensors
from dtcp.distributed import groups, staging
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention
from tests.harness import packings
from tests.harness.attention_parity import CAUSAL, Case, assert_equals_one_device, mixer_on
from tests.harness.spmd import spmd


@pytest.mark.parametrize(
    "style",
    [RingAttention(), AllGatherAttention(), UlyssesAttention()],
    ids=["ring", "all-gather", "ulysses"],
)
@spmd(ranks=(2, 4))
def test_staged_transfers_equal_one_device(mesh, style, ranks):
    with pytest.MonkeyPatch.context() as patch:
        staged = []
        patch.setattr(staging, "is_staged", lambda x, group: staged.append(x.shape) or True)
        case = Case(CAUSAL, packings.one_document)
        mixer = mixer_on(mesh, style, CAUSAL.mask)
        assert_equals_one_device(case, mixer, mixer, mesh, HeadTail)
        assert staged


@pytest.mark.slow
@spmd(ranks=4)
def test_staged_transfers_between_groups_equal_one_device(mesh):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "is_staged", lambda x, group: True)
        case = Case(CAUSAL, packings.two_rows)
        mixer = mixer_on(mesh, HybridAttention(inner_ranks=2), CAUSAL.mask)
        assert_equals_one_device(case, mixer, mixer, mesh, HeadTail)


class OnGpu:
    is_cuda = True


@spmd(ranks=2)
def test_tensors_on_a_gpu_are_staged_under_gloo_which_is_said_once(mesh):
    group, said = mesh.get_group(), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    staging.LOG.addHandler(handler)
    staging._say_so.cache_clear()
    try:
        assert not staging.is_staged(torch.zeros(1), group) and not said
        assert staging.is_staged(OnGpu(), group) and staging.is_staged(OnGpu(), group)
    finally:
        staging.LOG.removeHandler(handler)
    assert len(said) == 1 and "through host memory" in said[0] and "nccl" in said[0]


def test_the_backend_of_a_gpu_decides_about_staging(monkeypatch):
    for configured, staged in (
        ("cpu:gloo,cuda:nccl", False),
        ("cpu:gloo,cuda:gloo", True),
        ("cuda:nccl", False),
    ):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, text=configured: text)
        assert staging.is_staged(OnGpu(), None) is staged


@pytest.mark.parametrize(
    ("configured", "device", "links"),
    [
        ("cuda:nccl", "cuda", "cuda"),  # as "nccl", and where no backend was named
        ("cpu:gloo,cuda:nccl", "cuda", "cuda"),
        ("cpu:gloo,cuda:nccl", "cpu", None),
        ("cpu:gloo,cuda:gloo", "cuda", None),
    ],
)
def test_nccl_makes_its_links_however_a_group_was_configured(
    monkeypatch, configured, device, links
):
    """A barrier of the second one runs over gloo, and get_backend says "undefined" of the first."""
    reduced = []
    monkeypatch.setattr(groups, "group_of", lambda name: name)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: configured)
    monkeypatch.setattr(dist, "get_backend", lambda group: "undefined")
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: reduced.append((group, x.device.type)))
    with fake_tensors():
        groups.connect("cp", device)
    assert reduced == ([] if links is None else [("cp", links)])

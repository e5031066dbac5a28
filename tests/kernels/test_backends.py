"""Backends of attention: which is chosen, what is said of it, and who fails a self-test."""

import logging
import re
from dataclasses import replace
from pathlib import Path

from dtcp.torchtitan.section import Section

import pytest
import torch

from dtcp.kernels.__main__ import print_backends
from dtcp.kernels.softmax import api, demand
from dtcp.kernels.softmax.backends import BACKENDS, backend_named
from dtcp.kernels.softmax.calls import CallKind
from dtcp.kernels.softmax.choice import (
    choose_kernel,
    log_choice,
    log_rounded_parts,
    log_rounded_sums,
)
from dtcp.kernels.softmax.demand import Demand, missing, refusal
from dtcp.kernels.softmax.reference import ReferenceAttention
from dtcp.kernels.softmax.self_test import fault_of
from dtcp.mixer_metadata import batch_metadata
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import Causal
from dtcp.softmax import RingAttention
from dtcp.softmax.mixer import SoftmaxAttention, name_kernel
from tests.harness.attention_parity import mixer_on
from tests.harness.spmd import spmd
from tests.harness.stand_in_kernels import (
    BLOCKS,
    FLASH4,
    PLAIN,
    FlashIntervalAttention,
    PlainAttention,
)

HOPPER = Demand(
    device=torch.device("cpu"),
    arch=90,
    dtypes=(torch.bfloat16,) * 3,
    key_width=128,
    value_width=128,
    group=4,
    kinds=frozenset({CallKind.CAUSAL}),
    packed=False,
    skewed=False,
    softcap=False,
    repeatable=False,
    triton=True,
    triton_width=128,
)
"""A causal call on a Hopper GPU."""
INTERVAL = frozenset({CallKind.INTERVAL})
WINDOW = frozenset({CallKind.WINDOW})


@pytest.fixture
def everything_installed(monkeypatch):
    monkeypatch.setattr(demand, "missing", lambda package: None)


def passed(_backend, _demand):
    return None


def chosen(asked, name="auto"):
    return choose_kernel(asked, name, passed).backend.name


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(
    ("change", "backend"),
    [
        ({}, "flash3"),
        ({"arch": 80}, "flash2"),
        ({"arch": 80, "packed": True}, "flash2"),
        ({"arch": 100}, "flash"),
        ({"kinds": INTERVAL}, "flash"),
        ({"wide": True}, "triton"),
        ({"kinds": INTERVAL, "repeatable": True}, "triton"),
        ({"kinds": WINDOW, "arch": 100, "key_width": 256, "value_width": 256}, "triton"),
        ({"kinds": WINDOW, "softcap": True}, "flash3"),
        ({"key_width": 512, "value_width": 512, "triton_width": 512}, "ffpa"),
        ({"key_width": 512, "value_width": 512, "kinds": INTERVAL}, "triton"),
        ({"key_width": 192}, "triton"),
        ({"key_width": 192, "arch": 100}, "flash"),
        ({"dtypes": (torch.float32,) * 3}, "triton"),
        ({"dtypes": (torch.float64,) * 3}, "reference"),
        ({"dtypes": (torch.bfloat16, torch.float16, torch.float16)}, "reference"),
        ({"arch": 70, "triton": False}, "reference"),
        ({"arch": 0, "triton": False}, "reference"),
        ({"arch": 0}, "triton"),
        ({"triton_width": 1024, "key_width": 512, "kinds": INTERVAL}, "reference"),
    ],
    ids=str,
)
def test_the_fastest_backend_that_can_is_chosen(change, backend):
    assert chosen(replace(HOPPER, **change)) == backend


def test_without_other_packages_a_backend_of_torch_is_chosen(monkeypatch):
    absent = {"flash-attn-4", "flash_attn_3", "flash-attn", "ffpa-attn"}
    fake = lambda package: "needs it" if package and package.name in absent else None  # noqa: E731
    monkeypatch.setattr(demand, "missing", fake)
    assert chosen(HOPPER) == "cudnn"
    assert chosen(replace(HOPPER, skewed=True)) == "triton"
    assert chosen(replace(HOPPER, arch=80, kinds=WINDOW)) == "aten_flash"


def test_a_backend_that_fails_its_self_test_is_passed_over_and_that_is_said(
    everything_installed, caplog
):
    def fails(backend, _):
        return "failed its self-test (causal)" if backend.name.startswith("flash") else None

    made = choose_kernel(HOPPER, "auto", fails)
    assert made.backend.name == "cudnn"
    assert [name for name, _ in made.passed_over] == ["flash3", "flash"]
    with caplog.at_level(logging.INFO, "dtcp.kernels"):
        log_choice(made)
    assert "computed by cudnn; faster ones passed over: flash3 failed its self-test" in caplog.text


def test_losing_half_the_speed_of_a_backend_is_a_warning(monkeypatch, caplog):
    """And says how to get it back; less is information."""
    monkeypatch.setattr(demand, "missing", lambda p: p and p.name != "triton" and f"needs {p.name}")
    with caplog.at_level(logging.INFO, "dtcp.kernels"):
        log_choice(choose_kernel(replace(HOPPER, arch=100, kinds=INTERVAL), "auto", passed))
        log_choice(choose_kernel(HOPPER, "auto", passed))
    first, second = caplog.records
    assert first.levelname == "WARNING" and "flash needs flash-attn-4;" in first.message
    assert "(up to 2.7 times as fast)" in first.message
    assert second.levelname == "INFO"


@pytest.mark.parametrize("arch", [60, 75, 110, 130])
def test_a_gpu_that_no_kernel_serves_is_told_so(arch, caplog):
    """Older than all of them or newer; in fp64 nothing is lost."""
    without = replace(HOPPER, arch=arch, triton=False)
    with caplog.at_level(logging.INFO, "dtcp.kernels"):
        log_choice(choose_kernel(without, "auto", passed))
        log_choice(choose_kernel(replace(without, dtypes=(torch.float64,) * 3), "auto", passed))
    slow, exact = caplog.records
    assert slow.levelname == "WARNING" and "by reference; in plain torch, many" in slow.message
    assert exact.levelname == "INFO" and "plain torch" not in exact.message
    with pytest.raises(ValueError, match=rf"does not run on sm_{arch}, .*: name one of auto, ref"):
        choose_kernel(without, "flash", passed)


def test_plain_torch_in_the_place_of_a_kernel_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(demand, "missing", lambda package: package and f"needs {package.name}")
    asked = replace(HOPPER, kinds=INTERVAL, triton=False)
    made = choose_kernel(asked, "auto", passed)
    assert made.backend.name == "reference" and made.lost == float("inf")
    with caplog.at_level(logging.INFO, "dtcp.kernels"):
        log_choice(made)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "flash needs flash-attn-4" in record.message
    assert "inf" not in record.message and "many times slower" in record.message


def test_what_rounding_costs_a_strategy_is_said_once(caplog):
    with caplog.at_level(logging.INFO, "dtcp.kernels"):
        for say in (log_rounded_parts, log_rounded_sums):
            say.cache_clear()
            for name in ("flash", "flash", "triton", "reference"):
                say(name)
    merged, summed = (record.message for record in caplog.records)
    assert "merge results that flash has rounded" in merged and "1.4 times" in merged
    assert "Ranks sum gradients of keys, which flash has rounded" in summed
    assert "1.2 to 1.5 times" in summed and "reduce_dtype=torch.float32" in summed


def test_a_choice_of_a_backend_is_said_once(caplog):
    api.chosen.cache_clear()
    mixer, documents = SoftmaxAttention(Causal()), Documents.single(1, 8)
    q, k, v = (torch.randn(1, 8, heads, 40) for heads in (2, 1, 1))
    with caplog.at_level(logging.INFO, "dtcp.kernels"):
        for _ in range(2):
            mixer(q, k, v, batch_metadata(mixer, documents))
    (record,) = caplog.records
    assert "heads of 40, float32, on a cpu) is computed by reference" in record.message


def test_a_backend_of_no_known_name_is_refused():
    names = "auto, flash, flash3, cudnn, ffpa, flash2, aten_flash, triton, reference"
    with pytest.raises(ValueError, match=f"one of {names}, got kernel='fastest'"):
        SoftmaxAttention(Causal(), kernel="fastest")


def test_a_config_names_the_backend_of_all_mixers():
    model = torch.nn.Sequential(*(SoftmaxAttention(Causal()) for _ in range(2)))
    name_kernel(model, "reference")
    assert [mixer.kernel for mixer in model] == ["reference"] * 2
    with pytest.raises(ValueError, match="got kernel='tritton'"):
        name_kernel(model, "tritton")
    assert Section().kernel == "auto"


@spmd(ranks=1)
def test_a_style_names_the_backend_of_its_mixers(mesh):
    assert mixer_on(mesh, RingAttention(kernel="reference"), Causal()).kernel == "reference"
    assert mixer_on(mesh, RingAttention(), Causal(), kernel="reference").kernel == "reference"
    with pytest.raises(ValueError, match="got kernel='cuddn'"):
        mixer_on(mesh, RingAttention(kernel="cuddn"), Causal())


def test_a_named_backend_that_cannot_says_what_can():
    mixer, documents = SoftmaxAttention(Causal(), kernel="cudnn"), Documents.single(1, 8)
    q, k, v = (torch.randn(1, 8, heads, 16) for heads in (2, 1, 1))
    with pytest.raises(ValueError, match=r"'cudnn', which does not run on a cpu, .*auto, ref"):
        mixer(q, k, v, batch_metadata(mixer, documents))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("flash", {"arch": 80}, "does not run on sm_80"),
        ("flash", {"dtypes": (torch.float32,) * 3}, "takes float16 or bfloat16, got float32"),
        (
            "flash",
            {"key_width": 512, "value_width": 512},
            "heads of 8 to 256, unequal if unshared, got 512",
        ),
        (
            "flash",
            {"key_width": 100, "value_width": 100},
            "heads of 8 to 256, unequal if unshared, got 100",
        ),
        ("aten_flash", {"softcap": True}, "has no softcap"),
        ("cudnn", {"repeatable": True}, "does not repeat itself bit by bit"),
    ],
)
def test_a_named_backend_is_refused_by_what_is_alike_on_all_ranks(
    everything_installed, name, change, reason
):
    with pytest.raises(ValueError, match=reason):
        choose_kernel(replace(HOPPER, **change), name, passed)


def test_a_mask_that_a_named_backend_cannot_do_is_left_to_another(everything_installed):
    """It may be plain on other ranks, which are not left waiting."""
    made = choose_kernel(replace(HOPPER, packed=True), "cudnn", passed)
    assert (made.backend.name, made.passed_over[0]) == (
        "flash3",
        ("cudnn", "does not take packed documents"),
    )
    assert chosen(replace(HOPPER, skewed=False), "cudnn") == "cudnn"


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (None, "needs flash-attn-4, which is not installed: pip install 'dtcp"),
        ("4.0.0b35", "from 4.0.0b36 to below 4.1, got 4.0.0b35"),
        ("4.1.0", "from 4.0.0b36 to below 4.1, got 4.1.0"),
        ("4.1.0b1", "from 4.0.0b36 to below 4.1, got 4.1.0b1"),
        ("4.0.0b36", None),
        ("4.0.0b37.dev1+g1a2b", None),
        ("4.0.1", None),
    ],
)
def test_a_missing_or_too_new_package_of_a_backend_is_one_sentence(monkeypatch, version, text):
    monkeypatch.setattr(demand, "version_of", lambda package: version)
    said = missing.__wrapped__(backend_named("flash").package)
    assert said is None if text is None else text in said


def everything(arch):
    """A demand of every kind of call that a backend may get on that GPU."""
    for kind in CallKind:
        for packed in (False, True) if kind is not CallKind.INTERVAL else (False,):
            yield replace(HOPPER, arch=arch, kinds=frozenset({kind}), packed=packed, skewed=packed)


@pytest.mark.parametrize("name", PLAIN)
def test_the_self_test_passes_a_backend_that_is_right(name):
    """What it would be asked on a GPU, here with a stand-in and small heads."""
    asked = 0
    for demanded in everything(90):
        width = 512 if name == "ffpa" else 128
        wide = replace(demanded, key_width=width, value_width=width)
        if refusal(replace(backend_named(name), package=None), wide) is None:
            on_cpu = replace(demanded, arch=0, key_width=16, value_width=16, group=2)
            asked += 1
            assert fault_of(lambda calls: kernel(name, calls), ReferenceAttention(), on_cpu) is None
    assert asked == {"flash": 7, "cudnn": 2, "ffpa": 4}.get(name, 6)


def kernel(name, calls, spoil=lambda out: out):
    if calls is None:
        return FlashIntervalAttention(FLASH4, BLOCKS)
    plain = PLAIN[name]()
    forward = plain.forward
    plain.forward = lambda *arguments: spoil(forward(*arguments))
    return PlainAttention(plain, calls)


def not_compiled(result):
    """As Triton and CuTe raise, whose exceptions are no RuntimeError."""

    class OutOfResources(Exception):
        pass

    raise OutOfResources("shared memory, Required: 262144")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda result: (result[0] * 1.1, result[1]), r"causal: an error of 9\.\de-02 in out"),
        (lambda result: (result[0], result[1] + 1), "causal: an error of .* in lse"),
        (lambda result: (result[0] * torch.nan, result[1]), "causal: an error of nan in out"),
        (lambda result: result[2], "IndexError"),
        (not_compiled, "OutOfResources: shared memory"),
    ],
)
def test_the_self_test_finds_a_backend_that_is_wrong(spoil, text):
    asked = replace(HOPPER, arch=0, key_width=16, value_width=16, group=2)
    said = fault_of(lambda calls: kernel("flash", calls, spoil), ReferenceAttention(), asked)
    assert said.startswith("failed its self-test") and re.search(text, said)


def test_the_table_of_backends_is_printed_and_its_page_is_current(capsys):
    assert print_backends([]) == 0
    printed = capsys.readouterr().out
    for backend in BACKENDS:
        assert f"| {backend.name} " in printed
    assert "not installed" in printed and "installed here" in printed
    brings = "yes, with torch" if torch.version.cuda else "needs a CUDA build of torch"
    assert all(re.search(rf"\| {name} +\| {brings}", printed) for name in ("cudnn", "aten_flash"))
    assert re.search(r"\| reference +\| yes, with torch", printed)
    assert print_backends(["--markdown"]) == 0
    page = (Path(__file__).parents[2] / "docs/kernels.md").read_text()
    backends, sparse = capsys.readouterr().out.strip().split("\n\n")
    assert backends in page and sparse in page

"""The campaign for a GPU, as far as a machine without one goes."""

import importlib
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import __main__ as campaign
from benchmarks.gpu import (
    kernels,
    latents,
    long_rows,
    other_kernels,
    overlap,
    problems,
    ranks,
    report,
    shared,
    speed,
    supervise,
    timing,
    wheels,
)
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.candidates import candidates
from benchmarks.gpu.errors import errors_by_name, within, worst
from benchmarks.gpu.keep import LINES, keep, resume
from benchmarks.gpu.problems import Case, Heads, Problem, whole_problem
from benchmarks.gpu.processes import error_in, run_watched
from benchmarks.gpu.run import forget_wrong, read_lines, run_stage, running_case, summary, verdict
from benchmarks.gpu.stages import STAGES, Stage
from benchmarks.gpu.wheels import PART, add_packages, describe_transfer, pack, unpack, unpack_whole
from dtcp.kernels.softmax import api
from dtcp.kernels.softmax.backends import backend_named
from dtcp.kernels.softmax.calls import calls_of
from dtcp.kernels.softmax.types import SoftmaxParams
from dtcp.softmax import AllGatherAttention, RingAttention
from dtcp.softmax.default import default_attention
from tests.harness.patience import Patience
from tests.harness.stand_in_kernels import StandInKernels


def test_without_a_gpu_the_campaign_says_what_it_would_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "There is no GPU here" in said and "No packages are prepared" in said
    for stage in STAGES:
        assert stage.name in said and f"{len(stage.cases('cuda'))} cases" in said
    assert sum(stage.seconds for stage in STAGES) <= 8 * 60


def test_the_campaign_ends_within_its_limit(monkeypatch, tmp_path, capsys):
    """Later stages get what is left, and none where nothing is."""
    given, clock = {}, itertools.count(step=100.0)

    def supervise_it(name, seconds, results, workers):
        given[name] = seconds
        return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(campaign, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(campaign, "unpack_whole", lambda: None)
    monkeypatch.setattr(campaign, "add_packages", lambda: "")
    monkeypatch.setattr(campaign, "supervise", supervise_it)
    monkeypatch.setattr(campaign, "compile_caches", dict)
    assert main(["--limit", "260", "--results", str(tmp_path)]) == 0
    assert given == {"kernels": 100, "others": 50}
    said = capsys.readouterr().out
    assert "shared: the limit of 260 s is reached" in said and "shared: 0 lines" in said


def test_a_campaign_without_results_reports_that(capsys, tmp_path):
    assert main(["--report", "--results", str(tmp_path)]) == 0
    assert "There are no results" in capsys.readouterr().out


def counting(names, seconds=60.0):
    """A stage that counts how often each case ran; `fails` raises."""
    ran = dict.fromkeys(names, 0)

    def run(name):
        def measure():
            ran[name] += 1
            if name == "fails":
                raise RuntimeError("CUDA error")
            return {"forward_tflops": 100.0 + len(name), "right": name != "wrong"}

        return measure

    cases = [Case(name, run(name)) for name in names]
    return Stage("speed", "How?", seconds, lambda device: cases), ran


def test_the_campaign_goes_on_where_it_was_stopped(tmp_path):
    names = ["a 8192", "wrong", "fails", "b 8192"]
    stage, ran = counting(names)
    first, _ = counting(names[:2])
    assert run_stage(first, tmp_path, again=False, device="cpu") == 1
    assert run_stage(stage, tmp_path, again=False, device="cpu") == 1
    assert ran == {"a 8192": 0, "wrong": 0, "fails": 1, "b 8192": 1}
    lines = read_lines(tmp_path / "speed.jsonl")
    assert [line["case"] for line in lines] == names
    assert "RuntimeError: CUDA error" in lines[2]["failed"]
    assert all(line["torch"] == torch.__version__ and "card" in line for line in lines)
    assert run_stage(stage, tmp_path, again=True, device="cpu") == 2
    assert "| a 8192" in summary(tmp_path)
    assert verdict(tmp_path) == "speed: 4 lines, 2 wrong: wrong; fails"
    assert verdict(tmp_path, ["overlap", "speed"]).startswith("overlap: 0 lines, 0 wrong\nspeed: 4")


def test_a_line_of_the_campaign_that_was_cut_short_costs_no_other(tmp_path):
    """By whatever killed the process that wrote it; its case is measured again."""
    stage, ran = counting(["a", "b"])
    (tmp_path / "speed.jsonl").write_text('{"stage": "speed", "case": "a", "forw')
    run_stage(stage, tmp_path, again=False, device="cpu")
    assert [line["case"] for line in read_lines(tmp_path / "speed.jsonl")] == ["a", "b"]
    assert ran == {"a": 1, "b": 1}


def test_a_stage_ends_with_the_campaign_that_started_it(tmp_path, monkeypatch, capsys):
    """Whose next run would share the card with it."""
    parents = iter((7, 7, 1))
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    stage, ran = counting(["a", "b", "c"])
    run_stage(stage, tmp_path, again=False, device="cpu")
    assert ran == {"a": 1, "b": 0, "c": 0} and "which was killed" in capsys.readouterr().out


def test_documents_of_the_campaign_are_several():
    """At every length that they are measured at; one alone is no packed call."""
    for length in (kernels.LENGTH, 2048, *speed.LENGTHS):
        documents = problems.lognormal_documents(length)
        assert len(documents.lengths[0]) > 3 and min(documents.lengths[0]) < 200
    problem = whole_problem("documents", kernels.LENGTH, Heads(2, 1, 16), "cpu")
    calls = calls_of(problem.keys.pieces, batch=1, length=kernels.LENGTH, num_keys=kernels.LENGTH)
    assert [call.packed for call in calls] == [True]


def test_a_stage_of_the_campaign_ends_with_its_time(tmp_path, capsys):
    stage, ran = counting(["a", "b"], seconds=-1.0)
    assert run_stage(stage, tmp_path, again=False, device="cpu") == 0
    assert "2 cases left" in capsys.readouterr().out and sum(ran.values()) == 0


def test_the_campaign_makes_a_page_and_a_plot(tmp_path):
    stage, _ = counting(["flash causal 8192", "flash causal 32768"])
    run_stage(stage, tmp_path / "lines", again=False, device="cpu")
    said = report.write_report(tmp_path / "lines", tmp_path / "pages")
    page, plot = sorted((tmp_path / "pages").iterdir())
    assert page.suffix == ".md" and plot.suffix == ".svg" and plot.name in page.read_text()
    assert str(page) in said and "| flash causal 8192 " in page.read_text()


@pytest.fixture
def flash(monkeypatch):
    """flash-attn-4's stand-in in the place of a GPU."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    made = StandInKernels("flash")
    monkeypatch.setattr(api, "attention_kernel", made)
    monkeypatch.setattr(Problem, "without", lambda self, params: None)
    return made


def test_the_campaign_measures_errors_of_a_backend(flash):
    for case in kernels.cases("cpu", length=90):
        if case.name.startswith("flash 64"):
            result = case.run()
            assert result["right"] and 1e-4 < result["out"] < 2**-7, (case.name, result)


def test_the_campaign_holds_the_end_of_a_long_row_to_fp64(flash):
    (case,) = long_rows.cases("cpu", 700, Heads(2, 2, 16))[:1]
    result = case.run()
    assert case.name == "flash window 700" and flash.used["window"] == 2
    assert result["right"] and 1e-4 < result["dk"] < 2**-7 and result["numbers"] == 700 * 32
    tokens = long_rows.TOKENS * long_rows.HEADS.keys * long_rows.HEADS.width
    assert tokens > 2**31


def test_what_is_not_a_number_is_wrong_in_the_campaign():
    """Also behind others: `max` passes over it."""
    numbers, broken = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    errors = errors_by_name(("out", "dq"), (numbers, broken), (numbers, numbers))
    assert errors["out"] == 0 and not within(errors, 0.1) and within({"out": 0.0}, 0.1)
    assert worst([0.1, errors["dq"], 0.2]) != worst([0.1, errors["dq"], 0.2])
    assert worst([0.1, 0.2]) == 0.2 and not within({}, 0.1)
    one_alone = errors_by_name(("dk", "dv"), (None, None), (numbers, None))
    assert one_alone == {"dk": float("inf")}


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("does not take packed documents", "refused"),
        ("failed its self-test (causal: an error of 1.0e+00)", "failed"),
    ],
)
def test_what_another_backend_computes_is_not_measured_as_the_named_one(monkeypatch, reason, line):
    choice = SimpleNamespace(backend=backend_named("triton"), passed_over=(("cudnn", reason),))
    monkeypatch.setattr(problems, "kernel_choice", lambda *call: choice)
    problem = whole_problem("causal", 64, Heads(2, 1, 16), "cpu")
    assert problem.without(SoftmaxParams(1.0, kernel="cudnn")) == {line: reason}
    assert problem.without(SoftmaxParams(1.0, kernel="triton")) is None
    monkeypatch.undo()
    refused = problem.without(SoftmaxParams(1.0, kernel="cudnn"))["refused"]
    assert "does not run on a cpu" in refused


@pytest.mark.parametrize("layout", ["Contiguous", "HeadTail", "PerDocument", "BlockBalanced"])
def test_the_campaign_puts_ranks_together(flash, layout, monkeypatch):
    monkeypatch.setattr(ranks, "SMALL", Heads(2, 1, 16))
    for case in ranks.right_cases("cpu", length=96):
        if layout in case.name and "2 ranks" in case.name:
            result = case.run()
            assert result["right"], (case.name, result)
    assert flash.used


def test_one_call_over_gathered_keys_has_the_error_of_one_device_on_a_rounding_backend(
    flash, monkeypatch
):
    """The default on GPUs; a ring over the same kernel has more, and says so."""
    monkeypatch.setattr(ranks, "SMALL", Heads(2, 1, 64))
    cases = {case.name: case for case in ranks.right_cases("cpu", length=256)}
    assert cases["all-gather HeadTail causal 4 ranks"].run()["of_one"] <= 1.01
    assert 1.1 < cases["ring HeadTail causal 4 ranks"].run()["of_one"] < 1.5
    assert isinstance(default_attention("cuda"), AllGatherAttention)
    assert isinstance(default_attention("cpu"), RingAttention)


def test_a_call_is_timed_three_times_at_least_and_as_long_as_there_is_time(monkeypatch):
    """After one that is not counted, in which it may compile."""
    ran, clock = [], 0.0

    def call():
        nonlocal clock
        ran.append(clock)
        clock += 50.0 if len(ran) == 1 else took

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock))
    for took, calls in ((0.5, 1 + 3), (0.05, 1 + 8), (0.001, 1 + 20)):
        ran.clear()
        assert timing.seconds_of(call, torch.device("cpu")) == pytest.approx(took)
        assert len(ran) == calls


def test_packages_for_a_gpu_are_cut_into_transfers(tmp_path, monkeypatch):
    packages, back = tmp_path / "packages", tmp_path / "back"
    packages.mkdir()
    (packages / "module.py").write_text("answer = 42\n")
    noise = torch.randint(0, 256, (4000,), generator=torch.Generator().manual_seed(0))
    (packages / "library.so").write_bytes(bytes(noise.tolist()))
    pack(packages, tmp_path / "transfer", part=1500)
    parts = sorted((tmp_path / "transfer").iterdir())
    sizes = [path.stat().st_size for path in parts]
    assert len(parts) >= 3 and max(sizes) <= 1500 and max(sizes) - min(sizes) <= len(parts)
    unpack(tmp_path / "transfer", back)
    for path in packages.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes()
    assert "packages.tar.xz.1of" in describe_transfer(tmp_path / "transfer")
    elsewhere = tmp_path / "transfer", tmp_path / "elsewhere"
    monkeypatch.setattr(wheels, "PYTHON", "3.0")
    unpack_whole(*elsewhere)
    assert "is for Python 3.0" in add_packages(*elsewhere) and not elsewhere[1].exists()
    monkeypatch.setattr(wheels, "_is_for_this_python", lambda: True)
    unpack_whole(*elsewhere)
    assert (elsewhere[1] / "module.py").read_text() == "answer = 42\n"
    shutil.rmtree(elsewhere[1])
    parts[-1].unlink()
    unpack_whole(*elsewhere)
    assert "of more are there" in add_packages(*elsewhere) and not elsewhere[1].exists()
    # With room for the project, 6 MiB in 2026, in a transfer of 64.
    assert PART <= 50 * 2**20


def test_the_campaign_runs_without_a_package_that_only_costs_it_time(tmp_path, monkeypatch):
    """cutlass imports jax where there is one."""
    packages = tmp_path / "packages"
    (packages / "jax").mkdir(parents=True)
    (packages / "jax" / "__init__.py").write_text("answer = 42\n")
    (packages / "flash_stand_in.py").write_text("answer = 42\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    assert "are on the path" in add_packages(tmp_path / "transfer", packages)
    assert importlib.import_module("flash_stand_in").answer == 42
    with pytest.raises(ImportError, match="not imported by the campaign"):
        importlib.import_module("jax.numpy")
    assert "jax" not in sys.modules
    del sys.modules["flash_stand_in"]


def test_results_of_the_campaign_are_lines_of_json(tmp_path):
    stage, _ = counting(["a"])
    run_stage(stage, tmp_path, again=False, device="cpu")
    (line,) = (tmp_path / "speed.jsonl").read_text().splitlines()
    assert json.loads(line)["stage"] == "speed"


STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

folder = Path(sys.argv[4])
path, running = folder / "speed.jsonl", folder / "speed.0.running"
done = [json.loads(line)["case"] for line in path.read_text().splitlines()] if path.exists() else []
for case in ("a", "crashes", "hangs", "b"):
    if case in done:
        continue
    running.write_text(case)
    if case == "crashes":
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "hangs":
        time.sleep(3600)
    with path.open("a") as file:
        file.write(json.dumps({"case": case}) + "\\n")
    running.unlink()
"""
"""What `run_stage` does with its folder, in a process that imports nothing."""


def test_a_case_of_the_campaign_that_crashes_or_hangs_costs_the_others_nothing(
    tmp_path, monkeypatch, capsys
):
    ticks = itertools.count()

    def monotonic():
        """A clock that stands still until a case hangs, and is a minute further at each look."""
        hangs = running_case(tmp_path, "speed", 0) == "hangs"
        return 60.0 * next(ticks) if hangs else 0.0

    monkeypatch.setattr(supervise, "time", SimpleNamespace(monotonic=monotonic))
    script = tmp_path / "stage.py"
    script.write_text(STAND_IN)
    wrong = supervise.supervise("speed", 1200.0, tmp_path, command=[sys.executable, str(script)])
    lines = {line["case"]: line.get("failed", "") for line in read_lines(tmp_path / "speed.jsonl")}
    assert wrong == 2 and list(lines) == ["a", "crashes", "hangs", "b"]
    assert "status -9" in lines["crashes"] and "took longer" in lines["hangs"]
    assert not list(tmp_path.glob("*.running"))
    forget_wrong(tmp_path, ["speed"])
    assert [line["case"] for line in read_lines(tmp_path / "speed.jsonl")] == ["a", "b"]


@pytest.mark.parametrize("start", [0.0, 12.0])
def test_a_case_that_the_end_of_its_stage_cuts_short_is_wrong_unless_it_was_started_late(
    tmp_path, monkeypatch, capsys, start
):
    ticks, hung = itertools.count(), []

    def monotonic():
        """A clock that stands still until a case hangs, in the first or second half of 20 s."""
        if running_case(tmp_path, "speed", 0) == "hangs":
            hung.append(True)
        return start + 9.0 * next(ticks) if hung else 0.0

    monkeypatch.setattr(supervise, "time", SimpleNamespace(monotonic=monotonic))
    script = tmp_path / "stage.py"
    script.write_text(STAND_IN.replace('"crashes", ', ""))
    wrong = supervise.supervise("speed", 20.0, tmp_path, command=[sys.executable, str(script)])
    lines = {line["case"]: line.get("failed") for line in read_lines(tmp_path / "speed.jsonl")}
    late = start > 10
    ended = {} if late else {"hangs": "did not end within its stage"}
    assert wrong == len(ended) and lines == {"a": None, **ended}
    assert ("in the middle of hangs" in capsys.readouterr().out) == late
    assert not list(tmp_path.glob("*.running"))


WORKER = """
import sys, time
from pathlib import Path
from benchmarks.gpu.problems import Case
from benchmarks.gpu.run import run_stage
from benchmarks.gpu.stages import Stage

folder, worker = Path(sys.argv[4]), int(sys.argv[6])
together = [folder / "0.here", folder / "1.here"]

def measure():
    # Until the other one measures, too.
    together[worker].touch()
    while not all(path.exists() for path in together):
        time.sleep(0.01)
    return {"worker": worker}

cases = [Case(str(index), measure) for index in range(6)]
run_stage(Stage("speed", "How?", 60.0, lambda device: cases), folder, again=False, device="cpu",
          seconds=60.0, worker=worker)
"""


@pytest.mark.slow
def test_processes_of_the_campaign_share_the_cases_of_a_stage(tmp_path, monkeypatch):
    """Each case is measured once, and both measure some."""
    monkeypatch.setattr(supervise, "START_SECONDS", 600.0)
    command = [sys.executable, "-c", WORKER]
    assert supervise.supervise("speed", 600.0, tmp_path, workers=2, command=command) == 0
    lines = read_lines(tmp_path / "speed.jsonl")
    assert sorted(line["case"] for line in lines) == list("012345")
    assert {line["worker"] for line in lines} == {0, 1}
    assert not list(tmp_path.glob("*.taken"))


def has_ended(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_command_of_the_campaign_is_killed_with_all_that_it_started(tmp_path):
    """Also what has made a session of its own, as torchrun's ranks do."""
    said = tmp_path / "pid"
    inner = f"import os, time; open({str(said)!r}, 'w').write(str(os.getpid())); time.sleep(3600)"
    outer = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {inner!r}], start_new_session=True)\n"
        "time.sleep(3600)\n"
    )
    watch = lambda: "it is there" if said.exists() and said.read_text() else ""  # noqa: E731
    ended = run_watched([sys.executable, "-c", outer], watch=watch)
    assert ended.status is None and ended.killed_for == "it is there"
    patience = Patience(10.0)
    while not has_ended(int(said.read_text())):
        assert patience.left()
        time.sleep(0.05)


def test_the_campaign_names_the_error_of_ranks_that_failed():
    output = (
        "W1129 torch/distributed/run.py: warning\n"
        "[rank0]: Traceback (most recent call last):\n"
        "[rank0]:   File 'x.py', line 1, in main\n"
        "[rank0]: NotImplementedError: units of this torch have one group only\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
        "====\n"
    )
    assert "one group only" in error_in(output)
    assert error_in("a\nb\nc\nd") == "b | c | d"


def test_the_campaign_goes_on_on_another_machine_from_what_was_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage, ran = counting(["a 8192", "fails", "b 8192"])
    first, _ = counting(["a 8192"])
    run_stage(first, tmp_path / "lines", again=False, device="cpu")
    keep(tmp_path / "lines", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LINES]
    resume(tmp_path / "out" / LINES, tmp_path / "other")
    resume(tmp_path / "out" / LINES, tmp_path / "other")
    run_stage(stage, tmp_path / "other", again=False, device="cpu")
    assert ran == {"a 8192": 0, "fails": 1, "b 8192": 1}
    assert len(read_lines(tmp_path / "other" / "speed.jsonl")) == 3
    with pytest.raises(ValueError, match="name it, or leave --resume out"):
        resume(tmp_path / "nowhere", tmp_path / "other")


def test_a_share_of_the_candidates_is_every_nth_of_them(monkeypatch):
    autotuner = pytest.importorskip("triton.runtime.autotuner")
    tuner = SimpleNamespace(cache={"a": 1})
    monkeypatch.setattr(autotuner.Autotuner, "prune_configs", lambda self, kwargs: list("abcde"))
    for part, parts, share in ((0, 2, "ace"), (1, 2, "bd"), (7, 1000, "c")):
        with candidates(part, parts):
            assert autotuner.Autotuner.prune_configs(tuner, {}) == list(share)
    assert autotuner.Autotuner.prune_configs(tuner, {}) == list("abcde") and tuner.cache == {}


def test_a_stage_of_the_campaign_that_cannot_start_is_passed_over(tmp_path, capsys):
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    assert supervise.supervise("kernels", 60.0, tmp_path, command=command) == 1
    (line,) = read_lines(tmp_path / "kernels.jsonl")
    assert line["case"] == "start" and "status 3" in line["failed"]


def test_the_campaign_holds_kernels_of_other_mixers_to_the_reference():
    for case in other_kernels.cases("cpu", length=96):
        result = case.run()
        assert result["right"] and result["kernel"], (case.name, result)


def test_the_campaign_times_picked_latents_and_their_indexer():
    result = latents.picked_latents("cpu", 256, latents.LatentSizes(2, 24, 8, 2, 16, 20), 4)()
    assert result["kernel"] == "ReferenceSparseAttention" and result["index_kernel"] is False
    for name in ("indexer", "forward", "backward"):
        assert result[f"{name}_ms"] > 0 and result[f"{name}_tflops"] > 0


def test_the_campaign_calls_flex_attention_up_to_where_a_gpu_is_needed(monkeypatch):
    monkeypatch.setattr(speed, "HEADS", Heads(2, 1, 16))
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        speed._flex(128, "cpu", 64)()


def test_ranks_of_the_campaign_that_hang_end_before_their_stage():
    """With 15 seconds to start, so that their own error is the line."""
    for stage in STAGES:
        module = {"shared": shared, "overlap": overlap}.get(stage.name)
        if module is not None:
            assert stage.seconds + supervise.GRACE >= module.SECONDS + 15


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama ring 2 ranks", "gemma4 all-gather 2 ranks"])
def test_ranks_of_the_campaign_that_share_a_device_equal_one(name, monkeypatch):
    monkeypatch.setattr(shared, "SECONDS", 600.0)  # other tests may run beside
    (case,) = (case for case in shared.cases("cpu") if case.name == name)
    result = case.run()
    assert result["right"] and result["compared"] > 10, result


def test_the_campaign_reads_overlap_off_a_trace():
    events = [
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 0.0, "dur": 4.0},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 3.0, "dur": 7.0},
        {"cat": "kernel", "name": "attention", "ts": 5.0, "dur": 3.0},
        {"cat": "cpu_op", "name": "other", "ts": 0.0, "dur": 9.0},
    ]
    shown = overlap.shown({"traceEvents": events})
    assert shown == {"copies_ms": 0.01, "kernels_ms": 0.003, "beside": 0.3}

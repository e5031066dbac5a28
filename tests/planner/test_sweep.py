"""Scaling runs: what is written, and what is read back from logs, whole or broken."""

import json
from dataclasses import asdict, replace

import pytest
from torch.utils.tensorboard import SummaryWriter

from dtcp.plan import __main__ as command
from dtcp.plan.collect import CollectedRun, collect, refit
from dtcp.plan.sweep import SweepPoint, sweep_points
from dtcp.planner.cluster import KINDS, cluster_of

LOGGED = {
    "throughput(tokens/s)": 2048.0,
    "time_metrics/end_to_end(s)": 0.5,
    "memory/max_reserved(GiB)": 0.6,
    "context_parallel/received(bytes)": 1e6,
    "context_parallel/expected(bytes)": 1e6,
}
PLANNED = {
    "ranks": 2,
    "seq_len": 1024,
    "tokens": 1024,
    "tokens_per_second": 4096.0,
    "seconds": 0.25,
    "memory_gib": 0.1,
    "cp_bytes": 1_200_000,
    "fsdp_bytes": 2_000_000,
    "matmul_flops": 4 * 10**9,
    "mixer_flops": 10**9,
    "model_flops": 5e9,
}


@pytest.fixture
def swept(tmp_path):
    """A sweep of two runs, as --sweep writes it, before they ran."""
    runs = {"ranks1_seq1024": {**PLANNED, "ranks": 1, "cp_bytes": 0}, "ranks2_seq1024": PLANNED}
    cluster = asdict(replace(KINDS["H100"], gpus=2))
    plan = {"model": "tiny", "documents": "single", "cluster": cluster, "runs": runs}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return tmp_path


def log(folder, steps=5, **changes):
    """A run's log; the first two steps are slow, as those are that compile."""
    with SummaryWriter(str(folder / "tb")) as writer:
        for step in range(1, steps + 1):
            for tag, value in {**LOGGED, **changes}.items():
                if value is not None:
                    slow = 100.0 if step <= 2 and "end_to_end" in tag else 1.0
                    writer.add_scalar(tag, value * slow, step)


def refused(capsys, folder):
    """What --collect says of a folder that it refuses."""
    assert command.run_planner(["--collect", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    return err


def test_a_sweep_of_the_planner_has_a_command_and_a_plan_of_each_run(capsys, tmp_path):
    options = ("--ranks", "1,2", "--seq-len", "1024", "--out", str(tmp_path), "--steps", "6")
    assert command.run_planner(["--config", "llama_tiny", "--sweep", "weak", *options]) == 0
    lines = (tmp_path / "runs.sh").read_text().splitlines()
    assert "--nproc-per-node 2 train.py --config llama_tiny" in lines[2]
    assert "--training.seq_len 2048" in lines[2] and "--dtcp.forecast" in lines[2]
    runs = json.loads((tmp_path / "plan.json").read_text())["runs"]
    assert runs.keys() == {"ranks1_seq1024", "ranks2_seq2048"}
    assert runs["ranks2_seq2048"]["cp_bytes"] > 0 == runs["ranks1_seq1024"]["cp_bytes"]


def test_a_strong_sweep_of_the_planner_keeps_the_row():
    assert sweep_points("strong", [1, 4], 512) == [SweepPoint(1, 512), SweepPoint(4, 512)]


def test_a_sweep_of_the_planner_is_collected_beside_its_plan(capsys, swept):
    log(swept / "ranks1_seq1024", **{"context_parallel/received(bytes)": 0.0})
    log(swept / "ranks2_seq1024")
    assert command.run_planner(["--collect", str(swept)]) == 0
    out = capsys.readouterr().out
    assert "ranks2_seq1024" in out and "1.000" in out and "refitted" in out
    page = (swept / "collected.html").read_text()
    assert page.count("<svg") == 1 and "Scaling runs: tiny" in page
    found = collect(swept)
    # Medians of the steps that do not compile.
    assert found.runs[1].measured["seconds"] == pytest.approx(0.5)
    assert cluster_of(str(swept / "cluster.json")) == found.refitted


def test_a_run_of_a_sweep_without_a_log_is_named(capsys, swept):
    log(swept / "ranks2_seq1024")
    assert command.run_planner(["--collect", str(swept)]) == 0
    assert "ranks1_seq1024       has no log" in capsys.readouterr().out


def test_refitted_rates_of_the_planner_are_those_that_runs_had():
    true = replace(KINDS["H100"], matmul=0.4, mixer=0.2, inside=1e9)
    runs = []
    for ranks in (1, 2, 4, 8):
        planned = {
            "matmul_flops": 8e13 / ranks,
            "mixer_flops": 3e13 / ranks**0.5,
            "fsdp_bytes": 1e7 * (ranks - 1),
        }
        moved = 2e7 * (ranks - 1)
        seconds = planned["matmul_flops"] / true.flops / true.matmul
        seconds += planned["mixer_flops"] / true.flops / true.mixer
        seconds += (moved + planned["fsdp_bytes"]) / true.inside
        runs.append(CollectedRun(f"{ranks}", planned, {"cp_bytes": moved, "seconds": seconds}))
    found = refit(KINDS["H100"], runs)
    for name in ("matmul", "mixer", "inside"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6)


def test_a_folder_that_is_no_sweep_is_refused(capsys, tmp_path):
    assert "A sweep's folder has its plan.json" in refused(capsys, tmp_path)
    (tmp_path / "plan.json").write_text("{")
    assert "A sweep's plan is JSON that --sweep writes" in refused(capsys, tmp_path)
    (tmp_path / "plan.json").write_text("[1]")
    assert "A sweep's plan is JSON that --sweep writes" in refused(capsys, tmp_path)


def test_a_sweeps_plan_that_lacks_a_number_is_refused(capsys, swept):
    assert "A sweep is collected from its runs' logs, got none" in refused(capsys, swept)
    plan = json.loads((swept / "plan.json").read_text())
    del plan["runs"]["ranks2_seq1024"]["matmul_flops"]
    (swept / "plan.json").write_text(json.dumps(plan))
    assert "without ranks2_seq1024: matmul_flops" in refused(capsys, swept)


@pytest.mark.parametrize(
    ("steps", "changes", "said"),
    [
        (2, {}, "A run is measured after its first 2 steps, which compile, got 2 steps in"),
        (5, {"memory/max_reserved(GiB)": None}, "A run of a sweep logs memory/max_reserved(GiB)"),
        (5, {"time_metrics/end_to_end(s)": float("nan")}, "A run's log has finite numbers"),
        (5, {"time_metrics/end_to_end(s)": 0.0}, "A run's log has finite numbers"),
    ],
    ids=["short", "lacking", "nan", "zero"],
)
def test_a_broken_log_of_a_sweep_is_refused_by_name(capsys, swept, steps, changes, said):
    log(swept / "ranks2_seq1024", steps, **changes)
    err = refused(capsys, swept)
    assert said in err and "ranks2_seq1024" in err


def test_a_log_of_a_sweep_that_is_no_log_is_refused_by_name(capsys, swept):
    folder = swept / "ranks2_seq1024"
    folder.mkdir()
    (folder / "events.out.tfevents.1").write_bytes(b"no log at all")
    assert "A run of a sweep logs" in refused(capsys, swept)

"""What a step's line says: numbers per step, the ratio to a forecast, and a step that is off."""

import math
import time
from collections import deque
from types import SimpleNamespace

import pytest

from dtcp._torch.fakes import fake_ranks
from dtcp.distributed.ledger import LEDGER
from dtcp.pretrain.expected import warning
from dtcp.pretrain.progress import Progress


def progress():
    """The lines of a run of one rank, without the run."""
    made = object.__new__(Progress)
    made.steps, made.losses, made.is_held, made.expected = 9, {}, True, 0
    made._counted_from = 0
    made._traffic, made._has_compiled, made._seconds = LEDGER.snapshot(), False, deque()
    made.parallel_dims = SimpleNamespace(
        dp_replicate=1, dp_shard=1, cp=1, get_optional_mesh=lambda name: None
    )
    made.model_parts, made.data_loading_times, made.row_work = [], [0.5], []
    made.ranks_per_node = 0
    made.ntokens_since_last_log, made.time_last_log = 64, time.perf_counter() - 1
    made.device_memory_monitor = SimpleNamespace(
        get_peak_stats=lambda: SimpleNamespace(max_reserved_gib=1.0),
        reset_peak_stats=lambda: None,
    )
    made.logged = {}
    made.logger = SimpleNamespace(log=lambda metrics, step: made.logged.update(metrics))
    return made


def step_line(capsys, received, expected):
    """What a step prints that received so many bytes where so many were expected."""
    made = progress()
    LEDGER.record("dtcp::forecast_line", received=received)
    made.expected = expected
    with fake_ranks(2, 0):
        made.log(1, 0.5, math.nan, 0.1)
    assert made.logged.get("context_parallel/expected(bytes)", 0) == expected
    return capsys.readouterr().out


@pytest.mark.parametrize("received", [990_000, 1_000_000, 1_010_000])
def test_a_step_near_its_forecast_says_the_ratio(capsys, received):
    said = step_line(capsys, received, 1_000_000)
    assert f"{received / 1e6:.3f} of what is expected" in said and "warning" not in said


@pytest.mark.parametrize("received", [0, 989_000, 1_011_000, 3_000_000])
def test_a_step_that_leaves_its_forecast_says_so(capsys, received):
    said = step_line(capsys, received, 1_000_000)
    assert f"{received / 1e6:.3f} of what is expected" in said
    assert f"got {received:,} received for cp where 1,000,000 were expected" in said
    assert said.count("\n") == 2


def test_a_step_that_moves_what_was_not_forecast_at_all_says_so(capsys):
    said = step_line(capsys, 1000, 0)
    assert "of what is expected" not in said and "got 1,000 received" in said


def test_nothing_received_where_nothing_was_forecast_is_no_warning():
    assert warning(0, 0) == "" and warning(5, 0)


@pytest.mark.parametrize("start", ["resumed", "validated", "logged"])
def test_numbers_of_a_step_are_those_of_the_steps_since_they_were_last_counted(capsys, start):
    """Lines that follow a resume, a validation between two lines, or another line."""
    made = progress()
    with fake_ranks(2, 0):
        if start == "resumed":
            made.count_from(40)
        elif start == "validated":
            made.log(1, 0.5, math.nan, 0.1)
            LEDGER.record("dtcp::forecast_line", received=777)
            made.log_validation(0.5, 40)
        else:
            made.log(40, 0.5, math.nan, 0.1)
        made.time_last_log = time.perf_counter() - 50
        for _ in range(10):
            LEDGER.record("dtcp::forecast_line", received=1000)
            made.ntokens_since_last_log += 64
            made.data_loading_times.append(0.5)
        made.log(50, 0.5, math.nan, 0.1)
    assert made.logged["context_parallel/received(bytes)"] == 1000
    assert made.logged["time_metrics/data_loading(s)"] == 0.5
    assert made.logged["time_metrics/end_to_end(s)"] == pytest.approx(5, rel=0.1)
    assert made.logged["throughput(tokens/s)"] == pytest.approx(640 / 50, rel=0.1)

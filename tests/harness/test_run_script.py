"""Scripts end as they would without the harness, and a busy machine has more time."""

import pytest

from tests.harness import patience, run_script, spmd
from tests.harness.patience import Patience, patience_after
from tests.harness.run_script import run_forked, run_python

REDUCES = """
import os, sys
import torch
from torch import distributed as dist

dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: {total} {sys.argv[1:]}")
"""

FAILS_ON_RANK_1 = """
import os, time

if os.environ["RANK"] == "1":
    raise KeyError("lost my way")
time.sleep(1000)
"""


@pytest.fixture
def script(tmp_path):
    """Write a script; returns its path."""

    def write(text):
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write


def test_forked_ranks_are_those_of_torchrun(script):
    ended = run_forked(script(REDUCES), "--some", "3", ranks=2)
    assert ended.code == 0, ended.errors
    ranks = [f"rank {rank} of 2: 3 ['--some', '3']" for rank in (0, 1)]
    assert sorted(ended.printed.splitlines()) == ranks


def test_a_forked_rank_that_fails_ends_the_others(script, monkeypatch):
    monkeypatch.setattr(spmd, "GRACE", 0.2)  # for the other, which waits for ever
    ended = run_forked(script(FAILS_ON_RANK_1), ranks=2)
    assert ended.code == 1
    assert ended.errors.count("KeyError: 'lost my way'") == 1


@pytest.mark.parametrize(
    ("text", "code", "printed"),
    [
        ("import os; print('RANK' in os.environ)", 0, "False\n"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit(None)", 0, ""),
        ("import sys; sys.exit('no')", 1, ""),
    ],
)
def test_a_script_ends_forked_as_it_does_in_a_process_of_its_own(script, text, code, printed):
    forked, fresh = run_forked(script(text), ranks=0), run_python(str(script(text)))
    assert (forked.code, forked.printed) == (fresh.code, fresh.printed) == (code, printed)
    assert forked.errors == fresh.errors


HANGS = """
import sys, time

print("here", flush=True)
open(sys.argv[1], "w").close()
time.sleep(1000)
"""


def run_fresh(path, *arguments, ranks, seconds):
    return run_python(str(path), *arguments, seconds=seconds)


@pytest.mark.parametrize("run", [run_forked, run_fresh])
def test_a_script_that_hangs_is_found_by_the_clock(run, script, tmp_path, monkeypatch):
    path, asleep = script(HANGS), tmp_path / "asleep"
    monkeypatch.setattr(run_script, "Patience", patience_after(asleep.exists))
    with pytest.raises(TimeoutError, match=r"still ran after 0\.5 s:\nhere"):
        run(path, str(asleep), ranks=0, seconds=0.5)


def test_seconds_pass_more_slowly_where_more_processes_want_the_cores(monkeypatch):
    clock = iter((0.0, 30.0, 90.0, 1000.0))
    monkeypatch.setattr(patience.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(patience.os, "cpu_count", lambda: 2)
    load = iter((0.5, 40.0, 2.0))
    monkeypatch.setattr(patience.os, "getloadavg", lambda: (next(load), 0.0, 0.0))
    waits = Patience(60.0)
    assert waits.left() == 30.0  # a quiet machine
    assert waits.left() == 27.0  # 20 processes for each core
    assert waits.left() == 0.0

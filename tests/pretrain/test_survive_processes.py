"""Rows E2, E7, E8, E10: what listens, who writes, what ends whom, and what starts again.

One process plays the launcher, with ranks that do next to nothing, and goes through all cases
(tests/harness/launched_cases.py): it is forked, as the ranks are. Runs of train.py that
stop and go on are in test_survive_runs.py.
"""

import json
import os
import re
import socket
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from dtcp.pretrain import attempt, folder_lock
from dtcp.pretrain.folder_lock import FolderLock, refuse_held
from tests.harness.patience import Patience, slowness
from tests.harness.run_script import run_forked
from tests.harness.started import forked_script

Cases = dict[str, tuple[int, list[str]]]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """What became of each launch of three ranks: its exit code and what was said, in order."""
    folder = tmp_path_factory.mktemp("cases")
    return run_cases(
        folder, "listening", "restarted", "refused_at_the_start", "stopped_early", "ended_early"
    )


@pytest.fixture(scope="module")
def more_cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    folder = tmp_path_factory.mktemp("cases")
    return run_cases(folder, "two_causes", "frozen", "refused", "absent", "alive", "slow_to_stop")


def run_cases(folder: Path, *names: str) -> Cases:
    ran = run_forked("tests/harness/launched_cases.py", str(folder), *names, ranks=0)
    assert ran.code == 0, ran.output
    parts = re.findall(r"^case (\w+)\n(.*?)^exit (\d+)$", ran.printed, re.MULTILINE | re.DOTALL)
    without = re.compile(r" \(traceback: .*\)$", re.MULTILINE)
    return {case: (int(code), without.sub("", text).splitlines()) for case, text, code in parts}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/net is Linux's")
def test_survive_E2_nothing_listens_beyond_the_machine(cases):
    """Neither the launcher's store, nor that of the ranks, nor gloo, on any address but 127.*."""
    code, lines = cases["listening"]
    assert code == 0
    # The addresses of /proc/net are written backwards; in IPv6, 127.* stands in the last word.
    loopback = re.compile(r"listens tcp6? (0{8}0{8}F{4}0{4})?[0-9A-F]{6}7F$")
    assert len(lines) >= 4 and [line for line in lines if not loopback.match(line)] == []


def test_survive_E10_ranks_start_again_after_one_was_killed(cases):
    code, lines = cases["restarted"]
    assert code == 0
    assert lines[:2] == [
        "error: rank 1 was killed by SIGKILL.",
        "restart     1 of 2, from the last checkpoint",
    ]
    assert sorted(lines[2:]) == [f"rank {rank} went on: True" for rank in range(3)]


@pytest.mark.slow
def test_survive_E10_each_attempt_says_its_cause(more_cases):
    """Once, and nothing of the ranks that only waited."""
    code, lines = more_cases["two_causes"]
    error = "error: x is y, got x=1: set it to 2."
    assert code == 1
    assert lines == [error, "restart     1 of 1, from the last checkpoint", error]


@pytest.mark.slow
def test_survive_E7_a_refusal_of_rank_0_is_that_of_all(more_cases):
    code, lines = more_cases["refused"]
    assert (code, lines) == (1, ["error: a folder has one run, got two"])


def test_survive_E10_a_refusal_before_the_first_step_is_not_tried_again(cases):
    error = "error: x is y, got x=1: set it to 2."
    assert cases["refused_at_the_start"] == (1, [error])


def test_survive_E8_ranks_that_end_before_they_listen_are_not_called_lost(cases):
    assert cases["stopped_early"] == (128 + 15, ["stopped by SIGTERM; ranks are ended"])


@pytest.mark.slow
def test_survive_E10_a_rank_that_does_not_come_is_named(more_cases):
    code, lines = more_cases["absent"]
    assert code == 1 and "got none of rank 1 in time" in lines[0]


def test_survive_E10_a_rank_that_ends_before_it_has_met_the_others_is_not_waited_for(cases):
    code, lines = cases["ended_early"]
    error, waited = lines
    assert code == 1 and error == "error: x is y, got x=1: set it to 2."
    assert re.match(r"rank [02] then failed too: .* got rank 1 on \S+ that has ended: x is", waited)


def test_survive_E10_hosts_where_gloo_would_listen_to_itself_are_refused(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "127.0.1.1")
    assert attempt.gloo_address() == "127.0.1.1"
    monkeypatch.setattr(socket, "getaddrinfo", mock.Mock(side_effect=socket.gaierror))
    assert attempt.gloo_address() == attempt.LOOPBACK
    attempt.refuse_loopback({"a": "127.0.1.1"})  # one host, whose ranks all are there
    attempt.refuse_loopback({"a": "10.0.0.1", "b": "fe80::1%eth0"})
    for deaf in ("127.0.1.1", "::1"):
        with pytest.raises(ValueError, match=f"got b, where gloo listens on {deaf}, .* set GLOO_S"):
            attempt.refuse_loopback({"a": "10.0.0.1", "b": deaf})
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert attempt.gloo_address() == ""


def test_never_silent_a_host_whose_version_says_hello_in_another_way():
    hellos = [json.dumps(["id", "a", 7, "10.0.0.1"]), json.dumps(["id", "b", 8])]
    assert attempt.read_hellos(hellos[:1]) == [("a", 7, "10.0.0.1")]
    with pytest.raises(ValueError, match="got rank 1 on b with another version of dtcp"):
        attempt.read_hellos(hellos)


@pytest.mark.slow
def test_survive_E10_a_rank_that_is_stopped_is_named_last(more_cases):
    code, lines = more_cases["frozen"]
    assert code == 1 and len(lines) == 1
    assert re.match(r"error: rank 1 \(process \d+ on .*\) gave no sign of life any more", lines[0])


@pytest.mark.slow
def test_survive_E10_ranks_that_are_all_alive_are_not_called_lost(more_cases):
    code, lines = more_cases["alive"]
    assert code == 1 and len(lines) == 1 and "ranks lost each other, and all are alive" in lines[0]


@pytest.mark.slow
def test_survive_E8_ranks_that_do_not_stop_in_time_are_killed(more_cases):
    assert more_cases["slow_to_stop"] == (128 + 15, ["stopped by SIGTERM; ranks are ended"])


# E7: orphans.

ORPHANS = """
import os, sys, time
from dtcp.pretrain import launch as launcher

def wait():
    print(f"rank {os.getpid()}\\n", end="", flush=True)
    time.sleep(600)

if sys.argv[1] == "processes":
    launcher.can_fork = lambda: False
wait_again = "from dtcp.pretrain.launch import end_with_launcher as e; e(); " + (
    "import os, time; print(f'rank {os.getpid()}', flush=True); time.sleep(600)"
)
launcher.launch(launcher.Ranks(2, "cpu"), wait, ("-c", wait_again))
"""


@pytest.mark.slow_where(lambda kind: kind == "processes")
@pytest.mark.parametrize("kind", ["forked", "processes"])
def test_survive_E7_ranks_die_with_a_launcher_that_is_killed(kind, tmp_path):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    with forked_script(script, kind) as launcher:
        ranks: list[int] = []
        patience = Patience(120)
        while len(ranks) < 2 and patience.left():
            time.sleep(0.02)
            ranks = [int(pid) for pid in re.findall(r"^rank (\d+)\n", launcher.said(), re.M)]
        assert len(ranks) == 2, launcher.said()
    patience = Patience(20)
    while any(map(runs, ranks)) and patience.left():
        time.sleep(0.02)
    assert not any(map(runs, ranks))


def runs(pid: int) -> bool:
    """Whether the process is there, and more than a record of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# E7: one writer per folder.

HOLDER = """
import sys, time
from pathlib import Path

from dtcp.pretrain.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_survive_E7_a_folder_has_one_writer_and_a_dead_one_is_replaced(tmp_path):
    script = tmp_path / "holder.py"
    script.write_text(HOLDER)
    with forked_script(script, str(tmp_path)) as other:
        other.wait_for("held\n")
        pid = other.process.pid
        refusal = f"{tmp_path}, which process {pid} on {socket.gethostname()}"
        for look in (FolderLock, refuse_held):
            with pytest.raises(ValueError, match=re.escape(refusal)):
                look(tmp_path)
    # It was killed.
    refuse_held(tmp_path)
    lock = FolderLock(tmp_path)
    assert lock.taken_over is not None and f"process {pid}" in lock.taken_over
    lock.release()
    assert FolderLock(tmp_path).taken_over is None


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life ten times as fast as usual, on a quiet machine."""
    beat = 0.2 * slowness()
    monkeypatch.setattr(folder_lock, "BEAT", beat)
    monkeypatch.setattr(folder_lock, "SILENCE", 4 * beat)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """A file system without flock."""
    monkeypatch.setattr(folder_lock, "_flock", lambda file: None)


def test_survive_E7_without_locks_a_writer_is_known_by_its_signs_of_life(no_locks, tmp_path):
    lock = FolderLock(tmp_path)
    with pytest.raises(ValueError, match=f"which process {os.getpid()}"):
        FolderLock(tmp_path)
    lock.release()
    assert FolderLock(tmp_path).taken_over is None


@pytest.mark.parametrize("locks", [True, False])
def test_survive_E7_a_writer_of_another_host_is_watched(locks, tmp_path, request):
    request.getfixturevalue("quick" if locks else "no_locks")
    elsewhere = folder_lock.Holder(host="elsewhere", boot="0", pid=1)
    (tmp_path / folder_lock.NAME).write_text(json.dumps(vars(elsewhere)))
    lock = FolderLock(tmp_path)  # silent: gone
    assert lock.taken_over is not None and "process 1 on elsewhere" in lock.taken_over


def test_survive_E7_a_writer_that_stood_still_notices_that_it_was_replaced(no_locks, tmp_path):
    lock = FolderLock(tmp_path)
    lock.check()
    usurper = folder_lock.Holder(host="elsewhere", boot="0", pid=1)
    patience = Patience(20)
    while not replaced(lock) and patience.left():
        # Again and again, as every writer does: the other may have been about to write, too.
        (tmp_path / folder_lock.NAME).write_text(json.dumps(vars(usurper)).ljust(512))
        time.sleep(0.02)
    with pytest.raises(ValueError, match="process 1 on elsewhere"):
        lock.check()


def test_survive_E7_a_writer_asks_the_server_who_replaced_it(no_locks, tmp_path, monkeypatch):
    """A network file system reads an open file off this host's copy, which the other did not write.

    Here that is a file of the other's own, in the place of this one.
    """
    other = tmp_path / "of_the_other"

    def put_in_place(_=None):
        usurper = folder_lock.Holder(host="elsewhere", boot="0", pid=1)
        other.write_text(json.dumps(vars(usurper)).ljust(512))
        os.replace(other, tmp_path / folder_lock.NAME)

    lock, patience = FolderLock(tmp_path), Patience(20)
    put_in_place()
    while not replaced(lock) and patience.left():
        time.sleep(0.02)
    with pytest.raises(ValueError, match="process 1 on elsewhere"):
        lock.check()
    (tmp_path / folder_lock.NAME).unlink()
    monkeypatch.setattr(time, "sleep", put_in_place)  # of two that come at once
    with pytest.raises(ValueError, match="process 1 on elsewhere"):
        FolderLock(tmp_path)


def replaced(lock: FolderLock) -> bool:
    try:
        lock.check()
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "\x00" * 512])
def test_survive_E7_a_lock_that_was_cut_short_is_nobodys(text, tmp_path):
    (tmp_path / folder_lock.NAME).write_text(text)
    FolderLock(tmp_path).release()


def test_survive_E7_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--dump_folder .*file"):
        FolderLock(tmp_path / "file")

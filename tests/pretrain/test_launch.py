"""Ranks that a launcher starts: forked or as processes of their own, and how they end."""

import os
import re
import signal
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from dtcp.pretrain.launch import Agent, handled_signals
from dtcp.pretrain.processes import Gate
from tests.harness.run_script import run_forked

SCRIPT = """
import multiprocessing, os, signal, sys, time
import torch
from dtcp.pretrain import launch as launcher

def forked():
    print("rank", launcher.rank(), "has threads:", torch.get_num_threads(), flush=True)
    return 0

def together():
    parent = os.getppid()
    with open(f"/proc/{parent}/task/{parent}/children") as children:
        print("begins with others:", len(children.read().split()) == 2, flush=True)
    return 0

def failed():
    return 3 if launcher.rank() == 1 else time.sleep(600)

def killed():
    os.kill(os.getpid(), signal.SIGKILL) if launcher.rank() == 1 else time.sleep(600)

def stopped():
    os.kill(os.getppid(), signal.SIGTERM) if launcher.rank() == 1 else None
    time.sleep(600)

def launch(work, *command):
    print("case", work.__name__, flush=True)
    print("exit", launcher.launch(launcher.Ranks(2, "cpu"), work, command), flush=True)

def processes():
    sys.exit("a rank was forked")

def unforked():
    print("a rank began")

def interrupted():
    print("a rank began")

def no_more():
    raise BlockingIOError(11, "no more processes")

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(100):  # another thread may have taken the signal: it does not end a sleep
        time.sleep(0.01)
    return fork()

def launch_but(work, second):
    forks = iter((fork, second))
    os.fork = lambda: next(forks)()
    try:
        launch(work)
    except ValueError as error:
        print(error, "exit 1", sep="\\n", flush=True)
    for child in multiprocessing.active_children():
        child.join()
    os.fork = fork

# A job in a shell's background is started deaf to it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Errors in their places; and the launcher's own choice of threads. Unbuffered, a line's end is a
# write of its own, and the lines of two ranks run together.
os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
for name in ("OMP_NUM_THREADS", "PYTHONUNBUFFERED"):
    os.environ.pop(name, None)
for work in (forked, failed, killed, stopped):
    launch(work)
fork = os.fork
os.fork = lambda: time.sleep(0.5) or fork()  # the first has time to run ahead
launch(together)
launch_but(unforked, no_more)
launch_but(interrupted, interrupt)
launcher.can_fork = lambda: False
whole_line = "import os; print('rank ' + os.environ['RANK'] + ' is a process\\\\n', end='')"
launch(processes, "-c", whole_line)
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    """What became of each launch: its exit code and the lines of its ranks, in order."""
    script = tmp_path_factory.mktemp("launches") / "script.py"
    script.write_text(SCRIPT)
    ran = run_forked(script, ranks=0)
    assert ran.code == 0, ran.output
    parts = re.findall(r"^case (\w+)\n(.*?)^exit (\d+)$", ran.printed, re.MULTILINE | re.DOTALL)
    return {case: (int(code), sorted(text.splitlines())) for case, text, code in parts}


def test_forked_ranks_share_the_cores(cases):
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert cases["forked"] == (0, [f"rank {rank} has threads: {threads}" for rank in range(2)])


def test_forked_ranks_begin_when_all_are_forked(cases):
    """One that is forked while another calls the launcher may find the resolver locked for good."""
    assert cases["together"] == (0, ["begins with others: True"] * 2)


def test_where_one_cannot_be_forked_none_begins_and_the_limits_are_named(cases):
    code, lines = cases["unforked"]
    assert code == 1 and len(lines) == 1
    named = "processes, memory, .* got ranks=2 and BlockingIOError: .*no more processes: .*ulimit"
    assert re.search(named, lines[0]), lines


def test_a_launcher_that_is_interrupted_while_it_forks_lets_none_begin(cases):
    """Of signals that one thread blocks, another hears; the handler raises in the first."""
    assert cases["interrupted"] == (128 + 2, ["stopped by SIGINT; ranks are ended"])


def test_a_rank_that_fails_takes_the_others_along(cases):
    assert cases["failed"] == (3, [])


def test_a_rank_that_is_killed_is_named(cases):
    assert cases["killed"] == (1, ["error: rank 1 was killed by SIGKILL."])


def test_a_launcher_that_is_stopped_ends_its_ranks(cases):
    assert cases["stopped"] == (128 + 15, ["stopped by SIGTERM; ranks are ended"])


def test_ranks_that_cannot_be_forked_are_processes_of_their_own(cases):
    assert cases["processes"] == (0, [f"rank {rank} is a process" for rank in range(2)])


def test_ranks_are_forked_deaf_to_what_the_launcher_heeds(monkeypatch):
    """Until they have handlers of their own; processes of their own would stay deaf."""

    def masked():
        return set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    monkeypatch.setattr(LocalElasticAgent, "_start_workers", lambda *_: {0: masked()})
    agent, before = Agent.__new__(Agent), masked()
    for entrypoint, heard in ((print, set()), ("python", {*handled_signals()} - before)):
        agent.gate = Gate()
        group = SimpleNamespace(spec=SimpleNamespace(entrypoint=entrypoint))
        assert {*handled_signals()} - agent._start_workers(group)[0] == heard
        assert masked() == before
    assert handled_signals()

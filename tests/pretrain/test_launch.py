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
import os, signal, sys, time
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
os.fork = fork
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

    monkeypatch.setattr(LocalElasticAgent, "_start_workers", lambda *_: masked())
    agent, before = Agent.__new__(Agent), masked()
    for entrypoint, heard in ((print, set()), ("python", {*handled_signals()} - before)):
        agent.gate = Gate()
        group = SimpleNamespace(spec=SimpleNamespace(entrypoint=entrypoint))
        assert {*handled_signals()} - agent._start_workers(group) == heard
        assert masked() == before
    assert handled_signals()

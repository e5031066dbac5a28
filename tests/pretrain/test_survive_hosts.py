"""Rows E7, E10: two hosts with an agent each; one is killed, stopped or cut off, and both go on."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtcp.torchtitan import compat as compat

import pytest

from dtcp.pretrain.progress import Progress
from dtcp.pretrain.trainer import Trainer
from tests.harness.patience import Patience, slowness
from tests.harness.train_run import losses
from tests.harness.two_hosts import Host, Started, missing_for_hosts, two_hosts
from tests.pretrain.test_train import micro

STEPS = 16
TIMEOUT = 10.0
"""Seconds of a quiet machine that ranks wait for each other in a step."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_for_hosts()), reason=f"needs {missing_for_hosts()}"),
]


class Unhurried(Progress):
    """Steps that last long enough to be interrupted."""

    @dataclass(kw_only=True, slots=True)
    class Config(Progress.Config):
        pass

    def log(self, *args: Any, **kwargs: Any) -> None:
        super().log(*args, **kwargs)
        time.sleep(0.3)


def unhurried() -> Trainer.Config:
    config = micro()
    config.training.steps = STEPS
    config.lr_scheduler.total_steps = STEPS
    config.checkpoint.interval, config.validator.enable = 2, False
    config.metrics = Unhurried.Config(log_freq=1, enable_tensorboard=True)
    return config


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as pair:
        yield pair


def start(hosts: tuple[Host, Host], folder: Path, *, restarts: int = 0) -> list[Started]:
    """An agent on each host, with a rank each; they meet at the first host."""
    port = 20_000 + os.getpid() % 10_000
    endpoint = f"{hosts[0].address}:{port}"
    seconds = str(round(TIMEOUT * slowness()))
    agents = []
    for host in hosts:
        agent = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
        meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test")
        own = ("--local-addr", host.address, "--max-restarts", f"{restarts}")
        own += ("--rdzv-conf", f"is_host={host is hosts[0]}")
        command = ("train.py", "--module", "tests.pretrain.test_survive_hosts")
        options = ("--config", "unhurried", "--dump_folder", str(folder))
        limits = ("--comm.train_timeout_seconds", seconds, "--comm.init_timeout_seconds", "600")
        agents.append(
            host.start(sys.executable, *agent, *meeting, *own, *command, *options, *limits)
        )
    return agents


def ranks_of(agent: Started) -> list[int]:
    """Process ids of the ranks that an agent has started."""
    pid = agent.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in children.split()]


def all_losses(agents: list[Started]) -> dict[int, float]:
    """Of each step; a step that was done twice lost the same."""
    found: dict[int, float] = {}
    for agent in agents:
        for step, loss in losses(agent.said()).items():
            assert found.setdefault(step, loss) == loss
    return found


def errors_of(agent: Started) -> list[str]:
    return re.findall(r"^error: .*", agent.said(), re.MULTILINE)


@pytest.fixture(scope="module")
def undisturbed(hosts, tmp_path_factory) -> dict[int, float]:
    """The losses of a run that nothing happens to."""
    agents = start(hosts, tmp_path_factory.mktemp("undisturbed"))
    assert [agent.wait(300) for agent in agents] == [0, 0], agents[0].said()
    return all_losses(agents)


def rank_0(agents: list[Started]) -> int:
    """The agent whose rank prints: they are numbered in the order in which they come."""
    while True:
        for number, agent in enumerate(agents):
            if "step     1/" in agent.said():
                return number
            assert agent.process.poll() is None, agent.said()
        time.sleep(0.05)


def go_on(hosts, folder: Path, undisturbed: dict[int, float], before: list[Started]) -> None:
    """A new start ends where the undisturbed run ended."""
    agents = start(hosts, folder)
    assert [agent.wait(300) for agent in agents] == [0, 0], agents[0].said()
    assert "loaded" in agents[0].said() + agents[1].said()
    assert all_losses([*before, *agents]) == undisturbed


def test_survive_E7_E10_an_agent_that_is_killed_takes_its_ranks_along(hosts, undisturbed, tmp_path):
    """The other host names the rank that was lost, and both go on when they are started again."""
    agents = start(hosts, tmp_path)
    first = rank_0(agents)
    agents[first].wait_for("step     5/")
    victim = agents[1 - first]
    (rank,) = ranks_of(victim)
    victim.process.send_signal(signal.SIGKILL)
    assert agents[first].wait(60) == 1
    assert not Path(f"/proc/{rank}").exists()
    (error,) = errors_of(agents[first])
    assert re.match(rf"error: rank 1 \(process {rank} on", error)
    go_on(hosts, tmp_path, undisturbed, agents)


def still_runs(pid: int) -> bool:
    """Whether a process has not ended; an agent that hangs does not bury its ranks."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_survive_E10_a_cut_cable_ends_the_ranks_of_both_hosts_in_time(hosts, undisturbed, tmp_path):
    """torchrun's own agents wait up to five minutes for each other, when their ranks have ended."""
    agents = start(hosts, tmp_path)
    first = rank_0(agents)
    agents[first].wait_for("step     5/")
    ranks = [rank for agent in agents for rank in ranks_of(agent)]
    hosts[1].ip("link", "set", hosts[1].cable, "down")
    try:
        for agent in agents:
            agent.wait_for("\nerror: ", TIMEOUT + 90)
        patience = Patience(30)
        while any(map(still_runs, ranks)):
            assert patience.left(), [agent.said() for agent in agents]
            time.sleep(0.05)
        for agent in agents:
            agent.process.kill()
            agent.wait(30)
    finally:
        hosts[1].ip("link", "set", hosts[1].cable, "up")
    # The ranks' store is with the agent of rank 0.
    (with_store,), (without,) = errors_of(agents[first]), errors_of(agents[1 - first])
    assert "error: rank 1 (process" in with_store and "no sign of life any more" in with_store
    assert "is out of reach" in without
    go_on(hosts, tmp_path, undisturbed, agents)


@pytest.mark.parametrize("victim", [0, 1])
def test_survive_E10_two_agents_restart_a_killed_rank(victim, hosts, undisturbed, tmp_path):
    """By themselves, from the last checkpoint, with the same losses."""
    agents = start(hosts, tmp_path, restarts=1)
    agents[rank_0(agents)].wait_for("step     5/")
    (rank,) = ranks_of(agents[victim])
    os.kill(rank, signal.SIGKILL)
    assert [agent.wait(300) for agent in agents] == [0, 0], agents[0].said() + agents[1].said()
    assert "loaded" in agents[0].said() + agents[1].said()
    assert all_losses(agents) == undisturbed


def test_survive_E10_a_stopped_rank_is_named_and_the_run_goes_on(hosts, undisturbed, tmp_path):
    agents = start(hosts, tmp_path)
    first = rank_0(agents)
    agents[first].wait_for("step     5/")
    (rank,) = ranks_of(agents[1 - first])
    os.kill(rank, signal.SIGSTOP)
    assert agents[first].wait(TIMEOUT + 90) == 1
    (error,) = errors_of(agents[first])
    assert re.match(rf"error: rank 1 \(process {rank} on", error)
    for agent in agents:
        agent.process.send_signal(signal.SIGTERM)
        agent.wait(120)
    go_on(hosts, tmp_path, undisturbed, agents)

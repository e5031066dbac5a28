"""Rows E7, E10: two hosts with an agent each; one is killed, stopped or cut off, and both go on."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from dtcp.torchtitan import compat as compat

import pytest

from dtcp.pretrain.trainer import Trainer
from tests.harness.held import Held, hold, release
from tests.harness.patience import Patience, slowness
from tests.harness.started import Started
from tests.harness.train_run import losses, trained
from tests.harness.two_hosts import Host, missing_for_hosts, two_hosts
from tests.pretrain.test_train import micro

STEPS = 16
TIMEOUT = 4.0
"""Seconds of a quiet machine that ranks wait for each other in a step."""
AGENT = "tests/harness/forked_agent.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_for_hosts()), reason=f"needs {missing_for_hosts()}"),
]


def whole() -> Trainer.Config:
    config = micro()
    config.training.steps = STEPS
    config.lr_scheduler.total_steps = STEPS
    config.checkpoint.interval, config.validator.enable = 2, False
    return config


def held() -> Trainer.Config:
    """The same, to be interrupted behind a step."""
    config = whole()
    config.metrics = Held.Config(log_freq=1, enable_tensorboard=True)
    return config


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as pair:
        yield pair


def start(
    hosts: tuple[Host, Host], folder: Path, *held_at: int, restarts: int = 0
) -> list[Started]:
    """An agent on each host, with a rank each; they meet at the first host.

    Args:
        held_at: steps behind which both ranks wait.
    """
    for step in held_at:
        hold(folder, step, 0, 1)
    port = 20_000 + os.getpid() % 10_000
    endpoint = f"{hosts[0].address}:{port}"
    seconds = str(round(TIMEOUT * slowness()))
    agents = []
    for host in hosts:
        agent = ("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", f"{restarts}")
        meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test")
        own = ("--local-addr", host.address)
        # An agent whose peer is gone looks for its store that long.
        own += ("--rdzv-conf", f"is_host={host is hosts[0]},read_timeout={seconds}")
        command = ("train.py", "--module", "tests.pretrain.test_survive_hosts")
        options = ("--config", "held", "--dump_folder", str(folder))
        limits = ("--comm.train_timeout_seconds", seconds, "--comm.init_timeout_seconds", "600")
        agents.append(host.start(AGENT, *agent, *meeting, *own, *command, *options, *limits))
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
def undisturbed(tmp_path_factory) -> dict[int, float]:
    """The losses of a run that nothing happens to, on two ranks of this host."""
    folder = ("--dump_folder", str(tmp_path_factory.mktemp("undisturbed")))
    output = trained(*folder, module="tests.pretrain.test_survive_hosts", config="whole")
    return losses(output)


def wait_for_step(agents: list[Started], step: int) -> tuple[Started, Started]:
    """The agent whose rank is 0 and prints, and the other one, once it has printed a step.

    Ranks are numbered in the order in which they come.
    """
    patience = Patience(300)
    while True:
        for number, agent in enumerate(agents):
            if losses(agent.said()).keys() >= {step}:
                return agent, agents[1 - number]
            assert agent.process.poll() is None and patience.left(), agent.said()
        time.sleep(0.05)


def loaded(agents: list[Started]) -> list[str]:
    """The checkpoints that ranks have gone on from."""
    return [each for a in agents for each in re.findall(r"^loaded .*step-\d+$", a.said(), re.M)]


def still_runs(pid: int) -> bool:
    """Whether a process has not ended; an agent that hangs does not bury its ranks."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def kill_agent(first: Started, other: Started, go_on: Callable[[], None]) -> None:
    """An agent that is killed takes its ranks along, and the other host names the lost one."""
    (rank,) = ranks_of(other)
    other.process.send_signal(signal.SIGKILL)
    go_on()
    assert first.wait(60) == 1
    assert not still_runs(rank)
    (error,) = errors_of(first)
    assert re.match(rf"error: rank 1 \(process {rank} on", error)


def cut_cable(first: Started, other: Started, go_on: Callable[[], None], *, host: Host) -> None:
    """The ranks of both hosts end in time.

    torchrun's own agents wait up to five minutes for each other, when their ranks have ended.
    """
    ranks = [rank for agent in (first, other) for rank in ranks_of(agent)]
    host.ip("link", "set", host.cable, "down")
    go_on()
    try:
        for agent in (first, other):
            agent.wait_for("\nerror: ", TIMEOUT + 90)
        patience = Patience(30)
        while any(map(still_runs, ranks)):
            assert patience.left(), [agent.said() for agent in (first, other)]
            time.sleep(0.05)
        for agent in (first, other):
            agent.process.kill()
            agent.wait(30)
    finally:
        host.ip("link", "set", host.cable, "up")
    # The ranks' store is with the agent of rank 0.
    (with_store,), (without,) = errors_of(first), errors_of(other)
    assert "error: rank 1 (process" in with_store and "no sign of life any more" in with_store
    assert "is out of reach" in without


def stop_rank(first: Started, other: Started, go_on: Callable[[], None]) -> None:
    """A rank that is stopped is named."""
    (rank,) = ranks_of(other)
    os.kill(rank, signal.SIGSTOP)
    go_on()
    assert first.wait(TIMEOUT + 90) == 1
    (error,) = errors_of(first)
    assert re.match(rf"error: rank 1 \(process {rank} on", error)
    # Its agent would give it 30 s to end.
    os.kill(rank, signal.SIGKILL)
    assert other.wait(120) == 1


def test_survive_E7_E10_hosts_that_lose_each_other_go_on_when_started_again(
    hosts, undisturbed, tmp_path
):
    """After an agent was killed, the cable was cut and a rank was stopped, one after another."""
    before: list[Started] = []
    events = (kill_agent, partial(cut_cable, host=hosts[1]), stop_rank)
    for step, happens in zip((3, 8, 13), events, strict=True):
        agents = start(hosts, tmp_path, step)
        happens(*wait_for_step(agents, step), partial(release, tmp_path, step))
        assert len(loaded(agents)) == (step > 3)
        before += agents
    agents = start(hosts, tmp_path)
    assert [agent.wait(300) for agent in agents] == [0, 0], agents[0].said()
    assert len(loaded(agents)) == 1
    assert all_losses([*before, *agents]) == undisturbed


def test_survive_E10_two_agents_restart_killed_ranks(hosts, undisturbed, tmp_path):
    """One of each host, by themselves, from the last checkpoint, with the same losses."""
    agents = start(hosts, tmp_path, 5, 10, restarts=2)
    for step, victim in zip((5, 10), agents, strict=True):
        wait_for_step(agents, step)
        (rank,) = ranks_of(victim)
        os.kill(rank, signal.SIGKILL)
        release(tmp_path, step)
    assert [agent.wait(300) for agent in agents] == [0, 0], agents[0].said() + agents[1].said()
    assert len(loaded(agents)) == 2
    assert all_losses(agents) == undisturbed

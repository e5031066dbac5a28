"""Start the ranks a config asks for, when nobody else did.

`python train.py` is its own launcher: one elastic agent of torch, on this machine, and nothing
that listens beyond it. Under torchrun (or any launcher that sets WORLD_SIZE) nothing here runs.

On a machine without accelerators the ranks are forked from the launcher, with all that it has
imported and read: importing torch and torchtitan again would cost each of them seconds. A driver
does not survive a fork, so elsewhere ranks are processes of their own.
"""

import contextlib
import logging
import math
import os
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from dtcp._torch.agent import end_ranks
from dtcp._torch.compiler import set_inductor_processes
from dtcp.pretrain.processes import Gate, die_with
from dtcp.pretrain.rendezvous import LoopbackRendezvous

Device = Literal["auto", "cpu", "accelerator"]

OF_LAUNCHER = "dtcp-launcher-"
"""How ids of runs begin that this launcher gave; its process id follows."""

REFUSED = 78
"""The exit code of a rank whose run was refused before its first step (EX_CONFIG of sysexits.h)."""


class Parallelism(Protocol):
    """What is read of torchtitan's `ParallelismConfig`, without importing it."""

    data_parallel_replicate_degree: int
    data_parallel_shard_degree: int
    context_parallel_degree: int
    tensor_parallel_degree: int
    pipeline_parallel_degree: int


@dataclass(frozen=True)
class Ranks:
    """How many processes to start on this machine, and what they run on."""

    count: int
    device: Literal["cpu", "accelerator"]
    because: str = ""
    """What to tell a user who asked for something else."""


@dataclass(frozen=True)
class RestartPolicy:
    """What a launcher does about ranks that end before their work is done."""

    max_restarts: int = 0
    """How often ranks are started again after one has failed."""
    stop_seconds: int = 120
    """How long ranks may take to save once they are to stop; then they are killed."""


def launched() -> bool:
    """Whether this process is already a rank."""
    return "WORLD_SIZE" in os.environ


def check_named() -> None:
    """Refuse an environment that names this rank only in part, as some schedulers leave it.

    Raises:
        ValueError: naming the variable.
    """
    named = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if not all(text.isdecimal() for text in named.values()):
        raise ValueError(
            f"A launcher sets RANK and WORLD_SIZE to numbers, got RANK={named['RANK']!r} and "
            f"WORLD_SIZE={named['WORLD_SIZE']!r}: start ranks by torchrun, or unset both, and "
            f"train.py starts ranks by itself."
        )


def rank() -> int:
    """This process's rank among all that were launched."""
    return int(os.environ["RANK"])


def world_size() -> int:
    """How many processes were launched."""
    return int(os.environ["WORLD_SIZE"])


def ranks_of_machine() -> int:
    """How many processes were launched on each machine; 0 where it is not known."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0"))


def degrees_of(parallelism: Parallelism) -> dict[str, int]:
    """Degree of each mesh axis by its short name; dp_shard is -1 where it takes what is left."""
    return {
        "dp_replicate": parallelism.data_parallel_replicate_degree,
        "dp_shard": parallelism.data_parallel_shard_degree,
        "cp": parallelism.context_parallel_degree,
        "tp": parallelism.tensor_parallel_degree,
        "pp": parallelism.pipeline_parallel_degree,
    }


def check_world(parallelism: Parallelism, ranks: int) -> None:
    """Refuse a number of ranks that the mesh of the config does not fill.

    Raises:
        ValueError: naming the ranks, the degrees and what to change.
    """
    degrees = degrees_of(parallelism)
    fixed = math.prod(d for d in degrees.values() if d > 0)
    flexible = degrees["dp_shard"] < 0
    if ranks == fixed or (flexible and ranks and ranks % fixed == 0):
        return
    shape = " x ".join(f"{axis} {d}" for axis, d in degrees.items() if d > 1) or "one rank"
    raise ValueError(
        f"The mesh {shape} fills the world, got world_size={ranks}: start "
        f"{'a multiple of ' if flexible else ''}{fixed} ranks, or set the degrees "
        f"(--parallelism.context_parallel_degree and its like)."
    )


def play_one_of(parallelism: Parallelism) -> int:
    """Become one rank of a mesh without the others, for torchtitan's fake backend.

    Of NGPU ranks (without it, of those that the degrees multiply to) this is rank RANK, else 0.

    Returns:
        the world size.
    Raises:
        ValueError: ranks were started; or a world that the mesh does not fill.
    """
    if launched():
        raise ValueError(
            f"A dry run is one process, got WORLD_SIZE={os.environ['WORLD_SIZE']} from a launcher: "
            f"start train.py by itself, with NGPU=8 for 8 ranks."
        )
    fixed = math.prod(d for d in degrees_of(parallelism).values() if d > 0)
    environment = {"NGPU": os.environ.get("NGPU", f"{fixed}"), "RANK": os.environ.get("RANK", "0")}
    for name, text in environment.items():
        if not text.isdecimal():
            raise ValueError(
                f"A dry run plays rank RANK of NGPU ranks, got {name}={text}: give a whole number."
            )
    world, played = int(environment["NGPU"]), int(environment["RANK"])
    check_world(parallelism, world)
    if played >= world:
        raise ValueError(
            f"Ranks count from 0, got RANK={played} of NGPU={world}: give {world - 1} at most."
        )
    os.environ |= {**environment, "WORLD_SIZE": f"{world}", "LOCAL_RANK": "0"}
    return world


def ranks_for(parallelism: Parallelism, device: Device) -> Ranks:
    """The ranks one machine runs: one per accelerator, or the product of the mesh on the CPU.

    Raises:
        ValueError: accelerators were asked for, and there is none, or the mesh does not fit them.
    """
    fixed = math.prod(d for d in degrees_of(parallelism).values() if d > 0)
    accelerators = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if device == "accelerator":
        if not accelerators:
            raise ValueError(
                "Ranks run on accelerators that torch finds, got --dtcp.device accelerator where "
                "it finds none: set it to cpu, or look at the driver and at this build of torch."
            )
        check_world(parallelism, accelerators)
        return Ranks(accelerators, "accelerator")
    if device == "cpu" or not accelerators:
        return Ranks(fixed, "cpu")
    try:
        check_world(parallelism, accelerators)
    except ValueError as error:
        return Ranks(fixed, "cpu", because=f"{error} Running {fixed} ranks on the CPU instead.")
    return Ranks(accelerators, "accelerator")


def launch(
    ranks: Ranks,
    work: Callable[[], int],
    command: Sequence[str],
    policy: RestartPolicy = RestartPolicy(),
) -> int:
    """Run the ranks of a job on this machine and return the exit code of the job.

    A rank that fails ends the others, and all start again as often as `policy` says, unless the run
    was refused. Ranks say what went wrong themselves, once.

    Args:
        work: what a forked rank does; returns its exit code.
        command: what the interpreter runs as a rank where none can be forked.
    Raises:
        ValueError: this machine has not what the ranks take; those that had started are ended.
    """
    fork = can_fork()  # while this process still sees all of the machine
    threads = _prepare_environment(ranks)
    # The agent would repeat, for each rank, what the ranks have said.
    logging.disable(logging.CRITICAL)
    entrypoint: Callable[..., None] | str = _forked_rank if fork else sys.executable
    code = 0
    for restarts in range(policy.max_restarts + 1):
        if restarts:
            _warn(f"restart     {restarts} of {policy.max_restarts}, from the last checkpoint")
        try:
            with contextlib.closing(Gate()) as gate:
                args = (work, threads, os.getpid(), gate) if fork else ("-u", *command)
                code = _attempt(ranks, entrypoint, args, policy, gate)
        except (OSError, MemoryError) as error:
            raise ValueError(
                f"A machine has processes, memory, open files and temporary files for its ranks, "
                f"got ranks={ranks.count} and {type(error).__name__}: {error}: start fewer, or "
                f"raise its limits (ulimit -u, -n, -v) and make room in /dev/shm and TMPDIR."
            ) from error
        if code in (0, REFUSED) or code > 128:
            break
    return 1 if code == REFUSED else code


def _attempt(
    ranks: Ranks,
    entrypoint: Callable[..., None] | str,
    args: tuple[Any, ...],
    policy: RestartPolicy,
    gate: Gate,
) -> int:
    """Start the ranks once and return the exit code of the first to fail, or 0."""
    spec = WorkerSpec(
        role="ranks",
        local_world_size=ranks.count,
        entrypoint=entrypoint,
        args=args,
        rdzv_handler=LoopbackRendezvous(f"{OF_LAUNCHER}{os.getpid()}-{uuid.uuid4().hex}"),
        max_restarts=0,  # here: a new start has a new store, and says why
        # Seconds. A rank that was killed is to be noticed before its peers fail for want of it.
        monitor_interval=0.02,
    )
    agent = Agent(spec, policy.stop_seconds, gate)
    try:
        failures = agent.run().failures
    except SignalException as stopped:
        _warn(f"stopped by {stopped.sigval.name}; ranks are ended")
        return 128 + stopped.sigval
    if not failures:
        return 0
    number, first = min(failures.items(), key=lambda item: item[1].timestamp)
    return _exit_code(number, first)


def _exit_code(number: int, failure: ProcessFailure) -> int:
    if failure.exitcode >= 0:
        return failure.exitcode
    # A killed rank could not report it.
    _warn(f"error: rank {number} was killed by {signal.Signals(-failure.exitcode).name}.")
    return 1


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Agent(LocalElasticAgent):
    """torch's agent of one machine, which ends ranks in the way each end asks for.

    Args:
        stop_seconds: how long ranks have to save when this process is to stop.
        gate: what forked ranks wait at, to be opened.
    """

    def __init__(self, spec: WorkerSpec, stop_seconds: int, gate: Gate) -> None:
        super().__init__(spec, DefaultLogsSpecs(os.devnull), start_method="fork")
        self.stop_seconds, self.gate, self._is_closing = stop_seconds, gate, False

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if isinstance(worker_group.spec.entrypoint, str):
            return super()._start_workers(worker_group)
        # A forked rank gets no signal before it has handlers of its own: those of this process
        # would raise in a rank that has hardly begun.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, handled_signals())
        try:
            started = super()._start_workers(worker_group)
            self.gate.open(len(started))
            return started
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        # One rank is gone: the others wait for it in a collective, and cannot save. A rank that
        # is stopped (SIGSTOP) heeds no other signal.
        self._shutdown(signal.SIGKILL)

    def _shutdown(
        self, death_sig: signal.Signals = signal.SIGTERM, timeout: int | None = None
    ) -> None:
        # Called again where a second signal cut the first wait short: do not wait any longer.
        death_sig = signal.SIGKILL if self._is_closing else death_sig
        self._is_closing = True
        end_ranks(self, death_sig, self.stop_seconds)
        super()._shutdown(death_sig)


def can_fork() -> bool:
    """Whether ranks can be forked: Linux, and no driver that this process has spoken to."""
    return sys.platform == "linux" and not torch.accelerator.is_available()


def handled_signals() -> list[signal.Signals]:
    """Signals that end a run, without those that it was started to ignore, as under nohup."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def of_this_launcher() -> bool:
    """Whether this process is a rank that `launch` started."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(OF_LAUNCHER)


def end_with_launcher() -> None:
    """Called by a rank that an agent started as a process, so as not to outlive the agent."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if of_this_launcher():
        # It may be gone before a rank has imported this.
        die_with(int(run.removeprefix(OF_LAUNCHER).partition("-")[0]))
    elif run:
        die_with(os.getppid())


def _forked_rank(work: Callable[[], int], threads: int | None, launcher: int, gate: Gate) -> None:
    # A terminal's Ctrl-C reaches the launcher, which tells the ranks.
    os.setpgid(0, 0)
    # Undo the agent's settings, which the fork copied. A rank that has to end says nothing.
    logging.disable(logging.NOTSET)
    for number in handled_signals():
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handled_signals())
    die_with(launcher)
    gate.wait()
    # torch read the environment when the launcher imported it.
    if threads is not None:
        torch.set_num_threads(threads)
    set_inductor_processes(int(os.environ["TORCHINDUCTOR_COMPILE_THREADS"]))
    code = work()
    if code:
        sys.exit(code)


def _prepare_environment(ranks: Ranks) -> int | None:
    """Set what the ranks inherit. What the user has chosen is left alone.

    Returns:
        the threads of each rank, if the user did not choose them.
    """
    # The agent would handle signals that nohup makes a process ignore.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(each.name for each in handled_signals())
    # Ranks of one machine have nothing to say to others.
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
    if ranks.device != "cpu":
        return None
    # Ranks bind an accelerator at import where they see one.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Each rank would otherwise start a pool of compiler processes, one per core.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if "OMP_NUM_THREADS" in os.environ:
        return None
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = max(1, cores // ranks.count)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return threads

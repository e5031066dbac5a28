"""Start the ranks a config asks for, when nobody else did.

`python train.py` is its own launcher: one elastic agent of torch, on this machine, with a free
port. Under torchrun (or any launcher that sets WORLD_SIZE) nothing here runs.

On a machine without accelerators the ranks are forked from the launcher, with all that it has
imported and read: importing torch and torchtitan again would cost each of them seconds. A driver
does not survive a fork, so elsewhere ranks are processes of their own.
"""

import logging
import math
import os
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dtcp._torch import set_inductor_processes

Device = Literal["auto", "cpu", "accelerator"]


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
    """What to tell the person who wished for something else."""


def launched() -> bool:
    """Whether this process is already a rank."""
    return "WORLD_SIZE" in os.environ


def rank() -> int:
    """Of this process among all that were launched."""
    return int(os.environ["RANK"])


def world_size() -> int:
    """Processes that were launched."""
    return int(os.environ["WORLD_SIZE"])


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
    if ranks == fixed or (flexible and ranks % fixed == 0):
        return
    shape = " x ".join(f"{axis} {d}" for axis, d in degrees.items() if d > 1) or "one rank"
    raise ValueError(
        f"The mesh {shape} fills the world, got world_size={ranks}: start "
        f"{'a multiple of ' if flexible else ''}{fixed} ranks, or set the degrees "
        f"(--parallelism.context_parallel_degree and its like)."
    )


def ranks_for(parallelism: Parallelism, device: Device) -> Ranks:
    """The ranks one machine runs: one per accelerator, or the product of the mesh on the CPU.

    Raises:
        ValueError: accelerators were asked for, and the mesh does not fit them.
    """
    fixed = math.prod(d for d in degrees_of(parallelism).values() if d > 0)
    accelerators = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if device == "accelerator":
        check_world(parallelism, accelerators)
        return Ranks(accelerators, "accelerator")
    if device == "cpu" or not accelerators:
        return Ranks(fixed, "cpu")
    try:
        check_world(parallelism, accelerators)
    except ValueError as error:
        return Ranks(fixed, "cpu", because=f"{error} Running {fixed} ranks on the CPU instead.")
    return Ranks(accelerators, "accelerator")


def launch(ranks: Ranks, work: Callable[[], int], command: Sequence[str]) -> int:
    """Run the ranks of a job on this machine and return the exit code of the job.

    A rank that fails ends the others. Ranks say what went wrong themselves, once.

    Args:
        work: what a forked rank does; returns its exit code.
        command: what the interpreter runs as a rank where none can be forked.
    """
    fork = can_fork()  # while this process still sees all of the machine
    threads = _prepare_environment(ranks)
    # The agent would repeat, for each rank, what the ranks have said.
    logging.disable(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks.count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        # Port 0 takes a free one. The agent's address would otherwise be looked up by the name
        # of the machine, which a bare container cannot resolve.
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        # Seconds. A rank that was killed is to be noticed before its peers fail for want of it.
        monitor_interval=0.02,
        start_method="fork",
    )
    try:
        if fork:
            elastic_launch(config, _forked_rank)(work, threads)
        else:
            elastic_launch(config, sys.executable)("-u", *command)
    except ChildFailedError as error:
        number, first = error.get_first_failure()
        if first.exitcode < 0:
            # A killed rank had no chance to speak.
            name = signal.Signals(-first.exitcode).name
            print(f"error: rank {number} was killed by {name}.", file=sys.stderr, flush=True)
        return first.exitcode if first.exitcode > 0 else 1
    except SignalException as stopped:
        print(f"stopped by {stopped.sigval.name}; ranks are ended", file=sys.stderr, flush=True)
        return 128 + stopped.sigval
    return 0


def can_fork() -> bool:
    """Whether ranks can be forked: Linux, and no driver that this process has spoken to."""
    return sys.platform == "linux" and not torch.accelerator.is_available()


def _forked_rank(work: Callable[[], int], threads: int | None) -> None:
    # The agent's settings came along with the fork. A rank that has to end says nothing.
    logging.disable(logging.NOTSET)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    # torch read the environment when the launcher imported it.
    if threads is not None:
        torch.set_num_threads(threads)
    set_inductor_processes(int(os.environ["TORCHINDUCTOR_COMPILE_THREADS"]))
    code = work()
    if code:
        sys.exit(code)


def _prepare_environment(ranks: Ranks) -> int | None:
    """Set what the ranks inherit. A choice of the person who starts the run is left alone.

    Returns:
        the threads of a rank, where that person did not choose.
    """
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

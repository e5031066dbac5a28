"""What one rank of the pool does: wait for a job by name, run it, answer."""

import faulthandler
import functools
import importlib
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Job:
    """A function by name, its arguments, and the mesh it runs on."""

    module: str
    qualname: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    axes: Mapping[str, int]


@dataclass(frozen=True)
class Answer:
    """What one rank says at the end of a job."""

    kind: str  # "value", "error" or "lost"
    value: Any


def world_size(axes: Mapping[str, int]) -> int:
    """Ranks in a mesh of these axes."""
    return functools.reduce(lambda a, b: a * b, axes.values(), 1)


def serve(rank: int, pipe: connection.Connection, port: int, world: str, stacks: Path) -> None:
    """Answer jobs until the parent is gone.

    Args:
        port: of the parent's store.
        world: names these ranks in it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    dumps = stacks.open("a")
    faulthandler.register(signal.SIGUSR1, dumps, all_threads=False)
    faulthandler.enable(dumps)  # for signals that end this process
    torch.set_num_threads(1)
    exit_with_parent()
    # By default a semaphore of the system's, which a rank that is killed would leave behind.
    tqdm.set_lock(threading.RLock())
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    group = Group(rank, dist.PrefixStore(world, store))
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            # Not sys.exit: gloo's threads have nobody left to say goodbye to.
            os._exit(0)
        pipe.send_bytes(_answer(group, request))
        sys.stdout.flush()


def exit_with_parent() -> None:
    """From now on, end when the session does: a rank in a collective would not notice."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _answer(group: "Group", request: bytes) -> bytes:
    """Run one job and pickle what came of it; nothing escapes, for the parent is waiting."""
    try:
        job = pickle.loads(request)
        body: Any = importlib.import_module(job.module)
        for name in job.qualname.split("."):
            body = getattr(body, name)
        body = getattr(body, "spmd_body", body)
        mesh = group.mesh(job.axes)
        fresh_state()
        return pickle.dumps(Answer("value", body(mesh, *job.args, **job.kwargs)))
    # Even what pytest.fail and pytest's skips raise: an answer is due, and no skip is a pass.
    except BaseException:  # noqa: BLE001
        return pickle.dumps(Answer("error", f"raised\n{traceback.format_exc()}"))


def fresh_state() -> None:
    """Put torch's global state where every test expects it: equal seeds, nothing compiled.

    Memory that torch.empty hands out is full of NaN, so a value that was never written shows.
    """
    random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@dataclass
class Group:
    """The process group this rank is in for as long as it lives, and the meshes made on it.

    It is never renewed: DTensor keeps the names of groups in caches of its own, by the shape of
    a mesh, and would look for groups that are gone (torch 2.13).
    """

    rank: int
    store: dist.Store
    meshes: dict[tuple[tuple[str, int], ...], DeviceMesh] = field(default_factory=dict)

    def mesh(self, axes: Mapping[str, int]) -> DeviceMesh:
        """The mesh of these axes over all ranks."""
        if not dist.is_initialized():
            size = world_size(axes)
            dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=size)
        key = tuple(axes.items())
        if key not in self.meshes:
            self.meshes[key] = init_device_mesh(
                "cpu", tuple(axes.values()), mesh_dim_names=tuple(axes)
            )
        return self.meshes[key]

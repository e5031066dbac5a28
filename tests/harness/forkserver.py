"""Processes that start in milliseconds: forked from one that has imported everything.

A rank of its own imports torch, torchtitan and transformers for some 8 s. The fork server does so
once a session, beside the tests that need no ranks, and holds neither a group nor a tensor.
"""

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import connection
from multiprocessing import forkserver as standard
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

PRELOAD = (
    "pytest",
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed._functional_collectives",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    # What the first compilation imports.
    "torch._dynamo.backends.cudagraphs",
    "torch._dynamo.backends.distributed",
    "torch._dynamo.backends.inductor",
    "torch._export.db.logging",
    "torch.export._trace",
    "torch.fx.experimental.validator",
    "transformers",
    "transformers.trainer",
    # All of the project: whatever a test of it imports.
    "dtcp.check",
    "dtcp.cp_utils",
    "dtcp.trainers",
    "dtcp.models.deepseek_v4",
    "dtcp.models.gemma4",
    "dtcp.models.llama",
    "dtcp.models.qwen3_5",
    "dtcp.pretrain.configs",
    "dtcp.pretrain.run",
    # What a run of it imports when it begins and when it ends.
    "tensorboard.backend.event_processing.event_accumulator",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "tests.harness.frozen_imports",
)

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(list(PRELOAD))


def warm_up() -> None:
    """Let the server import, and do not wait for it."""
    with _environment(rank_environment()):
        standard.ensure_running()


def start(target: Callable[..., None], *args: Any, daemon: bool = True) -> Any:
    """A process that runs target(*args) in the environment of a rank: multiprocessing's Process.

    Args:
        daemon: whether it has no processes of its own, and may be left to end with this one.
    """
    warm_up()
    process = _CONTEXT.Process(target=target, args=args, daemon=daemon)
    process.start()
    return process


def pipe() -> tuple[connection.Connection, connection.Connection]:
    """Both ends of a pipe that can be sent to a process."""
    return _CONTEXT.Pipe()


def rank_environment() -> dict[str, str]:
    """What a rank needs to find in its environment before torch is imported."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    return {
        # Ranks bind an accelerator at import where they see one.
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": loopback,
        "OMP_NUM_THREADS": "1",
        # Else each rank starts a pool of compiler processes of its own.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # Else the profiler says when it starts and stops.
        "KINETO_LOG_LEVEL": "6",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside."""
    saved = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

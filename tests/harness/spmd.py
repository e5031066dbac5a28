"""Run a test on several real ranks, out of a pool of processes for the whole session.

Ranks are forked from a process that has imported everything (forkserver.py), once for many tests
of one world size, and a test is sent to them by name. Each rank is a gloo process with one thread.
The parent only waits; it never joins a process group, so a rank that dies or hangs fails its test
and nothing else.

    @pytest.mark.parametrize("dim", [0, 1])
    @spmd(ranks=4)
    def test_all_gather_returns_every_shard(mesh, dim): ...

The body runs on every rank with `mesh`, the 1-D axis `cp`; `pytest.raises` belongs inside it.
"""

import contextlib
import functools
import inspect
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
from torch import distributed as dist

from tests.harness import forkserver
from tests.harness.patience import Patience
from tests.harness.rank import Answer, Job, serve, world_size

TIMEOUT = 300.0
"""Seconds of a quiet machine that a test may take on its ranks."""

JOBS_PER_START = 20
"""Tests before the ranks are started afresh, in milliseconds: each group that a test makes has
gloo threads that wake up 100 times a second, and hundreds of them slow every test."""

GRACE = 2.0
"""Seconds of a quiet machine that the other ranks have to answer once one rank has failed."""


class RankError(Exception):
    """What went wrong on the ranks: the text holds each rank's traceback."""


def spmd(
    *,
    ranks: int | Sequence[int] = 0,
    axes: Mapping[str, int] | None = None,
    timeout: float = TIMEOUT,
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Run the test on `ranks` ranks, once for each number where there are several.

    Args:
        ranks: sizes of the axis `cp`. A test that takes `ranks` itself gets the number.
        axes: instead of ranks, a mesh of several named axes, the last one fastest.
        timeout: seconds of a quiet machine.
    """
    if bool(axes) == bool(ranks):
        raise ValueError(f"spmd takes ranks or axes, got ranks={ranks}, axes={axes}: give one.")

    sizes = (ranks,) if isinstance(ranks, int) else tuple(ranks)
    several = len(sizes) > 1

    def decorate(body: Callable[..., Any]) -> Callable[..., None]:
        takes_ranks = "ranks" in inspect.signature(body).parameters

        @functools.wraps(body)
        def test(**params: Any) -> None:
            __tracebackhide__ = True
            size = params.pop("ranks", sizes[0])
            if takes_ranks:
                params["ranks"] = size
            _run(body, (), params, dict(axes or {"cp": size}), timeout)

        test.spmd_body = body  # type: ignore[attr-defined]
        test.__signature__ = _test_signature(body, several)  # type: ignore[attr-defined]
        marked = pytest.mark.spmd(world_size(axes) if axes else sizes[0])(test)
        return pytest.mark.parametrize("ranks", sizes)(marked) if several else marked

    return decorate


def run_ranks(
    fn: Callable[..., Any],
    ranks: int = 0,
    *args: Any,
    axes: Mapping[str, int] | None = None,
    timeout: float = TIMEOUT,
    **kwargs: Any,
) -> list[Any]:
    """Call fn(mesh, *args, **kwargs) on every rank and return the values, rank 0 first.

    Args:
        fn: a module-level function; arguments and value must pickle.
        axes: instead of ranks, as for `spmd`.
    Raises:
        RankError: a rank raised, died or did not answer in time.
    """
    __tracebackhide__ = True
    return _run(fn, args, kwargs, dict(axes or {"cp": ranks}), timeout)


def _run(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    axes: Mapping[str, int],
    timeout: float,
) -> list[Any]:
    __tracebackhide__ = True
    if "<" in fn.__qualname__:
        raise ValueError(
            f"run_ranks sends a function by name, got fn={fn.__qualname__}: "
            f"move it to the top level of its module."
        )
    answers = pool_of(world_size(axes)).run(fn, args, kwargs, axes, timeout)
    return [answer.value for answer in answers]


def _test_signature(body: Callable[..., Any], several: bool) -> inspect.Signature:
    """The body's signature as pytest may fill it: no mesh; ranks only where parametrized."""
    parameters = dict(inspect.signature(body).parameters)
    del parameters["mesh"]
    parameters.pop("ranks", None)
    if several:
        parameters["ranks"] = inspect.Parameter("ranks", inspect.Parameter.KEYWORD_ONLY)
    return inspect.Signature(
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters.values()]
    )


@dataclass
class Worker:
    """One rank as the parent sees it."""

    rank: int
    process: Any  # multiprocessing's ForkServerProcess
    pipe: connection.Connection
    stacks: Path

    def ask(self, request: bytes) -> None:
        """Send a job; a rank that has died meanwhile is found out when it is listened to."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send_bytes(request)

    def listen(self) -> Answer:
        """Read the rank's answer, or learn that it is dead."""
        try:
            answer = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join()
            # Where a signal ended it, its stack is there.
            text = f"died with exit code {self.process.exitcode}\n{self.stacks.read_text()}"
            return Answer("lost", text.strip())
        assert isinstance(answer, Answer)
        return answer

    def where(self) -> str:
        """Say where the rank stands now, from its own stack dump."""
        before = len(self.stacks.read_text())
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        patience = Patience(GRACE)
        # It is written line by line, up to the outermost frame or a hundredth one.
        ends = ("in <module>\n", "  ...\n")
        while not (stack := self.stacks.read_text()[before:]).endswith(ends) and patience.left():
            time.sleep(0.05)
        return stack or "(no stack: it does not answer signals)"


@dataclass
class Pool:
    """The ranks of one world size: started when first asked for, afresh after a failure."""

    size: int
    workers: list[Worker] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)  # since the ranks were started

    def __post_init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.folder = tempfile.TemporaryDirectory(prefix="dtcp-ranks-")
        self.starts = 0

    def run(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        axes: Mapping[str, int],
        timeout: float,
    ) -> list[Answer]:
        """Run one job on all ranks of the pool and return their answers."""
        __tracebackhide__ = True
        if len(self.jobs) == JOBS_PER_START or not all(w.process.is_alive() for w in self.workers):
            self.stop()
        if not self.workers:
            self._start()
        self.jobs.append(f"{fn.__module__}.{fn.__qualname__}")
        request = pickle.dumps(Job(fn.__module__, fn.__qualname__, args, kwargs, axes))
        for worker in self.workers:
            worker.ask(request)
        answers = _collect(self.workers, timeout)
        if any(answer.kind in ("error", "lost") for answer in answers):
            report = _report(answers, self.jobs)
            self.stop()
            raise RankError(report) from None
        return answers

    def stop(self) -> None:
        """End every rank, now."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()
        self.workers.clear()
        self.jobs.clear()

    def _start(self) -> None:
        self.starts += 1
        self.workers += [self._worker(rank) for rank in range(self.size)]

    def _worker(self, rank: int) -> Worker:
        stacks = Path(self.folder.name, f"rank{rank}")
        stacks.write_text("")
        ours, theirs = forkserver.pipe()
        process = forkserver.start(serve, rank, theirs, self.store.port, f"{self.starts}", stacks)
        theirs.close()
        return Worker(rank, process, ours, stacks)


@functools.cache
def pools() -> dict[int, Pool]:
    """The session's pools by world size; a stopped one starts again with its next job."""
    return {}


def pool_of(size: int) -> Pool:
    """The pool of that many ranks; the others are stopped, whose threads would not rest."""
    for other in pools().values():
        if other.size != size:
            other.stop()
    if size not in pools():
        pools()[size] = Pool(size)
    return pools()[size]


def _collect(workers: Sequence[Worker], timeout: float) -> list[Answer]:
    """Wait for every rank; once one has failed the others get GRACE seconds more."""
    answers: dict[int, Answer] = {}
    patience, failed = Patience(timeout), False
    while len(answers) < len(workers) and patience.left():
        waiting = {w.pipe: w for w in workers if w.rank not in answers}
        for pipe in connection.wait(list(waiting), min(1.0, patience.left())):
            worker = waiting[pipe]  # type: ignore[index]
            answers[worker.rank] = worker.listen()
            if answers[worker.rank].kind in ("error", "lost") and not failed:
                failed, patience = True, Patience(GRACE)
    cause = "when another rank had failed" if failed else f"after {timeout:g} s"
    for worker in workers:
        if worker.rank not in answers:
            text = f"was still running {cause}, here:\n{worker.where()}"
            answers[worker.rank] = Answer("lost", text)
    return [answers[worker.rank] for worker in workers]


def _report(answers: Sequence[Answer], jobs: Sequence[str]) -> str:
    """Say what every rank met; ranks with the same words share them, errors come first.

    Where one is lost, the jobs before may have to do with it, and are named.
    """
    ranks: dict[tuple[bool, str], list[int]] = {}
    for rank, answer in enumerate(answers):
        if answer.kind in ("error", "lost"):
            ranks.setdefault((answer.kind == "lost", answer.value), []).append(rank)
    parts = [
        f"rank {', '.join(map(str, who))} of {len(answers)} {text}"
        for (_, text), who in sorted(ranks.items())
    ]
    if any(answer.kind == "lost" for answer in answers):
        parts.append("these ranks had been given, one after another:\n" + "\n".join(jobs))
    return "\n\n".join(parts)

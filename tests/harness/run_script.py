"""Scripts in processes of their own: started afresh, or forked as ranks that have all imported.

A process that starts afresh imports torch, torchtitan and transformers, some 8 s of a core. A
forked one has them from the fork server that the pool's ranks come from (spmd.py), and is a rank of
torchrun's in all else: the same environment, the agent's store, the exit code, the output.
"""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import distributed as dist

from tests.harness import forkserver, spmd
from tests.harness.patience import Patience
from tests.harness.rank import exit_with_parent

ROOT = Path(__file__).parents[2]
SECONDS = 300.0
"""Of a quiet machine, that a script may take."""


@dataclass(frozen=True)
class Ended:
    """What is left of a script: its exit code, and what it and its ranks wrote."""

    code: int
    printed: str  # to stdout
    errors: str  # to stderr

    @property
    def output(self) -> str:
        return self.printed + self.errors


def run_process(
    *command: str, folder: Path = ROOT, seconds: float = SECONDS, **environment: str
) -> Ended:
    """Run a command in a folder, with these variables in its environment besides ours."""
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=errors,
        )
        patience = Patience(seconds)
        while process.poll() is None and patience.left():
            time.sleep(0.05)
        late = process.poll() is None
        process.kill()
        ended = Ended(process.wait(), *map(_read, (printed, errors)))
    if late:
        raise TimeoutError(f"{' '.join(command)} still ran after {seconds:g} s:\n{ended.output}")
    return ended


def run_python(*arguments: str, **options: Any) -> Ended:
    """Run this Python with arguments; options as for `run_process`."""
    return run_process(sys.executable, *arguments, **options)


def lines_of(module: str, *arguments: str, **environment: str) -> list[Any]:
    """What a module prints when it is run, line by line, as JSON."""
    ended = run_python("-m", module, *arguments, **environment)
    assert ended.code == 0, ended.errors[-3000:]
    return [json.loads(line) for line in ended.printed.splitlines()]


def run_forked(script: Path | str, *arguments: str, ranks: int, seconds: float = SECONDS) -> Ended:
    """Run a Python script on ranks as torchrun would, and without an import's time.

    Args:
        script: its path; from the root of the project, where it is relative.
        ranks: 0 runs it once and as no rank, as a person starts it.
    Returns:
        the exit code of the first rank to fail, or 0; the output of all.
    """
    with tempfile.NamedTemporaryFile() as printed, tempfile.NamedTemporaryFile() as errors:
        files = (printed.name, errors.name)
        with forked_ranks(script, arguments, ranks=ranks, files=files) as processes:
            code = _wait(processes, seconds)
        texts = _read(printed), _read(errors)
    if code is None:
        raise TimeoutError(f"{script} still ran after {seconds:g} s:\n{''.join(texts)}")
    return Ended(code, *texts)


@contextlib.contextmanager
def forked_ranks(
    script: Path | str, arguments: Sequence[str], *, ranks: int, files: tuple[str, str]
) -> Iterator[list[Any]]:
    """Ranks that run a script, with the store that torchrun's agent would have for them.

    Args:
        files: where all of them print, and where their errors go.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        forkserver.start(
            be_script,
            ROOT / script,
            arguments,
            _environment(rank, ranks, store.port),
            files,
            daemon=False,  # what is no rank may start some
        )
        for rank in range(max(ranks, 1))
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def _wait(processes: Sequence[Any], seconds: float) -> int | None:
    """The exit code of the first to fail, which takes the others along; None if time is up."""
    patience, failure = Patience(seconds), 0
    while any(process.exitcode is None for process in processes) and patience.left():
        time.sleep(0.02)
        codes = [process.exitcode for process in processes]
        if not failure and any(codes):
            failure = next(code for code in codes if code)
            # As long as others may take to say that they failed, too.
            patience = Patience(spmd.GRACE)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    if not failure and None in codes:
        return None
    # The last to end may have failed between two looks.
    return failure or next((code for code in codes if code), 0)


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun puts into the environment of a rank."""
    if not ranks:
        return {}
    return {
        "RANK": f"{rank}",
        "LOCAL_RANK": f"{rank}",
        "GROUP_RANK": "0",
        "WORLD_SIZE": f"{ranks}",
        "LOCAL_WORLD_SIZE": f"{ranks}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{port}",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def be_script(
    script: Path, arguments: Sequence[str], environment: dict[str, str], files: Sequence[str]
) -> None:
    """Run the script in this process, and end it with the script's exit code."""
    exit_with_parent()
    os.environ.update(environment)
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream.fileno())
        assert isinstance(stream, io.TextIOWrapper)
        # Whole lines, so that those of two ranks do not run into each other: with PYTHONUNBUFFERED
        # a line's end is a write of its own.
        stream.reconfigure(line_buffering=True, write_through=False)
    code = exit_code_of(script, arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_code_of(script: Path, arguments: Sequence[str]) -> int:
    """Run a script as this process' own, up to where the process would end."""
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))  # as Python does for a script
    try:
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    # An interpreter of its own would hand it to the hook, too.
    except BaseException as error:  # noqa: BLE001
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    return code

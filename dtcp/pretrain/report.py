"""Reports a failure of a run once, in one line, whichever ranks fail.

A rank with an error of its own reports it at once. A rank that only lost another one waits until it
is known whether that rank said why, and names it if it did not.
"""

import contextlib
import errno
import hashlib
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from torch import distributed as dist
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError, Store
from torch.distributed.checkpoint.api import CheckpointException

from dtcp.pretrain.attempt import (
    GONE,
    AbsentRanks,
    Attempt,
    RefusedTogether,
    agent_address,
    attempt_name,
    attempt_store,
    has_agent_store,
    tell_others,
)
from dtcp.pretrain.launch import REFUSED, of_this_launcher

# Errors that state a contract, its value and its remedy, or a path and what is wrong with it: their
# text is all there is to know.
EXPLAINED = (ValueError, TypeError, FileNotFoundError, PermissionError, NotImplementedError)

OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What writing fails with, whoever writes: a trace, a log, a config."""

OF_PEERS = (DistBackendError, DistNetworkError, DistStoreError)
"""What torch raises when another rank is gone."""

OF_GLOO = ("gloo/", "closed by peer", "reset by peer", "Timed out waiting", "pair closure")
"""How gloo says the same, in the text of a RuntimeError."""

A_FAILURE = "a failure"
"""Claimed by the first rank that reports an error of its own."""

TELLING = 10.0
"""Seconds that a rank waits for another one to print what both know."""


@contextlib.contextmanager
def said_once(text: str) -> Iterator[bool]:
    """Inside, whether this rank is the first of its attempt to report a text. Alone, it always is.

    No other rank leaves before the first one has left: the launcher kills all when one ends, which
    would cut the report short. One that was killed over it is not waited for long.
    """
    is_first, store = _claim(text)
    try:
        yield is_first
    finally:
        printed = f"printed/{_digest(text)}"
        with contextlib.suppress(*GONE):
            if store is not None and is_first:
                store.set(printed, "")
            elif store is not None:
                store.wait([printed], timedelta(seconds=TELLING))


def _claim(text: str) -> tuple[bool, Store | None]:
    """Whether no rank has claimed a text before, and the store that knows, if one does.

    Ranks meet in the launcher's store, which stands before a process group does and after it
    broke; if that is gone, ranks of one machine meet in its folder of temporary files.
    """
    if not has_agent_store():
        return os.environ.get("RANK", "0") == "0", None
    try:
        store = attempt_store()
        return store.add(f"said/{_digest(text)}", 1) == 1, store
    except GONE:
        name = f"dtcp-{os.environ.get('TORCHELASTIC_RUN_ID')}-{attempt_name()}-{_digest(text)}"
        path = Path(tempfile.gettempdir(), _digest(name))
        with contextlib.suppress(OSError):
            try:
                path.open("x").close()
            except FileExistsError:
                return False, None
        return True, None


def _digest(text: str) -> str:
    # A path may have bytes that are no text.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def was_said(text: str) -> bool:
    """Whether some rank of this attempt has reported this text; waits for one that is about to."""
    if not has_agent_store() or not attempt_store().add(f"said/{_digest(text)}", 0):
        return False
    with said_once(text):  # as one of those that are not the first
        return True


@dataclass
class FailureReport:
    """A context whose exceptions are reported as failures of a run, and end it with code 1.

    With REFUSED, where the launcher is ours and is to know that a new start would fare no better.
    An interruption from the keyboard and a request to exit pass through.

    Args:
        folder: where tracebacks go; None keeps none of an error that explains itself.
    """

    folder: Path | None = None
    attempt: Attempt | None = None
    """Set once ranks have met: who can be named if it is lost."""
    is_starting: bool = False
    """Set as long as no step has been taken: what refuses a run then would refuse it again."""

    def __enter__(self) -> "FailureReport":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # DCP's exception, which holds those of the ranks, is not an Exception.
        if isinstance(error, Exception | CheckpointException):
            say_failure(error, self.folder, self.attempt)
            refused = self.is_starting and isinstance(error, EXPLAINED)
            lasts = refused and not isinstance(error, AbsentRanks) and of_this_launcher()
            raise SystemExit(REFUSED if lasts else 1) from error


def say_failure(error: BaseException, folder: Path | None, attempt: Attempt | None = None) -> None:
    """Print the error once, and leave the traceback of each rank in a file.

    The first rank that fails prints. A rank that failed with other words of its own adds a line;
    one that lost another rank speaks only where nobody else knows why.
    """
    path = None if folder is None else _keep_traceback(error, folder)
    where = "" if path is None else f" (traceback: {path})"
    if attempt is not None and attempt.peers and is_of_peers(error):
        _say_loss(error, attempt, where)
        return
    if isinstance(error, GONE) and not has_agent_store() and not dist.is_initialized():
        # Of ranks that no agent started each speaks for itself: they have no other place to meet.
        print(f"error: {_no_meeting(error)}{where}", file=sys.stderr, flush=True)
        return
    text = str(error).strip() or type(error).__name__
    with said_once(text) as is_first:
        if is_first:
            _say_own(error, text, where)
    if attempt is None and not isinstance(error, AbsentRanks | RefusedTogether):
        tell_others(text)


def _no_meeting(error: BaseException) -> str:
    address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return (
        f"All ranks meet in a store of rank 0, got rank {os.environ.get('RANK')} alone at "
        f"MASTER_ADDR:MASTER_PORT={address} ({' '.join(str(error).split())[:120]}): look at both "
        f"variables, at the network and at the other ranks, or raise --comm.init_timeout_seconds."
    )


def _say_own(error: BaseException, text: str, where: str) -> None:
    with said_once(A_FAILURE) as is_first:
        if not is_first:
            line = text.splitlines()[0][:200]
            print(f"rank {os.environ.get('RANK')} then failed too: {line}", file=sys.stderr)
        elif isinstance(error, EXPLAINED):
            print(f"error: {text}{where}", file=sys.stderr, flush=True)
        elif isinstance(error, OSError) and error.errno in OF_DISKS:
            file = f" at {error.filename}" if error.filename else ""
            print(
                f"error: A run's disks take what it writes, got {error.strerror}{file}: make room "
                f"there or write elsewhere, and start again to go on from the last "
                f"checkpoint{where}.",
                file=sys.stderr,
                flush=True,
            )
        else:
            traceback.print_exception(error)


def _say_loss(error: BaseException, attempt: Attempt, where: str) -> None:
    """Name the ranks that this one waited for in vain, unless they have spoken themselves."""
    try:
        lost = attempt.lost()
        if was_said(A_FAILURE):
            return
    except GONE:
        host, port = agent_address()
        text = (
            f"error: the launcher of rank 0 at {host}:{port} is out of reach: its machine ended, "
            f"or the network to it was cut; start again to go on from the last checkpoint."
        )
    else:
        named = ", ".join(map(str, lost[:8])) + (f" and {len(lost) - 8} more" if lost[8:] else "")
        cause = " ".join(str(error).split())[:200]
        text = (
            f"error: {named} gave no sign of life any more: killed, stopped or cut off; "
            f"start again to go on from the last checkpoint."
            if lost
            else f"error: ranks lost each other, and all are alive ({cause}): look at the network, "
            f"or raise --comm.train_timeout_seconds."
        )
    with said_once("a loss") as is_first:
        if is_first:
            print(f"{text}{where}", file=sys.stderr, flush=True)


def is_of_peers(error: BaseException) -> bool:
    """Whether another rank's end is what this one failed for."""
    if isinstance(error, CheckpointException):
        return any(is_of_peers(each) for each, _ in error.failures.values())
    return isinstance(error, OF_PEERS) or any(text in str(error) for text in OF_GLOO)


def _keep_traceback(error: BaseException, folder: Path) -> Path | None:
    """The file that a traceback was written to; None where the folder takes none."""
    path = folder / "errors" / f"rank_{os.environ.get('RANK', '0')}.txt"
    text = "".join(traceback.format_exception(error))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError:
        return None
    return path


@contextlib.contextmanager
def usage_errors_once() -> Iterator[None]:
    """Print what a command-line parser says before it exits on one rank only."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit:
        if said.getvalue():
            with said_once(said.getvalue()) as is_first:
                if is_first:
                    print(said.getvalue(), file=sys.stderr, end="", flush=True)
            tell_others(said.getvalue().strip())
        raise

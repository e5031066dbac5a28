"""What a run says when it fails: once, in one line, whichever ranks fail."""

import contextlib
import hashlib
import io
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from torch.distributed import DistNetworkError, DistStoreError, TCPStore

# Errors that state a contract, its value and its remedy: their text is all there is to know.
EXPLAINED = (ValueError, TypeError, FileNotFoundError, NotImplementedError)


def first_to_say(text: str) -> bool:
    """Whether this rank is the first to report this text. Alone, it always is.

    Ranks meet in the launcher's store, which stands before a process group does and after it
    broke.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return os.environ.get("RANK", "0") == "0"
    key = "dtcp/said/" + hashlib.sha256(text.encode()).hexdigest()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(key, 1) == 1
    except (DistNetworkError, DistStoreError):
        # The launcher is gone: better twice than never.
        return True


@dataclass(frozen=True)
class FailureReport:
    """A context whose exceptions are reported as failures of a run, and end it with code 1.

    An interruption from the keyboard and a request to exit pass through.

    Args:
        folder: where tracebacks go; None keeps none of an error that explains itself.
    """

    folder: Path | None = None

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            say_failure(error, self.folder)
            raise SystemExit(1) from error


def say_failure(error: BaseException, folder: Path | None) -> None:
    """Print the error once, and leave the traceback of each rank in a file.

    The first rank that fails prints. A rank that failed with other words adds one line: most
    often it only lost its peer.
    """
    text = str(error).strip() or type(error).__name__
    where = "" if folder is None else f"\n(traceback: {_keep_traceback(error, folder)})"
    if not first_to_say(text):
        return
    if not first_to_say("a failure"):
        line = text.splitlines()[0][:200]
        print(f"rank {os.environ.get('RANK')} then failed too: {line}", file=sys.stderr)
    elif isinstance(error, EXPLAINED):
        print(f"error: {text}{where}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


def _keep_traceback(error: BaseException, folder: Path) -> Path:
    path = folder / "errors" / f"rank_{os.environ.get('RANK', '0')}.txt"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)))
    return path


@contextlib.contextmanager
def usage_errors_once() -> Iterator[None]:
    """Print what a command-line parser says before it exits on one rank only."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit:
        if said.getvalue() and first_to_say(said.getvalue()):
            print(said.getvalue(), file=sys.stderr, end="", flush=True)
        raise

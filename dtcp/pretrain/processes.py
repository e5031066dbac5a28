"""Ranks begin together, and end with their launcher, whatever ends it."""

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1
"""Of Linux' prctl(2): the signal to get when the thread that made this process ends."""
POLL_SECONDS = 1.0


def die_with(parent: int) -> None:
    """Be killed as soon as the process `parent`, which started this one, is gone.

    A launcher that is killed by SIGKILL can notify nobody. Linux signals its children; elsewhere a
    thread checks once a second.

    Args:
        parent: its process id, known before this process could miss its end.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    # It may have ended before this was set up.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class Gate:
    """Holds forked ranks back until all are forked; made by their launcher, before the first.

    A rank is forked with the locks that threads of the launcher hold, and nobody in it opens them.
    Where an earlier rank already called, a thread of the launcher's store was looking up its name
    (getnameinfo), and the next rank hung in its own first look-up: 4 of 920 forks, by trial.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def open(self, ranks: int) -> None:
        """Of the launcher, once all of them are forked: let them go."""
        os.write(self._write, bytes(ranks))

    def close(self) -> None:
        """Of the launcher, at the end: ranks that still wait were not to begin, and end."""
        os.close(self._write)
        os.close(self._read)

    def wait(self) -> None:
        """Of a rank, once: until it is let go.

        Raises:
            SystemExit: a later rank could not be forked, or the launcher was stopped.
        """
        os.close(self._write)
        is_open = os.read(self._read, 1)
        os.close(self._read)
        if not is_open:
            sys.exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)

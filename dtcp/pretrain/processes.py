"""Processes that outlive nobody: ranks end with their launcher, whatever ends it."""

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

    A launcher that is killed by SIGKILL can tell nobody. Linux tells its children by itself;
    elsewhere a thread looks once a second.

    Args:
        parent: its process id, known before this process could miss its end.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    # It may have ended before anybody was asked to tell.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)

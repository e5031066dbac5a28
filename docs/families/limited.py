"""Check one model in a process of its own, which may take only so much time and memory."""

import contextlib
import os
import resource
import signal
import traceback
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection

import transformers

from docs.families.cases import Case
from dtcp.check import CheckedHuggingFaceModel, CheckOptions, Outcome, outcome_of_check

SECONDS = 300
"""Of the clock, for all ranks of one check; on a quiet machine none takes 40."""

MEMORY = 4 * 2**30
"""Bytes of data of each process."""


def outcome_of(case: Case, options: CheckOptions) -> Outcome:
    """Check a model in a forked process and its forked ranks; all end with this call."""
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(case, options, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            return _of_now(Outcome("stopped", f"no answer after {SECONDS} s"))
        return _of_now(ours.recv())
    except EOFError:
        return _of_now(Outcome("stopped", "the process ended without an answer"))
    finally:
        # It and its ranks are a group of their own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _of_now(outcome: Outcome) -> Outcome:
    return replace(outcome, transformers=transformers.__version__)


def _answer(case: Case, options: CheckOptions, pipe: Connection) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        checked = CheckedHuggingFaceModel(case.model_type, case.change)
        outcome = outcome_of_check(checked, options)
    # The check promises a sentence for every model there is, so any other error of any class is the
    # finding: it is sent to the parent as a traceback, and a table with one fails its test.
    except Exception:  # noqa: BLE001
        outcome = Outcome("traceback", traceback.format_exc())
    pipe.send(outcome)

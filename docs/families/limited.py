"""Check one model in a process of its own, which may take only so much time and memory."""

import contextlib
import os
import resource
import signal
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection

from docs.families.cases import Case
from docs.families.outcome import Outcome
from dtcp.check import CheckedHuggingFaceModel, CheckOptions, check_model
from dtcp.check.ranks import REFUSALS

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
            return Outcome("stopped", f"no answer after {SECONDS} s")
        return ours.recv()
    except EOFError:
        return Outcome("stopped", "the process ended without an answer")
    finally:
        # It and its ranks are a group of their own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _answer(case: Case, options: CheckOptions, pipe: Connection) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        outcome = _check(case, options)
    # The check promises a sentence for every model there is, so any other error of any class is the
    # finding: it is sent to the parent as a traceback, and a table with one fails its test.
    except Exception:  # noqa: BLE001
        outcome = Outcome("traceback", traceback.format_exc())
    pipe.send(outcome)


def _check(case: Case, options: CheckOptions) -> Outcome:
    """The verdict of python -m dtcp.check, eager and compiled."""
    checked = CheckedHuggingFaceModel(case.model_type, case.change)
    try:
        report = check_model(checked, options, say=lambda _: None)
    except (*REFUSALS, ImportError) as error:
        return Outcome("refused", f"{error}")
    if report.mixing.refused:
        return Outcome("refused", "\n".join(report.mixing.refused))
    worst = max(max(run.errors.values()) for run in report.runs.values())
    failures = sorted({name for run in report.runs for name in report.failures(run)})
    verdict = "passed" if report.passed else "failed"
    return Outcome(verdict, ", ".join(failures), float(f"{worst:.0e}"), len(report.runs) > 1)

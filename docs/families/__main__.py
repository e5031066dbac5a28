"""Check every language model of transformers: python -m docs.families [model types] [--again].

Goes on where it stopped: results.json is written after each check. The page is made at the end.
"""

import argparse
import sys
import time
from collections.abc import Iterator

import torch
import transformers
from transformers.utils import logging as transformers_logging

from docs.families.cases import Case, all_cases
from docs.families.limited import outcome_of
from docs.families.outcome import NOT_RUN, RESULTS, Results
from docs.families.page import PAGE, VERDICTS, page_of
from dtcp.check.matrix import CHECKS, FIRST
from dtcp.check.ranks import import_compiler


def main(argv: list[str]) -> int:
    """Run what is asked for; 0 if there is no traceback and nothing out of bound."""
    arguments = _parser().parse_args(argv)
    transformers_logging.set_verbosity_error()
    cases = all_cases()
    results = _results(cases)
    again = set(arguments.again if arguments.again != [] else VERDICTS)
    chosen = list(_chosen(cases, results, arguments, again))
    # Ranks are forked from here: once imported, never again.
    torch.set_num_threads(1)
    import_compiler()
    started = time.monotonic()
    for number, (case, check) in enumerate(chosen, 1):
        if time.monotonic() - started > arguments.seconds:
            print(f"stopped after {arguments.seconds} s, {len(chosen) - number + 1} checks to go")
            break
        first = results.outcome(case.name, FIRST)
        if check != FIRST and first is not None and first.verdict != "passed":
            continue
        outcome = outcome_of(case, CHECKS[check])
        results.outcomes.setdefault(case.name, {})[check] = outcome
        results.write()
        print(f"{number}/{len(chosen)} {case.name}, {check}: {outcome.verdict}", flush=True)
    PAGE.write_text(page_of(results))
    bad = 0
    for check in CHECKS:
        counts = results.counts(check)
        print(check, ", ".join(f"{counts.get(each, 0)} {each}" for each in (*VERDICTS, NOT_RUN)))
        bad += sum(counts.get(verdict, 0) for verdict in VERDICTS[2:])
    return int(bad > 0)


def _chosen(
    cases: list[Case], results: Results, arguments: argparse.Namespace, again: set[str]
) -> Iterator[tuple[Case, str]]:
    """What to run: the first check of every model, then the second one of every model."""
    known = {case.model_type for case in cases}
    unknown = [each for each in arguments.types if each not in known]
    if unknown:
        sys.exit(f"error: model types are those of transformers, got {unknown}.")
    for check in arguments.checks:
        for case in cases:
            outcome = results.outcome(case.name, check)
            if arguments.types:
                if case.model_type in arguments.types:
                    yield case, check
            elif (
                outcome is None
                or outcome.verdict in again
                or outcome.transformers != transformers.__version__
            ):
                yield case, check


def _results(cases: list[Case]) -> Results:
    """Those there are, of this torch and these cases."""
    version = torch.__version__.partition("+")[0]
    results = Results(version)
    if RESULTS.exists():
        stored = Results.read()
        if stored.torch == version:
            names = {case.name for case in cases}
            results.outcomes = {n: each for n, each in stored.outcomes.items() if n in names}
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m docs.families", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types to check again; all by default")
    parser.add_argument(
        "--again",
        nargs="*",
        default=["failed", "traceback", "stopped"],
        metavar="VERDICT",
        help="checks again that came out so; all, without a verdict",
    )
    parser.add_argument(
        "--checks", nargs="+", choices=list(CHECKS), default=list(CHECKS), help="these checks only"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then start no more")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

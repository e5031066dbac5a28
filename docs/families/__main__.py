"""Check every language model of transformers: python -m docs.families [model types] [--again].

Goes on where it stopped: results.json is written after each model. The page is made at the end.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
import transformers
from transformers.utils import logging as transformers_logging

from docs.families.cases import MESHES, Case, all_cases
from docs.families.limited import outcome_of
from docs.families.outcome import RESULTS, Outcome, Results
from docs.families.page import PAGE, VERDICTS, page_of
from dtcp.check.ranks import import_compiler


def main(argv: list[str]) -> int:
    """Run what is asked for; 0 if there is no traceback and nothing out of bound."""
    arguments = _parser().parse_args(argv)
    transformers_logging.set_verbosity_error()
    cases = all_cases()
    results = _results(cases)
    again = set(arguments.again if arguments.again != [] else VERDICTS)
    chosen = [case for case in cases if case.model_type in arguments.types] or [
        case for case in cases if again & _verdicts(results, case) or not _verdicts(results, case)
    ]
    # Ranks are forked from here: once imported, never again.
    torch.set_num_threads(1)
    import_compiler()
    started = time.monotonic()
    for number, case in enumerate(chosen, 1):
        if time.monotonic() - started > arguments.seconds:
            print(f"stopped after {arguments.seconds} s, {len(chosen) - number + 1} to go")
            break
        before = {} if arguments.types else results.outcomes.get(case.name, {})
        kept = {mesh: each for mesh, each in before.items() if each.verdict not in again}
        results.outcomes[case.name] = outcomes = _outcomes(case, kept, eager=arguments.eager)
        results.write()
        said = "; ".join(f"{mesh}: {each.verdict}" for mesh, each in outcomes.items())
        print(f"{number}/{len(chosen)} {case.name}: {said}", flush=True)
    PAGE.write_text(page_of(results))
    for mesh in MESHES:
        counts = results.counts(mesh)
        print(mesh, ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in VERDICTS))
    return int(any(results.counts(mesh).get(v) for mesh in MESHES for v in VERDICTS[2:]))


def _outcomes(case: Case, kept: Mapping[str, Outcome], *, eager: bool) -> dict[str, Outcome]:
    """By mesh. What is refused on cp alone is refused beside tp, and is not run again.

    Args:
        kept: what is not asked again.
    """
    outcomes: dict[str, Outcome] = {}
    for mesh, options in MESHES.items():
        if mesh in kept:
            outcomes[mesh] = kept[mesh]
            continue
        before = next(iter(outcomes.values()), None)
        refused = before is not None and before.verdict == "refused"
        options = replace(options, backend="") if eager else options
        outcomes[mesh] = before if refused else outcome_of(case, options)
    return outcomes


def _verdicts(results: Results, case: Case) -> set[str]:
    return {outcome.verdict for outcome in results.outcomes.get(case.name, {}).values()}


def _results(cases: list[Case]) -> Results:
    """Those there are, of these versions and cases."""
    versions = (transformers.__version__, torch.__version__.partition("+")[0])
    results = Results(*versions)
    if RESULTS.exists():
        stored = Results.read()
        if (stored.transformers, stored.torch) == versions:
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
        help="those again that came out so on a mesh; all, without a verdict",
    )
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then start no more")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

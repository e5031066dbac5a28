"""The campaign on one GPU, in at most 8 minutes; it goes on where it was stopped.

    python -m benchmarks.gpu                            # or: make gpu
    python -m benchmarks.gpu --stages speed --again
    python -m benchmarks.gpu --report                   # results -> a page and plots
    python -m benchmarks.gpu --prepare                  # wheels for a machine without a network

Each measured case is a line of JSON in the results folder, by stage. Without a GPU it says what it
would run and what is prepared.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.report import write_report
from benchmarks.gpu.run import run_stage, summary
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.wheels import TRANSFER, add_packages, describe_transfer, prepare

RESULTS = Path("build/gpu/results")


def main(arguments: Sequence[str]) -> int:
    """Run, report or prepare; the exit status."""
    args = _parsed(arguments)
    if args.prepare:
        print(prepare())
        return 0
    if args.report:
        print(write_report(args.results, Path(__file__).parents[1] / "results"))
        return 0
    stages = [stage for stage in STAGES if not args.stages or stage.name in args.stages]
    if not torch.cuda.is_available():
        print("There is no GPU here, so nothing is measured. On one, this would run:\n")
        for stage in stages:
            count = len(stage.cases("cuda"))
            print(f"  {stage.name:<11} {stage.question} {count} cases, {stage.seconds:.0f} s")
        print(f"\n{describe_transfer(TRANSFER)}")
        return 0
    print(add_packages())
    wrong = 0
    for stage in stages:
        wrong += run_stage(stage, args.results, again=args.again)
    print(summary(args.results))
    return 1 if wrong else 0


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="The campaign on one GPU."
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, help="some stages only")
    parser.add_argument("--again", action="store_true", help="measure what was measured already")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON lines")
    parser.add_argument("--report", action="store_true", help="turn results into a page and plots")
    parser.add_argument("--prepare", action="store_true", help="fetch and pack wheels")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

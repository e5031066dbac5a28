"""The campaign on one GPU, in at most 8 minutes; it goes on where it was stopped.

    python -m benchmarks.gpu                            # or: make gpu
    python -m benchmarks.gpu --stages speed --again
    python -m benchmarks.gpu --retry                    # what was wrong or failed, once more
    python -m benchmarks.gpu --out FOLDER               # and a copy of what there is, at any time
    python -m benchmarks.gpu --limit 420                # over after so many seconds
    python -m benchmarks.gpu --report                   # results -> a page and plots
    python -m benchmarks.gpu --prepare                  # wheels for a machine without a network

Each measured case is a line of JSON in the results folder, by stage. A stage has a process and a
time of its own, so what hangs or crashes in one costs the others nothing. Without a GPU it says
what it would run and what is prepared.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.keep import LINES, keep, resume
from benchmarks.gpu.report import write_report
from benchmarks.gpu.run import forget_wrong, run_stage, summary, verdict
from benchmarks.gpu.stages import STAGES, Stage
from benchmarks.gpu.supervise import GRACE, supervise
from benchmarks.gpu.wheels import (
    TRANSFER,
    add_packages,
    compile_caches,
    describe_transfer,
    prepare,
    unpack_whole,
)

RESULTS = Path("build/gpu/results")


def main(arguments: Sequence[str]) -> int:
    """Run, report or prepare; the exit status."""
    args, start = _parsed(arguments), time.monotonic()
    if args.prepare:
        print(prepare())
        return 0
    if args.report:
        print(write_report(args.results, Path(__file__).parents[1] / "results"))
        return 0
    stages = [stage for stage in STAGES if not args.stages or stage.name in args.stages]
    if args.child:
        add_packages()
        (stage,) = (stage for stage in STAGES if stage.name == args.child)
        limits = {"seconds": args.seconds, "worker": args.worker}
        run_stage(stage, args.results, again=False, **limits)
        return 0
    if not torch.cuda.is_available():
        print(_plan(stages))
        return 0
    unpack_whole()
    print(add_packages())
    names = [stage.name for stage in stages]
    if args.again:
        for name in names:
            (args.results / f"{name}.jsonl").unlink(missing_ok=True)
    if args.resume:
        resume(args.resume, args.results)
    if args.retry:
        forget_wrong(args.results, names)
    os.environ.update(compile_caches())
    wrong = 0
    for stage in stages:
        left = args.limit - GRACE - (time.monotonic() - start)
        if left <= 0:
            print(f"{stage.name}: the limit of {args.limit:.0f} s is reached, left for another run")
            continue
        seconds = min(stage.seconds, left)
        wrong += supervise(stage.name, seconds, args.results, workers=stage.workers)
        if args.out:
            keep(args.results, args.out)
    print(summary(args.results))
    if args.out:
        print(write_report(args.results, args.out))
    print(verdict(args.results, names))
    return 1 if wrong else 0


def _plan(stages: Sequence[Stage]) -> str:
    """What would run on a GPU, and what is prepared for a machine that has one and no network."""
    lines = ["There is no GPU here, so nothing is measured. On one, this would run:", ""]
    for stage in stages:
        count = len(stage.cases("cuda"))
        lines.append(f"  {stage.name:<11} {stage.question} {count} cases, {stage.seconds:.0f} s")
    return "\n".join([*lines, "", describe_transfer(TRANSFER)])


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="The campaign on one GPU."
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, help="some stages only")
    parser.add_argument("--again", action="store_true", help="measure what was measured already")
    parser.add_argument("--retry", action="store_true", help="measure again what was wrong")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds for all stages together"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON lines")
    parser.add_argument(
        "--out", type=Path, help="folder for a copy of the results, kept up after every stage"
    )
    parser.add_argument(
        "--resume", type=Path, help=f"lines of an earlier run to go on from: a {LINES} of --out"
    )
    parser.add_argument("--report", action="store_true", help="turn results into a page and plots")
    parser.add_argument("--prepare", action="store_true", help="fetch and pack wheels")
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

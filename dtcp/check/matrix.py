"""One model checked in several ways: compiled, beside tp, by other strategies.

`python -m dtcp.check --matrix` runs them all for one model, and the table of families is made of
the same runs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dtcp.check.checked_model import CheckedModel
from dtcp.check.parity import CheckOptions
from dtcp.check.ranks import REFUSALS, CheckReport, RankFailed, check_model
from dtcp.distributed.mesh import Degrees
from dtcp.softmax import AllGatherAttention, UlyssesAttention

CP = Degrees(cp=2)

CHECKS: Mapping[str, CheckOptions] = {
    "cp 2": CheckOptions(CP, backend=""),
    "compiled": CheckOptions(CP),
    "cp 2 x tp 2": CheckOptions(Degrees(cp=2, tp=2), backend=""),
    "all-gather": CheckOptions(CP, AllGatherAttention(), backend=""),
    "Ulysses": CheckOptions(CP, UlyssesAttention(), backend=""),
}
"""By name. Each of the others changes one thing of the first, which is eager and a ring: what that
refuses, they all refuse."""

FIRST = next(iter(CHECKS))


@dataclass(frozen=True)
class Outcome:
    """The outcome of one check of one model.

    Args:
        verdict: "passed"; "refused" in a sentence; "failed", out of bound; "traceback"; or
            "stopped" by limits of time and memory.
        reason: why it did not pass.
        error: the largest relative error of loss and gradients, where they were compared.
        mixers: the kinds of masks and mixers by which its tokens meet.
        packed: whether rows were packed documents; single ones, where modules keep losses.
        transformers: the version that it was run with.
    """

    verdict: str
    reason: str = ""
    error: float = 0.0
    mixers: tuple[str, ...] = ()
    packed: bool = True
    transformers: str = ""


def outcome_of_check(checked: CheckedModel, options: CheckOptions) -> Outcome:
    """Check a model once."""
    try:
        report = check_model(checked, options, say=lambda _: None)
    except (*REFUSALS, ImportError) as error:
        return Outcome("refused", f"{error}")
    except RankFailed as error:
        return Outcome("traceback", f"{error}")
    return _outcome(report)


def _outcome(report: CheckReport) -> Outcome:
    if report.mixing.refused:
        return Outcome("refused", "\n".join(report.mixing.refused))
    runs = list(report.runs.values())
    worst = max(max(run.errors.values()) for run in runs)
    failures = sorted({name for run in report.runs for name in report.failures(run)})
    return Outcome(
        "passed" if report.passed else "failed",
        reason=", ".join(failures),
        error=float(f"{worst:.0e}"),
        mixers=runs[0].kinds,
        packed=runs[0].packed,
    )


def matrix(checked: CheckedModel) -> Iterator[tuple[str, Outcome]]:
    """Each check by name, as it ends; only the first one if that does not pass."""
    for name, options in CHECKS.items():
        outcome = outcome_of_check(checked, options)
        yield name, outcome
        if name == FIRST and outcome.verdict != "passed":
            return

"""The table as a page of the documentation."""

import re
from collections.abc import Iterator
from pathlib import Path

from docs.families.cases import MESHES
from docs.families.outcome import Outcome, Results

PAGE = Path(__file__).parents[1] / "families.md"

VERDICTS = ("passed", "refused", "failed", "traceback", "stopped")

LONGEST = 260
"""Characters of a reason that are shown; results.json has them all."""

_TITLE = """# Every language model of transformers

What `python -m dtcp.check --hf-config NAME --cp 2` and `... --cp 2 --tp 2` say of a tiny model of
every causal and every masked language model (encoders) that transformers {transformers} has, with
torch {torch}. *Passed*: loss and every gradient are equal to one device in fp64. *Refused*: a
sentence instead of a wrong result. Dropout is set to 0, and an encoder that can be a decoder is
checked as both. One command makes the table and brings it up to date:

```
python -m docs.families                    # those without an answer yet; --eager: not compiled
python -m docs.families --again refused    # these again; all, without a word
python -m docs.families bert opt           # the model types again
```
"""


def page_of(results: Results) -> str:
    """The page that shows these results."""
    versions = {"transformers": results.transformers, "torch": results.torch}
    return "\n".join(
        [
            _TITLE.format(**versions),
            *_counts(results),
            "## Sharded\n",
            *_passed(results),
            "\n## Refused\n",
            *_refused(results),
            "",
        ]
    )


def _counts(results: Results) -> Iterator[str]:
    yield f"| {len(results.outcomes)} models | " + " | ".join(VERDICTS) + " |"
    yield "|---" * (1 + len(VERDICTS)) + "|"
    for mesh in MESHES:
        counts = results.counts(mesh)
        cells = " | ".join(f"{counts.get(verdict, 0)}" for verdict in VERDICTS)
        yield f"| {mesh} | {cells} |"
    yield ""


def _passed(results: Results) -> Iterator[str]:
    """Models that pass on cp, each with what tp adds."""
    cp, cp_tp = MESHES
    yield f"| `--hf-config` | {cp} | {cp_tp} |\n|---|---|---|"
    for name, meshes in sorted(results.outcomes.items()):
        if meshes[cp].verdict == "passed":
            yield f"| {_title(name)} | {_cell(meshes[cp])} | {_cell(meshes[cp_tp])} |"


def _refused(results: Results) -> Iterator[str]:
    cp = next(iter(MESHES))
    yield "| `--hf-config` | why |\n|---|---|"
    for name, meshes in sorted(results.outcomes.items()):
        if meshes[cp].verdict != "passed":
            yield f"| {_title(name)} | {_cell(meshes[cp])} |"


def _title(name: str) -> str:
    """What was checked, without the dropout that was set to 0."""
    model_type, *settings = name.replace(" --set ", " ").split(" ")
    shown = [each for each in settings if not each.endswith("=0.0")]
    return f"`{' --set '.join([model_type, *shown])}`"


def _cell(outcome: Outcome) -> str:
    if outcome.verdict == "passed":
        return "passed, compiled too" if outcome.compiled else "passed"
    # Of several sentences the first, and of a traceback the last line.
    lines = outcome.reason.strip().splitlines() or [""]
    reason = lines[-1] if outcome.verdict == "traceback" else lines[0]
    reason = re.sub(r"([|<>*_\[\]`])", r"\\\1", reason)
    reason = reason if len(reason) <= LONGEST else f"{reason[:LONGEST]}..."
    more = f" (and {len(lines) - 1} more)" if outcome.verdict == "refused" and lines[1:] else ""
    verdict = "" if outcome.verdict == "refused" else f"**{outcome.verdict}**: "
    return f"{verdict}{reason}{more}"

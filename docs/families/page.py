"""The table as a page of the documentation."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from docs.families.outcome import NOT_RUN, Results
from dtcp.check import Outcome
from dtcp.check.matrix import CHECKS, FIRST

PAGE = Path(__file__).parents[1] / "families.md"

VERDICTS = ("passed", "refused", "failed", "traceback", "stopped")

LONGEST = 260
"""Characters of a reason that are shown; results.json has them all."""

WINDOWS = {"SlidingWindow": "window", "AttentionChunks": "chunks", "BlockBidirectional": "blocks"}
RECURRENT = {
    "GatedDeltaRule": "delta rule",
    "GatedLinearAttention": "linear attention",
    "CausalConv1d": "convolution",
    "SelectiveScan": "selective scan",
    "CrossAttention": "cross attention",
    "SparseLatentAttention": "picked tokens",
    "SparseBlockAttention": "picked blocks",
    "ScoredBlockAttention": "picked blocks",
    "CompressedSparseAttention": "compressed entries",
}
"""Kinds of masks and mixers, as the table calls them; plain ones have no name there."""

_TITLE = """# Every language model of transformers

What `python -m dtcp.check --hf-config NAME --matrix` says of a tiny model of every causal language
model, every masked one (encoders), every text model of encoder and decoder, and every model that
reads images and text and gives text, that transformers has, with torch {torch} (and timm and scipy,
where transformers needs them). A check that *passed* found loss and every gradient equal to one
device in fp64; what is *refused* is refused in a sentence instead of a wrong result. Dropout is set
to 0; an encoder that can be a decoder is checked as both, and so is a decoder that can do without
its encoder. Rows are text alone: of models that read images the language model is checked, within
the whole model; rows with images are [tested](transformers.md#images) for some of them.

- **cp 2**: eager, by a ring; *compiled*, *all-gather* and *Ulysses* change one thing of it, and
  **cp 2 x tp 2** adds tensor parallelism. `HaloAttention` takes the windows of any of them.
- **packed**: rows were three packed documents that the shards cut. A model whose modules keep
  losses of their own (routers) is checked on single ones.
- **beside**: how tokens meet besides plain attention.
- **version**: of transformers that the checks were run with. A dash: not run yet.

One command makes the table and brings it up to date; it goes on where it was stopped:

```
python -m docs.families                             # what has no answer yet, for this transformers
python -m docs.families --again refused             # these again; all, without a word
python -m docs.families --checks compiled --seconds 600    # one column, for ten minutes
python -m docs.families bert opt                    # the model types again
```

For a config of your own: `python -m dtcp.check --hf-config path/to/config.json --matrix`.
"""


def page_of(results: Results) -> str:
    """The page that shows these results."""
    return "\n".join(
        [
            _TITLE.format(torch=results.torch),
            *_counts(results),
            "## Sharded\n",
            *_passed(results),
            "\n## Refused in one way of several\n",
            *_refused_in_part(results),
            "\n## Refused\n",
            *_refused(results),
            "",
        ]
    )


def _counts(results: Results) -> Iterator[str]:
    shown = (*VERDICTS, NOT_RUN)
    yield f"| {len(results.outcomes)} models | " + " | ".join(shown) + " |"
    yield "|---" * (1 + len(shown)) + "|"
    for check in CHECKS:
        counts = results.counts(check)
        cells = " | ".join(f"{counts.get(verdict, 0)}" for verdict in shown)
        yield f"| {check} | {cells} |"
    yield ""


def _passed(results: Results) -> Iterator[str]:
    """Models that pass on cp, each with what else they pass."""
    columns = ("`--hf-config`", "beside", "packed", *CHECKS, "version")
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for name, checks in sorted(results.outcomes.items()):
        first = checks[FIRST]
        if first.verdict != "passed":
            continue
        found = [results.outcome(name, check) for check in CHECKS]
        cells = [_word(each) for each in found]
        # Of older runs only the verdict is known.
        known = [each.packed for each in found if each is not None and each.mixers]
        packed = ("yes" if all(known) else "single") if known else "-"
        versions = sorted({each.transformers for each in found if each is not None})
        row = (_title(name), _beside(found), packed, *cells, ", ".join(versions))
        yield f"| {' | '.join(row)} |"


def _beside(found: Sequence[Outcome | None]) -> str:
    kinds = {kind for each in found if each is not None for kind in each.mixers}
    names = {**WINDOWS, **RECURRENT}
    return ", ".join(text for kind, text in names.items() if kind in kinds)


def _word(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    words = {"passed": "yes", "refused": "no"}
    return words.get(outcome.verdict, f"**{outcome.verdict}**")


def _refused_in_part(results: Results) -> Iterator[str]:
    yield "| `--hf-config` | check | why |\n|---|---|---|"
    for name, checks in sorted(results.outcomes.items()):
        if checks[FIRST].verdict == "passed":
            for check, outcome in checks.items():
                if outcome.verdict != "passed":
                    yield f"| {_title(name)} | {check} | {_reason(outcome)} |"


def _refused(results: Results) -> Iterator[str]:
    yield "| `--hf-config` | why |\n|---|---|"
    for name, checks in sorted(results.outcomes.items()):
        if checks[FIRST].verdict != "passed":
            yield f"| {_title(name)} | {_reason(checks[FIRST])} |"


def _title(name: str) -> str:
    """What was checked, without the dropout that was set to 0."""
    model_type, *settings = name.replace(" --set ", " ").split(" ")
    shown = [each for each in settings if not each.endswith("=0.0")]
    return f"`{' --set '.join([model_type, *shown])}`"


def _reason(outcome: Outcome) -> str:
    # Of several sentences the first, and of a traceback the last line.
    lines = outcome.reason.strip().splitlines() or [""]
    reason = lines[-1] if outcome.verdict == "traceback" else lines[0]
    reason = re.sub(r"([|<>*_\[\]`])", r"\\\1", reason)
    reason = reason if len(reason) <= LONGEST else f"{reason[:LONGEST]}..."
    more = f" (and {len(lines) - 1} more)" if outcome.verdict == "refused" and lines[1:] else ""
    verdict = "" if outcome.verdict == "refused" else f"**{outcome.verdict}**: "
    return f"{verdict}{reason}{more}"

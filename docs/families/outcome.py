"""What came of each check, kept in a file that a run goes on with."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dtcp.check import Outcome
from dtcp.check.matrix import FIRST

RESULTS = Path(__file__).with_name("results.json")


@dataclass
class Results:
    """Outcomes by what was checked and by check, and the version of torch that they hold for."""

    torch: str
    outcomes: dict[str, dict[str, Outcome]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path = RESULTS) -> "Results":
        stored = json.loads(path.read_text())
        outcomes = {
            name: {check: _read(values) for check, values in checks.items()}
            for name, checks in stored["outcomes"].items()
        }
        return cls(stored["torch"], outcomes)

    def write(self, path: Path = RESULTS) -> None:
        """Replace the file, whole or not at all."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True)
        part = path.with_suffix(".part")
        part.write_text(f"{text}\n")
        os.replace(part, path)

    def outcome(self, name: str, check: str) -> Outcome | None:
        """Of a check of a model; None if it was not run. What does not pass the first one is not
        asked again in other ways."""
        checks = self.outcomes.get(name, {})
        first = checks.get(FIRST)
        if first is not None and first.verdict != "passed":
            return first
        return checks.get(check)

    def counts(self, check: str) -> Mapping[str, int]:
        """How many models came out how, "not run" among them."""
        outcomes = [self.outcome(name, check) for name in self.outcomes]
        return Counter(NOT_RUN if each is None else each.verdict for each in outcomes)


NOT_RUN = "not run"


def _read(values: Mapping[str, object]) -> Outcome:
    return Outcome(**{**values, "mixers": tuple(values["mixers"])})  # type: ignore[arg-type]

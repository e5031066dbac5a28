"""What came of each check, kept in a file that a run goes on with."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")


@dataclass(frozen=True)
class Outcome:
    """Of one model on one mesh.

    Args:
        verdict: "passed"; "refused" in a sentence; "failed", out of bound; "traceback"; or
            "stopped" by the limits of time and memory.
        reason: why it did not pass.
        error: the largest relative error of loss and gradients, where they were compared.
        compiled: whether they were compared compiled, too.
    """

    verdict: str
    reason: str = ""
    error: float = 0.0
    compiled: bool = False


@dataclass
class Results:
    """Outcomes by what was checked and by mesh, and the versions that they hold for."""

    transformers: str
    torch: str
    outcomes: dict[str, dict[str, Outcome]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path = RESULTS) -> "Results":
        stored = json.loads(path.read_text())
        outcomes = {
            name: {mesh: Outcome(**values) for mesh, values in meshes.items()}
            for name, meshes in stored["outcomes"].items()
        }
        return cls(stored["transformers"], stored["torch"], outcomes)

    def write(self, path: Path = RESULTS) -> None:
        """Replace the file, whole or not at all."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True)
        part = path.with_suffix(".part")
        part.write_text(f"{text}\n")
        os.replace(part, path)

    def counts(self, mesh: str) -> Mapping[str, int]:
        """How many models came out how on a mesh."""
        return Counter(meshes[mesh].verdict for meshes in self.outcomes.values() if mesh in meshes)

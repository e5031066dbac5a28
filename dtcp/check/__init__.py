"""Proof that a model, on a mesh, is the model it was: `python -m dtcp.check --help`."""

from dtcp.check.parity import (
    Options,
    Outcome,
    Report,
    compare,
    run,
)
from dtcp.check.subject import HuggingFaceSubject, MixerSubject, Subject

__all__ = [
    "HuggingFaceSubject",
    "MixerSubject",
    "Options",
    "Outcome",
    "Report",
    "Subject",
    "compare",
    "run",
]

"""Prove that a model on a mesh is the model it was on one device: `python -m dtcp.check --help`."""

from dtcp.check.checked_model import CheckedHuggingFaceModel, CheckedMixerModel, CheckedModel
from dtcp.check.parity import (
    CheckOptions,
    CheckReport,
    ParityResult,
    check_model,
    compare,
)

__all__ = [
    "CheckOptions",
    "CheckReport",
    "CheckedHuggingFaceModel",
    "CheckedMixerModel",
    "CheckedModel",
    "ParityResult",
    "check_model",
    "compare",
]

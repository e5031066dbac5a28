"""Prove that a model on a mesh is the model it was on one device: `python -m dtcp.check --help`."""

from dtcp.check.checked_hf import CheckedHuggingFaceModel
from dtcp.check.checked_mixers import CheckedMixerModel
from dtcp.check.checked_model import CheckedModel
from dtcp.check.matrix import CHECKS, Outcome, matrix, outcome_of_check
from dtcp.check.parity import CheckOptions, ParityResult, compare
from dtcp.check.ranks import CheckReport, check_model

__all__ = [
    "CHECKS",
    "CheckOptions",
    "CheckReport",
    "CheckedHuggingFaceModel",
    "CheckedMixerModel",
    "CheckedModel",
    "Outcome",
    "ParityResult",
    "check_model",
    "compare",
    "matrix",
    "outcome_of_check",
]

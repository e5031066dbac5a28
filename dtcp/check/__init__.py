"""Prove that a model on a mesh is the model it was on one device: `python -m dtcp.check --help`."""

from dtcp.check.checked_hf import CheckedHuggingFaceModel
from dtcp.check.checked_mixers import CheckedMixerModel
from dtcp.check.checked_model import CheckedModel
from dtcp.check.parity import CheckOptions, ParityResult, compare
from dtcp.check.ranks import CheckReport, check_model

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

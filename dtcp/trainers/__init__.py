"""Training loops of others on a mesh: transformers' Trainer, those of TRL, and what they save."""

from dtcp.trainers.mixin import MeshTrainerMixin
from dtcp.trainers.saved import load_optimizer, load_weights, save_optimizer, save_weights

__all__ = [
    "MeshTrainerMixin",
    "load_optimizer",
    "load_weights",
    "save_optimizer",
    "save_weights",
]

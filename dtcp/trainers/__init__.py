"""Other libraries' training loops on a mesh: transformers' Trainer, TRL's, and what they save."""

from importlib.util import find_spec

if any(find_spec(name) is None for name in ("accelerate", "transformers")):
    raise ImportError(
        "dtcp.trainers serves Trainers of transformers, got none installed (or no accelerate): "
        "pip install 'dtcp[hf]'."
    )

from dtcp.trainers.mixin import MeshTrainerMixin
from dtcp.trainers.saved import load_optimizer, load_weights, save_optimizer, save_weights

__all__ = [
    "MeshTrainerMixin",
    "load_optimizer",
    "load_weights",
    "save_optimizer",
    "save_weights",
]

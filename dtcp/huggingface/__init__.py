"""Models of transformers, unmodified: their attention calls, routed to mixers."""

from dtcp.huggingface.batch import causal_lm_loss, documents_of, shard_hf_batch
from dtcp.huggingface.install import install_mixers
from dtcp.huggingface.survey import Attention, Survey, survey

__all__ = [
    "Attention",
    "Survey",
    "causal_lm_loss",
    "documents_of",
    "install_mixers",
    "shard_hf_batch",
    "survey",
]

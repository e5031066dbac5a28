"""Unmodified models of transformers, whose attention calls go to mixers."""

from dtcp.huggingface.batch import causal_lm_loss, prepare_hf_batch, shard_hf_batch
from dtcp.huggingface.documents import documents_of_hf_batch
from dtcp.huggingface.install import install_mixers
from dtcp.huggingface.recorder import SurveyedAttention
from dtcp.huggingface.stage_trial import stage_cut
from dtcp.huggingface.stages import HFStage, StageCut
from dtcp.huggingface.survey import Survey, survey
from dtcp.huggingface.whole_rows import WholeRows

__all__ = [
    "HFStage",
    "StageCut",
    "Survey",
    "SurveyedAttention",
    "WholeRows",
    "causal_lm_loss",
    "documents_of_hf_batch",
    "install_mixers",
    "prepare_hf_batch",
    "shard_hf_batch",
    "stage_cut",
    "survey",
]

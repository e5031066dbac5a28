"""train.py with Qwen3.5 and experts: trains, resumes, and exports what transformers loads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from dtcp.torchtitan.model_spec import spec_of

import pytest
import torch
from transformers import AutoModelForCausalLM

from dtcp.mixer_metadata import batch_metadata
from dtcp.models.qwen3_5 import Qwen35, config_from_hf, from_hf, tiny
from dtcp.parallelize.plans.families import QWEN3_5
from dtcp.pretrain.configs import qwen3_5_moe_tiny
from dtcp.pretrain.trainer import Trainer
from dtcp.sequence.documents import Documents
from tests.harness import hf_qwen3_5, train_run
from tests.harness.train_run import losses


def micro() -> Trainer.Config:
    """A delta layer and one of attention, experts, rows of 64 tokens, two ranks, eager, bf16."""
    config = qwen3_5_moe_tiny()
    shape = replace(tiny(272, experts=True), num_layers=2, full_attention_every=2, dim=32)
    config.model_spec = spec_of(QWEN3_5, "micro", shape)
    config.parallelism.tensor_parallel_degree = 1
    config.training.seq_len, config.training.steps = 64, 3
    config.training.mixed_precision_param = "bfloat16"
    config.lr_scheduler.warmup_steps = 0
    config.compile.enable = False
    config.checkpoint.interval, config.validator.enable = 2, False
    return config


def run(folder: Path) -> str:
    return train_run.trained(
        *("--dump_folder", str(folder), "--checkpoint.export_hf"),
        module="tests.pretrain.test_train_qwen3_5",
        config="micro",
    )


@pytest.mark.slow
def test_a_run_of_qwen3_5_resumes_alike_and_transformers_reads_its_export(tmp_path):
    first = losses(run(tmp_path))
    assert list(first) == [1, 2, 3] and first[3] < first[1]
    shutil.rmtree(tmp_path / "checkpoint/step-3")
    assert losses(run(tmp_path)) == {3: pytest.approx(first[3], rel=1e-6)}

    hf_qwen3_5.modeling("qwen3_5_moe")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ours = Qwen35(config_from_hf(json.loads((tmp_path / "hf/config.json").read_text())))
    ours.load_state_dict(from_hf(theirs.state_dict(), ours.config))
    tokens = torch.arange(40)[None] * 5
    logits = ours(tokens, torch.arange(40)[None], batch_metadata(ours, Documents.single(1, 40)))
    torch.testing.assert_close(logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)

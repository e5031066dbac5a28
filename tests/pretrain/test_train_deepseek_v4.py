"""train.py with DeepSeek-V4: trains, checkpoints, resumes, verifies."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from dtcp.torchtitan.model_spec import spec_of

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from dtcp.mixer_metadata import batch_metadata
from dtcp.models.deepseek_v4 import DeepseekV4, config_from_hf, from_hf, tiny
from dtcp.parallelize.plans.families import DEEPSEEK_V4
from dtcp.pretrain.configs import deepseek_v4_tiny
from dtcp.pretrain.trainer import Trainer
from dtcp.sequence.documents import Documents
from tests.harness import train_run
from tests.harness.train_run import losses

trained = partial(train_run.trained, module="tests.pretrain.test_train_deepseek_v4", config="micro")
STREAMS = {"dim": 32, "hidden_dim": 32, "streams": 2, "sinkhorn_steps": 2}


def micro() -> Trainer.Config:
    """A layer of entries, chosen and not, and one ahead; rows of 64 tokens, two ranks, eager."""
    config = deepseek_v4_tiny()
    shape = replace(tiny(272), num_layers=2, compress_ratios=(4, 16, 0), **STREAMS)
    config.model_spec = spec_of(DEEPSEEK_V4, "micro", shape)
    config.parallelism.tensor_parallel_degree = 1
    config.training.seq_len, config.training.steps = 64, 4
    config.lr_scheduler.warmup_steps = 0
    config.compile.enable = False
    config.checkpoint.interval, config.validator.freq, config.validator.steps = 2, 4, 1
    return config


@pytest.mark.slow
def test_deepseek_v4_trains_and_resumes_on_another_mesh_with_the_same_losses(tmp_path):
    """On cp 2, then from step 2 on tp 2: routers' biases, too, are as they were."""
    output = trained("--dump_folder", str(tmp_path), "--checkpoint.export_hf")
    assert "CompressedSparseCP" in output and "validation loss" in output
    assert_transformers_read(tmp_path / "hf")
    before = losses(output)
    assert list(before) == [1, 2, 3, 4] and before[4] < before[1]

    shutil.rmtree(tmp_path / "checkpoint/step-4")
    mesh = ("--parallelism.context_parallel_degree", "1")
    mesh += ("--parallelism.tensor_parallel_degree", "2")
    output = trained("--dump_folder", str(tmp_path), *mesh)
    assert "loaded" in output and "step-2" in output
    after = losses(output)
    assert list(after) == [3, 4]
    assert [after[3], after[4]] == pytest.approx([before[3], before[4]], rel=1e-5)


def assert_transformers_read(folder: Path) -> None:
    """The export, tables of experts by token included: the same logits, and names for all."""
    theirs, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    ours = DeepseekV4(config)
    parts = (load_file(path) for path in sorted(folder.glob("*.safetensors")))
    ours.load_state_dict(from_hf({name: x for part in parts for name, x in part.items()}, config))
    tokens, position_ids = torch.arange(1, 41)[None] * 5, torch.arange(40)[None]
    logits = ours(tokens, position_ids, batch_metadata(ours, Documents.single(1, 40)))
    assert_close(logits, theirs(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_deepseek_v4_on_two_ranks_verifies_against_one_device(tmp_path):
    """Both tokens' losses and the balance of experts are in what is compared."""
    output = trained("--dtcp.verify", "3", "--dump_folder", str(tmp_path))
    assert "the losses of 3 steps agree" in output

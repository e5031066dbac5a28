"""train.py with Gemma 4, all its parts at once: a run, its second start, and its export."""

import json
import shutil
from dataclasses import replace
from functools import partial

from dtcp.torchtitan.model_spec import spec_of

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from dtcp.mixer_metadata import batch_metadata
from dtcp.models.gemma4 import (
    Gemma4,
    HeadShape,
    config_from_hf,
    from_hf,
    layer_pattern,
    tiny_e,
    tiny_moe,
)
from dtcp.parallelize.plans.families import GEMMA4
from dtcp.pretrain.configs import gemma4_tiny
from dtcp.pretrain.trainer import Trainer
from dtcp.sequence.documents import Documents
from tests.harness import train_run
from tests.harness.train_run import losses

trained = partial(train_run.trained, module="tests.pretrain.test_train_gemma4", config="micro")


def micro() -> Trainer.Config:
    """Experts, per-layer embeddings, shared keys, keys from values; two ranks, eager."""
    config = gemma4_tiny()
    every = replace(
        tiny_e(272),
        dim=32,
        hidden_dim=48,
        num_heads=4,
        layer_types=layer_pattern("sg", 4),
        num_shared_layers=2,
        window=24,
        sliding_heads=HeadShape(8, 2, 1e4),
        global_heads=HeadShape(16, 2, 1e6, rotated=0.25),
        keys_from_values=True,
        moe=replace(tiny_moe().moe, hidden_dim=16),
    )
    config.model_spec = spec_of(GEMMA4, "micro", every)
    config.parallelism.tensor_parallel_degree = 1
    config.training.seq_len, config.training.steps = 64, 4
    config.lr_scheduler.warmup_steps = 0
    config.compile.enable = config.validator.enable = False
    config.checkpoint.interval = 2
    return config


@pytest.mark.slow
def test_gemma4_trains_resumes_and_exports(tmp_path):
    output = trained("--dump_folder", f"{tmp_path}", "--checkpoint.export_hf")
    first = losses(output)
    assert list(first) == [1, 2, 3, 4] and first[4] < first[1]

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    config = config_from_hf(json.loads((tmp_path / "hf/config.json").read_text()))
    ours = Gemma4(config)
    ours.load_state_dict(from_hf(theirs.state_dict(), config))
    tokens, position_ids = torch.arange(1, 41)[None] * 5, torch.arange(40)[None]
    logits = ours(tokens, position_ids, batch_metadata(ours, Documents.single(1, 40)))
    assert_close(logits, theirs(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-5)

    shutil.rmtree(tmp_path / "checkpoint/step-4")
    output = trained("--dump_folder", f"{tmp_path}")
    again = losses(output)
    assert "step-2" in output and list(again) == [3, 4]
    assert_close(torch.tensor(list(again.values())), torch.tensor([first[3], first[4]]))

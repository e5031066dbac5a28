"""The LightningModule of docs/migrate.md trains as one process does."""

from importlib.util import find_spec

import pytest

from tests.docs.blocks import files_of
from tests.harness.run_script import run_forked

SCRIPT = """
import logging, sys
sys.path.insert(0, {folder!r})
from tests.trainers import stand_in_lightning
if not {real}:
    stand_in_lightning.install()
import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from dtcp import Degrees
from lightning_model import LongRows
from tests.harness.hf_models import config_of

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
ACCUMULATED, STEPS, CLIP = 2, 2, 0.5
config = config_of("qwen3", dtype=torch.float64)
ids = torch.randint(1, 64, (8, 32), generator=torch.Generator().manual_seed(3))
labels = ids.masked_fill(torch.arange(32) < torch.arange(8)[:, None] * 3, -100)
rows = [dict(input_ids=x, labels=y) for x, y in zip(ids, labels)]

torch.manual_seed(0)
alone = AutoModelForCausalLM.from_config(config)
optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-2)
order = torch.randperm(8, generator=torch.Generator().manual_seed(0))  # a DistributedSampler's
for step in order.view(-1, ACCUMULATED, 2)[:STEPS]:
    for pair in step:
        logits = alone(ids[pair]).logits[:, :-1].flatten(0, 1)
        expected = F.cross_entropy(logits, labels[pair, 1:].flatten())
        (expected / ACCUMULATED).backward()
    torch.nn.utils.clip_grad_norm_(alone.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()

module = LongRows(config, Degrees(dp_shard=2, cp=2))
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer = Trainer(
    accelerator="cpu", devices=4, strategy=ModelParallelStrategy(2, 2), max_steps=STEPS,
    accumulate_grad_batches=ACCUMULATED, gradient_clip_val=CLIP, enable_model_summary=False, **quiet
)
trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=1))
torch.testing.assert_close(trainer.callback_metrics["loss"].double(), expected, rtol=1e-6, atol=0)
for weight, one in zip(module.model.parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(weight.full_tensor(), one, rtol=1e-6, atol=1e-9)
"""


@pytest.mark.parametrize("real", [False, True])
def test_a_lightning_module_on_a_mesh_trains_as_one_process_does(real, tmp_path):
    if real and find_spec("lightning") is None:
        pytest.skip("Lightning is not installed: its stand-in was called.")
    for name, text in files_of("docs/migrate.md").items():
        (tmp_path / name).write_text(text)
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path), real=real))
    ended = run_forked(script, ranks=4)
    assert ended.code == 0, ended

"""What transformers' Trainer costs a step on a mesh, beside a loop of our own at the same shapes.

    torchrun --nproc-per-node 2 -m benchmarks.trainer

Both train one model on the same rows: shard_hf_batch, forward, loss, backward, clipping, AdamW. The
two take turns, step by step, so that whatever else the machine does meets both.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist
from torch.nn.utils import clip_grad_norm_
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from dtcp import Degrees, ParallelMesh, causal_lm_loss
from dtcp.parallelize import parallelize_hf
from dtcp.trainers import MeshTrainerMixin

WARM_UP = 3


class MeshTrainer(MeshTrainerMixin, Trainer):
    """transformers' Trainer over a dtcp mesh."""


class TakeTurns(TrainerCallback):
    """Notes how long each step of a Trainer took, and lets another loop make one after it."""

    def __init__(self, other: Iterator[None]) -> None:
        self.other = other
        self.trainer: list[tuple[float, float]] = []
        self.own: list[tuple[float, float]] = []
        self.since = (0.0, 0.0)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.since = _now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.append(_passed(self.since))
        start = _now()
        next(self.other)
        self.own.append(_passed(start))
        self.since = _now()


def _now() -> tuple[float, float]:
    dist.barrier()
    return time.perf_counter(), time.process_time()


def _passed(since: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - since[0], time.process_time() - since[1]


def own_steps(model: Any, mesh: ParallelMesh, rows: list[dict[str, Any]]) -> Iterator[None]:
    """One step of our own loop for each row."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for row in rows:
        model.train()
        batch = {key: x[None] for key, x in row.items()}
        causal_lm_loss(model, batch, mesh).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"tokens": 1024, "width": 256, "layers": 4, "steps": 30}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = ParallelMesh.from_degrees(Degrees(cp=dist.get_world_size()), "cpu")
    width = options.width
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=options.layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    models = [AutoModelForCausalLM.from_config(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours, theirs = (parallelize_hf(model, mesh) for model in models)
    ids = torch.randint(4096, (options.steps + WARM_UP, options.tokens))
    rows = [{"input_ids": x, "labels": x} for x in ids]
    turns = TakeTurns(own_steps(ours, mesh, rows))
    args = TrainingArguments(
        tempfile.mkdtemp(),
        use_cpu=True,
        per_device_train_batch_size=1,
        max_steps=len(rows),
        learning_rate=1e-4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=10,
    )
    trainer = MeshTrainer(theirs, args, train_dataset=rows, mesh=mesh, callbacks=[turns])
    trainer.train()
    if dist.get_rank() == 0:
        for index, name in enumerate(("wall", "cpu")):
            own, their = (
                [step[index] for step in steps[WARM_UP:]] for steps in (turns.own, turns.trainer)
            )
            ratio = statistics.median(b / a for a, b in zip(own, their, strict=True))
            print(
                f"{name:<5} ms a step: own {1e3 * statistics.median(own):.1f}, trainer "
                f"{1e3 * statistics.median(their):.1f}; median of ratios {ratio:.3f}"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

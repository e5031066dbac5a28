"""Trainers with options that people set: logs of ranks are those of one process.

Run by test_options.py as one process, which writes its logs to the file that is named first; then
on ranks, which compare theirs. Further arguments are names of cases.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import distributed as dist
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from dtcp import Degrees, ParallelMesh
from dtcp.trainers import MeshTrainerMixin

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import tiny

UNLIKE = ("runtime", "per_second", "flos")
"""What two runs need not have alike."""


class MeshTrainer(MeshTrainerMixin, Trainer):
    pass


class MeshSFTTrainer(MeshTrainerMixin, SFTTrainer):
    pass


def metrics(predicted: Any) -> dict[str, float]:
    """Of whole logits and labels of all rows."""
    labels = predicted.label_ids[:, 1:]
    has_loss = labels != -100
    logits = predicted.predictions[:, :-1]
    right = (logits.argmax(-1) == labels)[has_loss]
    size = float(np.abs(logits[has_loss]).mean())
    return {"accuracy": float(right.mean()), "size": size, "tokens": int(has_loss.sum())}


def trainer_of(
    mesh: ParallelMesh | None, folder: str, kind: str, *, flattened: bool = False, **change: Any
) -> Any:
    """A Trainer, whose rows are padded or flattened into one."""
    tokenizer = tiny.tokenizer()
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in tiny.texts(16)]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    if flattened:
        rows = [{**row, "labels": row["input_ids"]} for row in rows]
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    own = {key: change.pop(key) for key in ("compute_metrics", "callbacks") if key in change}
    options = {
        "args": TrainingArguments(**{**tiny.arguments(mesh, folder), **change}),
        # With a cache, transformers lets packed documents see each other.
        "model_init": lambda: tiny.build(kind, use_cache=False),
        "train_dataset": rows,
        "eval_dataset": rows[:4],
        "data_collator": collator,
        **own,
    }
    return Trainer(**options) if mesh is None else MeshTrainer(**options, mesh=mesh)


def many(mesh: ParallelMesh | None, folder: str) -> Any:
    """Sampling, metrics, counts, smoothing, the best step, callbacks, a model that is made anew."""
    trainer = trainer_of(
        mesh,
        folder,
        "windows and sinks",
        compute_metrics=metrics,
        callbacks=[EarlyStoppingCallback(2)],
        train_sampling_strategy="group_by_length",
        include_num_input_tokens_seen="non_padding",
        label_smoothing_factor=0.1,
        save_strategy="steps",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )
    trainer.train()
    again = trainer.evaluate()
    trainer.save_model(f"{folder}/last")
    trainer.state.log_history.append({"again": again["eval_loss"], "step": 99})
    return trainer


def flattened(mesh: ParallelMesh | None, folder: str) -> Any:
    """Rows without padding, evaluated before training, in epochs that end in a part of a step."""
    trainer = trainer_of(
        mesh,
        folder,
        "experts",
        flattened=True,
        max_steps=-1,
        num_train_epochs=1,
        gradient_accumulation_steps=3,
        eval_on_start=True,
        eval_strategy="epoch",
        save_strategy="no",
    )
    trainer.train()
    return trainer


def compiled(mesh: ParallelMesh | None, folder: str) -> Any:
    """TRL's loss of packed rows without padding; on the mesh compiled, block by block."""
    asked = {} if mesh is None else {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    own = {**tiny.arguments(mesh, folder), "gradient_checkpointing": mesh is None, **asked}
    options = {
        "model": tiny.build("windows"),
        "args": SFTConfig(max_length=96, packing=True, eval_packing=False, loss_type="dft", **own),
        "train_dataset": Dataset.from_dict({"text": tiny.texts(60)}),
        "eval_dataset": Dataset.from_dict({"text": tiny.texts(4, spread=1)}),
        "processing_class": tiny.tokenizer(),
    }
    trainer = SFTTrainer(**options) if mesh is None else MeshSFTTrainer(**options, mesh=mesh)
    trainer.train()
    return trainer


CASES = {"many": many, "flattened": flattened, "compiled": compiled}
Logs = list[dict[str, float]]


def logs_of(trainer: Any) -> Logs:
    return [
        {key: x for key, x in each.items() if not any(part in key for part in UNLIKE)}
        for each in trainer.state.log_history
    ]


def compare(name: str, logs: Logs, expected: Logs) -> None:
    """Say how far logs are from one process's.

    Raises:
        SystemExit: other entries, or numbers that are too far.
    """
    if [sorted(each) for each in logs] != [sorted(each) for each in expected]:
        raise SystemExit(f"{name}: logs have the entries of one process, got {logs}")
    pairs = [(mine[key], its[key]) for mine, its in zip(logs, expected, strict=True) for key in its]
    worst = max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)
    print(f"{name}: {worst:.1e} from one process")
    if not worst <= 1e-4:
        raise SystemExit(f"{name}: logs are one process's, got {logs} for {expected}")


def main(path: Path, cases: list[str]) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    chosen: Mapping[str, Any] = {name: CASES[name] for name in cases}
    if "RANK" not in os.environ:
        alone = {name: logs_of(run(None, tempfile.mkdtemp())) for name, run in chosen.items()}
        path.write_text(json.dumps(alone))
        return
    folder = tiny.start()
    mesh = ParallelMesh.from_degrees(Degrees(cp=dist.get_world_size()), "cpu")
    found = {name: logs_of(run(mesh, f"{folder}/{name}")) for name, run in chosen.items()}
    if dist.get_rank() == 0:
        for name, expected in json.loads(path.read_text()).items():
            compare(name, json.loads(json.dumps(found[name])), expected)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

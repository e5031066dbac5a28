"""transformers' Trainer on a mesh: accumulation, clipping, evaluation, saving, another mesh.

    torchrun --nproc-per-node 4 examples/hf_trainer.py

Hardware: any two CPU cores, no download, a minute. Expect: losses within 1e-5 of one process's.
"""

from typing import Any

import tiny
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from dtcp import ParallelMesh
from dtcp.parallelize import parallelize_hf
from dtcp.trainers import MeshTrainerMixin


class MeshTrainer(MeshTrainerMixin, Trainer):
    """transformers' Trainer over a dtcp mesh."""


def train(kind: str, mesh: ParallelMesh | None, folder: str, checkpoint: str | None) -> Any:
    """Train on padded rows, and on the balance of experts where there are some."""
    tokenizer, model = tiny.tokenizer(), tiny.build(kind)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in tiny.texts(16)]
    options = {
        "args": TrainingArguments(**tiny.arguments(mesh, folder)),
        "train_dataset": rows,
        "eval_dataset": rows[:4],
        "data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False),
    }
    if mesh is None:
        trainer = Trainer(model, **options)
    else:
        trainer = MeshTrainer(parallelize_hf(model, mesh), mesh=mesh, **options)
    model.config.output_router_logits = kind == "experts"
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


if __name__ == "__main__":
    tiny.run(train)

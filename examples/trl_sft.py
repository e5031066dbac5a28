"""TRL's SFTTrainer on a mesh, with packed rows: what it refuses for accelerate's own CP.

    torchrun --nproc-per-node 4 examples/trl_sft.py

Hardware: any two CPU cores, no download, a minute. Expect: losses within 1e-5 of one process's.
"""

from typing import Any

import tiny
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from dtcp import ParallelMesh
from dtcp.parallelize import parallelize_hf
from dtcp.trainers import MeshTrainerMixin

PADDED = ("windows and sinks", "hybrid")
"""Of packed rows transformers itself lets documents see each other there: no reference."""


class MeshSFTTrainer(MeshTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer over a dtcp mesh."""


def train(kind: str, mesh: ParallelMesh | None, folder: str, checkpoint: str | None) -> Any:
    """Fine-tune on text; experts are balanced, as is TRL's default."""
    packing = kind not in PADDED
    config = SFTConfig(
        max_length=96, packing=packing, eval_packing=False, **tiny.arguments(mesh, folder)
    )
    options = {
        "args": config,
        "train_dataset": Dataset.from_dict({"text": tiny.texts(60 if packing else 16)}),
        # As long as each other: TRL evaluates the mean of ranks' means.
        "eval_dataset": Dataset.from_dict({"text": tiny.texts(4, spread=1)}),
        "processing_class": tiny.tokenizer(),
    }
    model = tiny.build(kind)
    if mesh is None:
        trainer = SFTTrainer(model, **options)
    else:
        trainer = MeshSFTTrainer(parallelize_hf(model, mesh), mesh=mesh, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


if __name__ == "__main__":
    tiny.run(train)

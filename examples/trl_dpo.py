"""TRL's DPOTrainer on a mesh: a loss of whole answers, whose tokens lie on several ranks.

    torchrun --nproc-per-node 4 examples/trl_dpo.py

Hardware: any two CPU cores, no download, a minute. Expect: losses within 1e-5 of one process's.
"""

from typing import Any

import tiny
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from dtcp import ParallelMesh
from dtcp.parallelize import parallelize_hf
from dtcp.trainers import MeshTrainerMixin


class MeshDPOTrainer(MeshTrainerMixin, DPOTrainer):
    """TRL's DPOTrainer over a dtcp mesh."""


def train(kind: str, mesh: ParallelMesh | None, folder: str, checkpoint: str | None) -> Any:
    """Prefer a continuation of a text to another; the model as it starts is the reference."""
    pieces = tiny.texts(16)
    rows = {
        "prompt": [text[:15] for text in pieces],
        "chosen": [text[15:] for text in pieces],
        "rejected": [text[:5:-1] for text in pieces],
    }
    options = {
        "args": DPOConfig(max_length=96, beta=0.5, **tiny.arguments(mesh, folder)),
        "train_dataset": Dataset.from_dict(rows),
        "eval_dataset": Dataset.from_dict({key: x[:4] for key, x in rows.items()}),
        "processing_class": tiny.tokenizer(),
    }
    model, reference = tiny.build(kind), tiny.build(kind)
    if mesh is None:
        trainer = DPOTrainer(model, reference, **options)
    else:
        models = (parallelize_hf(each, mesh) for each in (model, reference))
        trainer = MeshDPOTrainer(*models, mesh=mesh, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


if __name__ == "__main__":
    tiny.run(train)

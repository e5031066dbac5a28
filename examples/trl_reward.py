"""TRL's RewardTrainer on a mesh: one reward for each answer, that of its last token.

    torchrun --nproc-per-node 4 examples/trl_reward.py

Hardware: any two CPU cores, no download, a minute. Expect: losses within 1e-5 of one process's.
"""

from typing import Any

import tiny
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from dtcp import ParallelMesh
from dtcp.trainers import MeshTrainerMixin

KINDS = ("windows and sinks", "experts", "experts with adapters")


class MeshRewardTrainer(MeshTrainerMixin, RewardTrainer):
    """TRL's RewardTrainer over a dtcp mesh."""


def build(kind: str) -> Any:
    """A model whose head gives one number for a row."""
    return tiny.build(kind.split(" with ")[0], AutoModelForSequenceClassification, num_labels=1)


def train(kind: str, mesh: ParallelMesh | None, folder: str, checkpoint: str | None) -> Any:
    """Prefer a text, by a margin, to its reverse; of a model, or of adapters and a new head."""
    pieces = tiny.texts(16)
    rows = {
        "chosen": pieces,
        "rejected": [text[:5:-1] for text in pieces],
        "margin": [0.01 * len(text) for text in pieces],
    }
    options: dict[str, Any] = {
        "args": RewardConfig(max_length=96, **tiny.arguments(mesh, folder)),
        "train_dataset": Dataset.from_dict(rows),
        "eval_dataset": Dataset.from_dict({key: x[:4] for key, x in rows.items()}),
        "processing_class": tiny.tokenizer(),
    }
    if kind.endswith("adapters"):
        targets = ["q_proj", "v_proj"]
        options["peft_config"] = LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS")
    if mesh is None:
        trainer = RewardTrainer(build(kind), **options)
    else:
        trainer = MeshRewardTrainer(build(kind), mesh=mesh, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def load(kind: str, folder: str) -> Any:
    """The model that was saved; or as it was built, with the adapters and the head that were."""
    if kind.endswith("adapters"):
        return PeftModel.from_pretrained(build(kind), folder)
    return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")


if __name__ == "__main__":
    tiny.run(train, kinds=KINDS, load=load)

"""TRL's SFTTrainer with adapters (LoRA of peft) on a mesh: layers are computed again in backward.

    torchrun --nproc-per-node 4 examples/trl_lora.py

Hardware: any two CPU cores, no download, a minute. Expect: losses within 1e-5 of one process's.
"""

from typing import Any

import tiny
from datasets import Dataset
from peft import LoraConfig, PeftModel
from trl import SFTConfig, SFTTrainer

from dtcp import ParallelMesh
from dtcp.trainers import MeshTrainerMixin


class MeshSFTTrainer(MeshTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer over a dtcp mesh."""


def train(kind: str, mesh: ParallelMesh | None, folder: str, checkpoint: str | None) -> Any:
    """Fine-tune adapters; the trainer puts them into the model, and then the model on its mesh."""
    # Both ways that torch has to compute layers again.
    again = {"use_reentrant": kind == "windows"}
    options = {
        "args": SFTConfig(
            max_length=96,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs=again,
            **tiny.arguments(mesh, folder),
        ),
        "train_dataset": Dataset.from_dict({"text": tiny.texts(16)}),
        "eval_dataset": Dataset.from_dict({"text": tiny.texts(4, spread=1)}),
        "processing_class": tiny.tokenizer(),
        "peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    }
    if mesh is None:
        trainer = SFTTrainer(tiny.build(kind), **options)
    else:
        trainer = MeshSFTTrainer(tiny.build(kind), mesh=mesh, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def load(kind: str, folder: str) -> Any:
    """The model with the adapters that were saved, as peft loads them."""
    return PeftModel.from_pretrained(tiny.build(kind), folder)


if __name__ == "__main__":
    tiny.run(train, load=load)

"""transformers' Trainer on a mesh, with adapters over weights of 4 bits (QLoRA, by bitsandbytes).

    torchrun --nproc-per-node 4 examples/hf_qlora.py

Hardware: any two CPU cores, no download, a minute. Expect: losses within 1e-5 of one process's.
"""

from typing import Any

import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from dtcp import ParallelMesh
from dtcp.parallelize import save_hf
from dtcp.trainers import MeshTrainerMixin


class MeshTrainer(MeshTrainerMixin, Trainer):
    """transformers' Trainer over a dtcp mesh."""


def build(kind: str, folder: str) -> Any:
    """The model of a kind, its linear layers in 4 bits: whole on every rank, and frozen.

    Args:
        folder: of all ranks, to keep the model in as it is published, for transformers to load.
    """
    save_hf(tiny.build(kind), f"{folder}/published")
    stored = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        f"{folder}/published",
        quantization_config=stored,
        attn_implementation="eager",
        dtype=torch.float32,
    )
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # On such CPUs one process would go on in bf16, and without gradients, once it has
            # evaluated (bitsandbytes 0.50). On a mesh this is off.
            layer.support_avx512bf16_for_cpu = False
    return model


def train(kind: str, mesh: ParallelMesh | None, folder: str, checkpoint: str | None) -> Any:
    """Fine-tune adapters on padded rows; layers are computed again in backward."""
    tokenizer = tiny.tokenizer()
    model = prepare_model_for_kbit_training(build(kind, folder))
    torch.manual_seed(1)  # the same adapters on every rank
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
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
        trainer = MeshTrainer(model, mesh=mesh, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def load(kind: str, folder: str) -> Any:
    """The model with the adapters that were saved, as peft loads them."""
    return PeftModel.from_pretrained(build(kind, folder), folder)


if __name__ == "__main__":
    tiny.run(train, kinds=("windows", "hybrid"), load=load)

"""Trainers with options that people set: logs of ranks are those of one process.

Run by test_options.py as one process, which writes its logs to the file that is named first; then
on ranks, which compare theirs. Further arguments are names of cases.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from dtcp import Degrees, ParallelMesh
from dtcp.parallelize import parallelize_hf
from dtcp.trainers import MeshTrainerMixin

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import tiny

UNLIKE = ("runtime", "per_second", "flos")
"""What two runs need not have alike."""


TWO_SEQUENCES: dict[str, dict[str, Any]] = {
    "t5": {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    "bart": {
        **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
        "max_position_embeddings": 128,
        "dropout": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "forced_eos_token_id": 1,
    },
}


class Doubling(Trainer):
    """A loss of one's own that is made of transformers'."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **by: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **by)
        return (2 * loss, outputs) if return_outputs else 2 * loss


class MeshSFTTrainer(MeshTrainerMixin, SFTTrainer):
    pass


class MeshDPOTrainer(MeshTrainerMixin, DPOTrainer):
    pass


class MeshKTOTrainer(MeshTrainerMixin, KTOTrainer):
    pass


class MeshSeq2SeqTrainer(MeshTrainerMixin, Seq2SeqTrainer):
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
    mesh: ParallelMesh | None,
    folder: str,
    kind: str,
    *,
    base: type = Trainer,
    flattened: bool = False,
    streamed: bool = False,
    rows: int = 16,
    **change: Any,
) -> Any:
    """A Trainer, whose rows are padded or flattened into one."""
    tokenizer = tiny.tokenizer()
    texts = [{"input_ids": tokenizer(text)["input_ids"]} for text in tiny.texts(rows)]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    if flattened:
        texts = [{**row, "labels": row["input_ids"]} for row in texts]
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    given = "compute_metrics", "compute_loss_func", "callbacks", "data_collator", "train_dataset"
    own = {key: change.pop(key) for key in given if key in change}
    options = {
        "args": TrainingArguments(**{**tiny.arguments(mesh, folder), **change}),
        # With a cache, transformers lets packed documents see each other.
        "model_init": lambda: tiny.build(kind, use_cache=False),
        "train_dataset": stream_of(texts) if streamed else texts,
        "eval_dataset": texts[: rows // 4 + rows % 4],
        "data_collator": collator,
        **own,
    }
    on_mesh: Any = type("MeshTrainer", (MeshTrainerMixin, base), {})
    return base(**options) if mesh is None else on_mesh(**options, mesh=mesh)


def stream_of(texts: list[dict[str, Any]]) -> Any:
    """In two parts, of which one is the longer."""

    def rows_of(parts: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        yield from chain.from_iterable(parts)

    return IterableDataset.from_generator(rows_of, gen_kwargs={"parts": [texts[:8], texts[8:]]})


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


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss that Trainers take as an argument, and call with logits."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def uneven(mesh: ParallelMesh | None, folder: str, base: type = Trainer, **change: Any) -> Any:
    """Epochs and evaluations that end in a part of a batch, of which one rank has no row."""
    options: dict[str, Any] = {
        "rows": 11,
        "compute_metrics": metrics,
        "max_steps": -1,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 3,
        "max_grad_norm": 0.05,
        "eval_strategy": "epoch",
        "save_strategy": "no",
    }
    trainer = trainer_of(mesh, folder, "hybrid", base=base, **{**options, **change})
    trainer.train()
    return trainer


def masked(mesh: ParallelMesh | None, folder: str) -> Any:
    """Rows in an order by chance, whose collator draws as many numbers as they have tokens."""
    seen: list[int] = []

    def collator(rows: list[dict[str, Any]]) -> Any:
        seen.extend(row["input_ids"][0] for row in rows)
        torch.rand(sum(len(row["input_ids"]) for row in rows))
        return DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False)(rows)

    trainer = trainer_of(
        mesh,
        folder,
        "windows",
        data_collator=collator,
        train_dataset=[{"input_ids": [2 + x] * (9 + 5 * x % 13)} for x in range(16)],
        train_sampling_strategy="group_by_length",
        eval_strategy="no",
        save_strategy="no",
        max_steps=-1,
        num_train_epochs=3,
    )
    trainer.train()
    count = torch.bincount(torch.tensor(seen), minlength=18)
    counts = count if mesh is None else trainer.accelerator.reduce(count)
    trainer.state.log_history = [{"loss": 0.0, "least": float(counts[2:].min())}]
    return trainer


class StopsOnLastRank(TrainerCallback):
    """Ends training after a step, saves and evaluates: one rank, or the process that is alone."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        alone = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
        control.should_training_stop = control.should_evaluate = alone and state.global_step == 2


def decided(mesh: ParallelMesh | None, folder: str) -> Any:
    """What one rank decides by itself."""
    options = {"callbacks": [StopsOnLastRank()], "eval_strategy": "no", "save_strategy": "no"}
    trainer = trainer_of(mesh, folder, "windows", **options)
    trainer.train()
    return trainer


def flattened(mesh: ParallelMesh | None, folder: str, kind: str = "experts", **rows: Any) -> Any:
    """Rows without padding, evaluated before training, in epochs that end in a part of a step."""
    trainer = trainer_of(
        mesh,
        folder,
        kind,
        flattened=True,
        **rows,
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


def tuned(mesh: ParallelMesh | None, folder: str) -> Any:
    """TRL's loss of uneven rows, evaluated, with the balance loss of experts."""
    own = {**tiny.arguments(mesh, folder), "save_strategy": "no"}
    options = {
        "model": tiny.build("experts", output_router_logits=True),
        "args": SFTConfig(max_length=96, eval_packing=False, **own),
        "train_dataset": Dataset.from_dict({"text": tiny.texts(16)}),
        "eval_dataset": Dataset.from_dict({"text": tiny.texts(6, least=10)}),
        "processing_class": tiny.tokenizer(),
    }
    trainer = SFTTrainer(**options) if mesh is None else MeshSFTTrainer(**options, mesh=mesh)
    trainer.train()
    return trainer


def preferences(mesh: ParallelMesh | None, folder: str, **change: Any) -> Any:
    """A preference loss whose reference is computed before training: the model as it starts."""
    pieces = tiny.texts(8)
    rows = {
        "prompt": [text[:20] for text in pieces],
        "chosen": [text[20:] for text in pieces],
        "rejected": [text[:5:-1] for text in pieces],
    }
    own = tiny.arguments(mesh, folder) | {"precompute_ref_log_probs": True, "save_strategy": "no"}
    own["learning_rate"] = 1e-3
    options = {
        "model": tiny.build("windows"),
        "args": DPOConfig(max_length=96, beta=0.5, **own),
        "train_dataset": Dataset.from_dict(rows),
        "eval_dataset": Dataset.from_dict({key: x[:3] for key, x in rows.items()}),
        "processing_class": tiny.tokenizer(),
        **change,
    }
    trainer = DPOTrainer(**options) if mesh is None else MeshDPOTrainer(**options, mesh=mesh)
    trainer.train()
    return trainer


def many_preferences(mesh: ParallelMesh | None, folder: str) -> Any:
    """All losses of preferences at once, and then what changes the scores that they compare."""
    losses = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"]
    losses += ["aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
    own = tiny.arguments(mesh, folder) | {"save_strategy": "no", "learning_rate": 3e-4}
    rated = {"max_length": 96, "beta": 0.5, "label_smoothing": 0.1, **own}
    weighed = {"use_weighting": True, "ld_alpha": 0.5, "f_divergence_type": "js_divergence"}
    first, second = (
        preferences(
            mesh, folder, args=DPOConfig(**rated, **change), ref_model=tiny.build("windows")
        )
        for change in ({"loss_type": losses}, weighed)
    )
    second.state.log_history += first.state.log_history
    return second


def adapted_preferences(mesh: ParallelMesh | None, folder: str) -> Any:
    """The same of adapters, whose reference is the model without them."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return preferences(mesh, folder, peft_config=lora)


def rows_read(model: Any) -> list[int]:
    """The numbers of rows that a model is going to be called with."""
    found: list[int] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda *its: found.append(len(its[1][0])))
    return found


def shared_preferences(mesh: ParallelMesh | None, folder: str) -> Any:
    """Answers share their prompts: of a model, and of its reference, then and beforehand."""
    own = tiny.arguments(mesh, folder) | {"save_strategy": "no", "learning_rate": 1e-3}
    trainers = []
    for cached in (False, True):
        model, reference = (
            tiny.build("windows", layer_types=["full_attention"] * 2) for _ in range(2)
        )
        change: dict[str, Any] = {"model": model, "ref_model": reference}
        change["args"] = DPOConfig(max_length=96, precompute_ref_log_probs=cached, **own)
        if mesh is not None:
            change["place"] = partial(parallelize_hf, shared_prompts=True)
        rows = [rows_read(each) for each in (model, reference)]
        trainers.append(preferences(mesh, folder, **change))
        if mesh is not None and {*chain(*rows)} != {1}:
            raise SystemExit(f"pairs with one prompt are put into one row each, got {rows}")
    trainers[0].state.log_history += trainers[1].state.log_history
    return trainers[0]


def unpaired(mesh: ParallelMesh | None, folder: str, *, cached: bool = False) -> Any:
    """A loss of answers that are marked as good or bad."""
    pieces = tiny.texts(8)
    rows = {
        "prompt": [text[:15] for text in pieces],
        "completion": [text[15:] for text in pieces],
        "label": [index % 2 == 0 for index in range(len(pieces))],
    }
    own = tiny.arguments(mesh, folder) | {"save_strategy": "no", "eval_strategy": "no"}
    options = {
        "model": tiny.build("experts"),
        "ref_model": tiny.build("experts"),
        "args": KTOConfig(max_length=96, precompute_ref_log_probs=cached, **own),
        "train_dataset": Dataset.from_dict(rows),
        "processing_class": tiny.tokenizer(),
    }
    trainer = KTOTrainer(**options) if mesh is None else MeshKTOTrainer(**options, mesh=mesh)
    trainer.train()
    return trainer


def cached_unpaired(mesh: ParallelMesh | None, folder: str) -> Any:
    """The same, with its reference computed before training."""
    return unpaired(mesh, folder, cached=True)


def two_sequences(
    mesh: ParallelMesh | None, folder: str, *, kind: str = "t5", lora: bool = False
) -> Any:
    """T5 or BART by the trainer of encoder-decoders, evaluated; or adapters in it."""
    from peft import get_peft_model

    torch.manual_seed(0)
    shape = {"vocab_size": 264, "d_model": 32, "decoder_start_token_id": 0, **TWO_SEQUENCES[kind]}
    config = AutoConfig.for_model(kind, **shape)
    model = AutoModelForSeq2SeqLM.from_config(config)
    if lora:
        adapters = LoraConfig(r=4, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
        model = get_peft_model(model, adapters)
    tokenizer = tiny.tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in tiny.texts(16)]
    rows = [{"input_ids": x, "labels": x[::-2]} for x in ids]
    change: dict[str, Any] = {"label_smoothing_factor": 0.1, "save_strategy": "no"}
    if kind == "bart":
        # By its own loss, which transformers (5.23) does not divide by the micro-batches of a step.
        change |= {"label_smoothing_factor": 0.0, "gradient_accumulation_steps": 1}
    options = {
        "model": model,
        "args": Seq2SeqTrainingArguments(**tiny.arguments(mesh, folder) | change),
        "train_dataset": rows,
        "eval_dataset": rows[:3],
        "data_collator": DataCollatorForSeq2Seq(tokenizer, model),
        "compute_metrics": metrics_of_decoder,
    }
    trainer = (
        Seq2SeqTrainer(**options) if mesh is None else MeshSeq2SeqTrainer(**options, mesh=mesh)
    )
    trainer.train()
    return trainer


def bart(mesh: ParallelMesh | None, folder: str) -> Any:
    return two_sequences(mesh, folder, kind="bart")


def adapted_two_sequences(mesh: ParallelMesh | None, folder: str) -> Any:
    return two_sequences(mesh, folder, lora=True)


def metrics_of_decoder(predicted: Any) -> dict[str, float]:
    """Of whole logits, the first of a T5's predictions, and labels of all rows."""
    logits = predicted.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    has_loss = predicted.label_ids != -100
    right = (logits.argmax(-1) == predicted.label_ids)[has_loss]
    return {"accuracy": float(right.mean()), "size": float(np.abs(logits[has_loss]).mean())}


CASES = {
    "many": many,
    "uneven": uneven,
    "uneven_doubled": partial(uneven, base=Doubling),
    "uneven_by_function": partial(uneven, compute_loss_func=own_loss),
    "uneven_stream": partial(uneven, streamed=True, max_steps=7, num_train_epochs=1),
    "uneven_flattened": partial(flattened, kind="windows", rows=11),
    "masked": masked,
    "decided": decided,
    "flattened": flattened,
    "compiled": compiled,
    "tuned": tuned,
    "preferences": preferences,
    "many_preferences": many_preferences,
    "adapted_preferences": adapted_preferences,
    "shared_preferences": shared_preferences,
    "unpaired": unpaired,
    "cached_unpaired": cached_unpaired,
    "two_sequences": two_sequences,
    "bart": bart,
    "adapted_two_sequences": adapted_two_sequences,
}
UNEVEN = ("uneven", "uneven_doubled", "uneven_by_function", "uneven_stream", "uneven_flattened")
DEALT = (*UNEVEN, "masked", "tuned")
"""Cases in which ranks read different rows."""
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
    worst: dict[str, float] = {}
    for mine, its in zip(logs, expected, strict=True):
        for key, x in its.items():
            error = abs(mine[key] - x) / max(1.0, abs(x))
            worst[key] = max(error, worst.get(key, 0.0))
    losses = max(x for key, x in worst.items() if key.endswith("loss"))
    print(f"{name}: losses {losses:.1e}, all {max(worst.values()):.1e} from one process")
    # Sums over whole answers, which some entries are, are as far as their hundreds of numbers.
    if not (losses <= 1e-5 and max(worst.values()) <= 1e-4):
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
    world, found = dist.get_world_size(), {}
    for name, run in chosen.items():
        degrees = Degrees(dp_shard=world) if name in DEALT else Degrees(cp=world)
        mesh = ParallelMesh.from_degrees(degrees, "cpu")
        found[name] = logs_of(run(mesh, f"{folder}/{name}"))
    if dist.get_rank() == 0:
        for name, expected in json.loads(path.read_text()).items():
            compare(name, json.loads(json.dumps(found[name])), expected)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

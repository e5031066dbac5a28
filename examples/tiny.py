"""What the examples train, small enough for two CPU cores, and how they are compared.

Random models with windows and sinks, with layers that are no attention, and with experts; bytes as
tokens; text that every Python has. An example that is started by torchrun starts itself once more,
as one process without a mesh, by the same trainer of transformers or TRL; losses must be its.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from dtcp import Degrees, ParallelMesh

WINDOWS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "windows and sinks": ("gpt_oss", {**WINDOWS, **EXPERTS, "num_local_experts": 4}),
    "windows": ("gemma3_text", WINDOWS),
    "hybrid": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "experts": ("qwen3_moe", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24}),
}
STEPS, BOUND = 4, 1e-5
Logs = list[dict[str, float]]
Train = Callable[[str, ParallelMesh | None, str, str | None], Any]
"""A kind, a mesh (None for one process), a folder and a checkpoint to go on from; to a trainer."""
Load = Callable[[str, str], Any]


def build(kind: str, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """A model of transformers in fp32, the same on every rank.

    Args:
        auto: the class of transformers that makes it.
    """
    family, own = KINDS[kind]
    shape = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**shape, **own, **options})
    return auto.from_config(config, attn_implementation="eager")


def tokenizer() -> Any:
    """A token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {text: index for index, text in enumerate(alphabet)}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, pad_token="<pad>", eos_token="<eos>"
    )


def texts(count: int, least: int = 30, spread: int = 50) -> list[str]:
    """Pieces of Python's own source, of different lengths."""
    source = Path(os.__file__).read_text("utf-8")
    starts = range(0, 41 * count, 41)
    return [source[at : at + least + at * 7 % spread] for at in starts]


def rows(count: int, *, seed: int) -> torch.Tensor:
    """Rows of 48 random tokens: [count, 48]."""
    return torch.randint(2, 264, (count, 48), generator=torch.Generator().manual_seed(seed))


def arguments(mesh: ParallelMesh | None, folder: str) -> dict[str, Any]:
    """Training arguments: two rows a micro-batch, of all ranks, and two micro-batches a step."""
    rows = 2 // (1 if mesh is None else mesh.size("batch"))
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        # Where a gradient is nothing but rounding, Adam's steps would be as large as elsewhere.
        "adam_epsilon": 1e-4,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "save_strategy": "no" if mesh is None else "steps",
        "eval_steps": STEPS // 2,
        "save_steps": STEPS // 2,
        "report_to": [],
        "disable_tqdm": True,
    }


def load(kind: str, folder: str) -> Any:
    """A saved model, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def run(train: Train, *, kinds: tuple[str, ...] = tuple(KINDS), load: Load = load) -> None:
    """Train each kind on two meshes, the second from the first one's middle; compare, and say so.

    Arguments of the command: a file of one process's losses, which one process writes and ranks
    read (without it ranks start that process), and the kinds; all of them where there are none.

    Args:
        load: a model of a kind from what a trainer has saved, without a mesh.

    Raises:
        SystemExit: losses that differ from one process's, or logits of the saved model.
    """
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    kinds = tuple(sys.argv[2:]) or kinds
    if "RANK" not in os.environ:
        losses = {kind: _losses(train(kind, None, tempfile.mkdtemp(), None)) for kind in kinds}
        Path(sys.argv[1]).write_text(json.dumps(losses)) if sys.argv[1:] else print(losses)
        return
    folder = start()
    world, first = dist.get_world_size(), dist.get_rank() == 0
    path = Path(sys.argv[1]) if sys.argv[1:] else folder / "alone.json"
    alone = _alone(path) if first and not path.exists() else None
    meshes = [
        ParallelMesh.from_degrees(degrees, "cpu")
        for degrees in (Degrees(cp=2, tp=world // 2), Degrees(dp_shard=2, cp=world // 2))
    ]
    found = {}
    for kind in kinds:
        own = f"{folder}/{kind.replace(' ', '-')}"
        trainer = train(kind, meshes[0], own, None)
        middle = f"{own}/checkpoint-{STEPS // 2}"
        resumed = train(kind, meshes[1], f"{own}-resumed", middle)
        logits = _logits_differ(trainer, load(kind, f"{own}/checkpoint-{STEPS}"))
        found[kind] = (_losses(trainer), _losses(resumed), logits)
    if alone is not None and alone.wait():
        raise SystemExit(f"error: one process without a mesh failed with {alone.returncode}")
    if first:
        expected = json.loads(path.read_text())
        for kind, (losses, resumed_losses, logits) in found.items():
            _say(kind, expected[kind], losses, resumed_losses, logits)
    dist.barrier()
    dist.destroy_process_group()


def start() -> Path:
    """Join the other ranks; a new folder that all of them write to."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folders)
    return Path(folders[0])


def summed(loss: torch.Tensor, mesh: ParallelMesh | None) -> float:
    """A loss that is divided by the batch ranks, of all of them."""
    if mesh is not None and mesh.batch is not None:
        dist.all_reduce(loss, group=mesh.batch.get_group())
    return float(loss)


def report(kind: str, losses: list[float], expected: list[float], logits: float) -> None:
    """Say on rank 0 how far losses and logits are from one process's.

    Raises:
        SystemExit: too far.
    """
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    if dist.get_rank() == 0:
        numbers = ", ".join(f"{x:.4f}" for x in losses)
        print(f"{kind}: losses {numbers}; {worst:.1e} from one process, logits {logits:.1e}")
    if not max(worst, logits) <= BOUND:
        raise SystemExit(f"error: one process has {expected}, got {losses}; logits {logits} off")


def _alone(path: Path) -> "subprocess.Popen[bytes]":
    """This script again, as one process, which writes its losses."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: x for key, x in os.environ.items() if key not in ours and "ELASTIC" not in key}
    return subprocess.Popen([sys.executable, sys.argv[0], path], env=env, stdout=subprocess.DEVNULL)


def _losses(trainer: Any) -> Logs:
    """The losses of each step, and those of evaluations."""
    names = ("step", "loss", "eval_loss")
    logged = [{k: x for k, x in each.items() if k in names} for each in trainer.state.log_history]
    return [each for each in logged if len(each) > 1]


def _logits_differ(trainer: Any, plain: Any) -> float:
    """How far logits of the saved model are from the trained one's."""
    ids = torch.tensor([tokenizer()(texts(1)[0])["input_ids"]])
    trained = trainer.rows_model.eval()
    with torch.no_grad():
        actual = trained(input_ids=ids).logits
        return float((plain(input_ids=ids).logits - actual).abs().max())


def _say(kind: str, expected: Logs, losses: Logs, resumed: Logs, logits: float) -> None:
    numbers = [each["loss"] for each in losses if "loss" in each]
    print(f"{kind}: losses {', '.join(f'{x:.4f}' for x in numbers)}")
    for name, logs in (("on the mesh", losses), ("resumed on another", resumed)):
        theirs = expected[len(expected) - len(logs) :]
        worst = max(abs(a[key] - b[key]) for a, b in zip(logs, theirs, strict=True) for key in b)
        print(f"    {name}: {worst:.1e} from one process")
        if not worst <= BOUND:
            raise SystemExit(f"error: losses are one process's, got {logs} for {theirs}")
    print(f"    saved, and loaded without a mesh: logits {logits:.1e} apart")
    if not logits <= BOUND:
        raise SystemExit(f"error: logits of the saved model are {logits} off")

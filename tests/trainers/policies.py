"""TRL's GRPOTrainer on a mesh: logs and weights of ranks are those of TRL's own processes.

Run by test_policies.py: `plain` runs TRL's trainer without a mesh, on one process or on as many as
read different rows, and writes what it found to the file that is named; an axis of the mesh (`cp`,
`cp_tp`, `dp`, `dp_cp`) compares itself with that file. Further arguments are names of cases.
"""

import os
import random
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from dtcp import Degrees, ParallelMesh
from dtcp.parallelize import parallelize_hf
from dtcp.trainers import MeshTrainerMixin

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import tiny

UNLIKE = ("runtime", "per_second", "flos", "step_time")
BOUND = 1e-4
"""Of logs, and of what training has added to a weight, relative to the largest such change."""
MESHES = {
    "one": Degrees(),
    "cp": Degrees(cp=2),
    "dp": Degrees(dp_shard=2),
    "cp_tp": Degrees(cp=2, tp=2),
    "dp_cp": Degrees(dp_shard=2, cp=2),
}
SERVER = {"use_vllm": True, "vllm_mode": "server"}
LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"kind": "windows and sinks", "temperature": 0.7},
    "bnpo": {"scale_rewards": "batch"},
    "dr_grpo": {"delta": 1.5},
    "dapo": {"kind": "experts", "beta": 0.1, "mask_truncated_completions": True},
    # A balance loss is that of all batch ranks' tokens; TRL's, the mean of those of processes.
    "unbalanced": {
        "loss_type": "dapo",
        "kind": "windows and sinks",
        "beta": 0.1,
        "router_aux_loss_coef": 0.0,
    },
    "cispo": {"epsilon_high": 0.02, "off_policy_mask_threshold": 0.05},
    "sapo": {"kind": "hybrid"},
    "luspo": {"importance_sampling_level": "sequence", "entropy_coef": 0.1},
    "vespo": {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "temperature": 0.8},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "synced": {"loss_type": "dapo", "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2},
    "corrected": {"loss_type": "dapo", **SERVER},
    "corrected_tokens": {
        "loss_type": "vespo",
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 1.05,
        **SERVER,
    },
    # Two epochs of two rollouts each; `resumed` starts where `whole` has been between the last two.
    "whole": {
        "loss_type": "dapo",
        "beta": 0.1,
        "num_iterations": 1,
        "max_steps": 8,
        "save_strategy": "steps",
        "prompts": 10,
        "asked_at": [0, 2, 4, 6, 8],
    },
    "adapted": {"loss_type": "dapo", "beta": 0.1, "peft_config": LORA},
    "shared": {
        "loss_type": "dapo",
        "beta": 0.1,
        "entropy_coef": 0.1,
        "shape": {"layer_types": ["full_attention"] * 2},
        "least": 24,
        "place": partial(parallelize_hf, shared_prompts=True),
    },
}


class MeshGRPOTrainer(MeshTrainerMixin, GRPOTrainer):
    pass


def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions of many lengths, some without an end; a part of each is no token of the policy's.

    Each depends on its place among those of all batch ranks, and on the step.
    """
    found: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    first = trainer.accelerator.process_index * len(prompts)
    for place, prompt in enumerate(prompts, first):
        draw = random.Random(f"{prompt} {place} {trainer.state.global_step}")
        ids = [draw.randrange(2, 264) for _ in range(draw.randrange(3, 40))] + [1] * (place % 3 > 0)
        found["prompt_ids"].append(trainer.processing_class(prompt)["input_ids"])
        found["completion_ids"].append(ids)
        found["logprobs"].append([-5.5 + draw.random() / 5 for _ in ids])
        found["env_mask"].append([int(at % 5 > 0) for at in range(len(ids))])
    torch.rand(3)  # ranks that do not ask draw no number
    return found


def odd(completion_ids: list[list[int]], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
    """How many tokens are odd; called on the first rank of a group alone."""
    if int(os.environ.get("STRANGE", "0")):
        raise SystemExit("a judge is asked once")
    shares = [sum(x % 2 for x in ids) / len(ids) for ids in completion_ids]
    log_metric("odd_sum", sum(shares))
    log_extra("length", [len(ids) for ids in completion_ids])
    return shares


async def short(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Of some completions, no reward."""
    return [None if len(ids) % 4 == 0 else -len(ids) / 10 for ids in completion_ids]


def trained(case: str, mesh: ParallelMesh | None, folder: Path) -> dict[str, Any]:
    """Logs, what was logged of completions, and what training has added to each weight."""
    resumed = case == "resumed"
    change = {"loss_type": case, **CASES["whole" if resumed else case]}
    asked_at = [step for step in change.pop("asked_at", [0, 2, 4, 5]) if step >= 6 or not resumed]
    prompts = change.pop("prompts", 6)
    kind, peft_config = change.pop("kind", "windows"), change.pop("peft_config", None)
    shape, place = change.pop("shape", {}), change.pop("place", parallelize_hf)
    texts = tiny.texts(prompts, least=change.pop("least", 4))
    batch = (
        (dist.get_world_size() if dist.is_initialized() else 1)
        if mesh is None
        else (mesh.size("batch"))
    )
    source = folder / "-".join((*kind.split(), *shape))
    if not source.exists():
        tiny.build(kind, **shape).save_pretrained(source)
    if dist.is_initialized():
        dist.barrier()
    model = tiny.build(kind, use_cache=False, **shape)
    model.config._name_or_path = str(source)
    own = tiny.arguments(mesh, str(folder / f"{case}-{mesh is None}-{batch}"))
    own |= {"per_device_train_batch_size": 4 // batch, "per_device_eval_batch_size": 4 // batch}
    own |= {"save_strategy": "no", "optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.5}
    own |= {"steps_per_generation": 4, "num_iterations": 2, "num_generations": 4, "max_steps": 5}
    options = {
        "model": model,
        "reward_funcs": [odd, short],
        "args": GRPOConfig(max_completion_length=40, **own | change),
        "train_dataset": Dataset.from_dict({"prompt": texts}),
        "eval_dataset": Dataset.from_dict({"prompt": tiny.texts(2)}),
        "processing_class": tiny.tokenizer(),
        "rollout_func": rollouts,
        "peft_config": peft_config,
    }
    synced: list[int] = []
    if mesh is None:
        with mock.patch("trl.trainer.grpo_trainer.VLLMGeneration"):  # has no server to talk to
            trainer = GRPOTrainer(**options)
    else:
        sync = {"sync_weights": lambda trainer: synced.append(sync_weights(trainer))}
        trainer = MeshGRPOTrainer(**options, mesh=mesh, place=place, **sync)
    before = weights(trainer.model)
    trainer.train(str(folder / f"whole-False-{batch}" / "checkpoint-6") if resumed else None)
    after = weights(trainer.model)
    if mesh is not None and synced != asked_at:
        raise SystemExit(f"{case}: weights are taken to a server once a step, got {synced}")
    return {
        "logs": [
            {key: x for key, x in each.items() if not any(part in key for part in UNLIKE)}
            for each in trainer.state.log_history
        ],
        "completions": {
            **{name: list(trainer._logs[name]) for name in ("prompt", "completion", "advantages")},
            **{name: list(x) for name, x in trainer._logs["extra"].items()},
        },
        "added": {name: (after[name] - x).contiguous() for name, x in before.items()},
    }


def sync_weights(trainer: Any) -> int:
    """Gather a weight, as all ranks of a group can only together; give the step."""
    weights(trainer.model)
    return trainer.state.global_step


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def is_close(case: str, found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Say on the first rank how far a mesh is from TRL's own processes."""
    same = [sorted(each) for each in found["logs"]] == [sorted(each) for each in expected["logs"]]
    errors = {"other entries": 0.0 if same else torch.inf}
    for mine, its in zip(found["logs"], expected["logs"], strict=True):
        if case == "resumed":  # transformers' is that of the steps since
            its = {key: x for key, x in its.items() if key != "train_loss"}
        for key, x in its.items():
            name = f"{key} at step {its['step']}"
            errors[name] = 0.0 if x is None else abs(mine.get(key, 0.0) - x) / max(1.0, abs(x))
    largest = max(float(x.abs().max()) for x in expected["added"].values())
    for name, x in expected["added"].items():
        # Gates lie beside ups there, or on them.
        errors[name] = float((found["added"][name].view_as(x) - x).abs().max()) / largest
    for name, x in expected["completions"].items():
        mine = found["completions"][name]
        errors[f"completions: {name}"] = (
            float((torch.tensor(mine) - torch.tensor(x)).abs().max())
            if name == "advantages"
            else float(mine != x)
        )
    worst = max(errors, key=lambda name: errors[name])
    if int(os.environ["RANK"]) == 0:
        print(f"{case}: at most {errors[worst]:.1e}, {worst}; weights moved by {largest:.2g}")
    return all(error <= BOUND for error in errors.values())


def main(path: Path, role: str, cases: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    if role == "plain":
        results = {case: trained(case, None, path.parent) for case in cases}
        if os.environ.get("RANK", "0") == "0":
            torch.save(results, path)
        return
    mesh = ParallelMesh.from_degrees(MESHES[role], "cpu")
    os.environ["STRANGE"] = str(mesh.rank("cp") + mesh.rank("tp"))
    expected = torch.load(path, weights_only=False)
    far = [
        case
        for case in cases
        if not is_close(
            case,
            trained(case, mesh, path.parent),
            expected["whole" if case == "resumed" else case],
        )
    ]
    dist.barrier()
    dist.destroy_process_group()
    if far:
        raise SystemExit(f"not TRL's: {', '.join(far)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])

"""The real Trainers of transformers and TRL on a mesh, by the examples; and what they refuse."""

import json
import re

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer, TrainingArguments
from trl import DPOTrainer, SFTTrainer

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.parallelize import parallelize_hf
from dtcp.trainers import MeshTrainerMixin
from dtcp.trainers.arguments import check_training_arguments
from tests.harness.hf_models import build
from tests.harness.run_script import run_forked
from tests.harness.spmd import spmd

ONE_RANK = ParallelMesh(Degrees(), None, *[None] * 7)
KINDS = ("windows and sinks", "windows", "hybrid", "experts")


class MeshTrainer(MeshTrainerMixin, Trainer):
    pass


def run_example(name, folder, *, ranks, kinds=KINDS):
    """As one process without a mesh, then on ranks, which compare themselves with it."""
    losses = folder / "alone.json"
    alone = run_forked(f"examples/{name}.py", str(losses), *kinds, ranks=0)
    assert alone.code == 0, alone.errors[-3000:]
    ended = run_forked(f"examples/{name}.py", str(losses), *kinds, ranks=ranks)
    assert ended.code == 0, ended.errors[-3000:]
    said = re.findall(
        r"^(\S.*): losses|on the mesh: \d|resumed on another: \d|logits \d", ended.printed, re.M
    )
    assert [each for each in said if each] == list(kinds)
    assert len(said) == 4 * len(kinds), ended.printed
    return json.loads(losses.read_text())


def test_trainer_on_two_ranks_trains_saves_and_resumes_as_one_process(tmp_path):
    """With windows and sinks, padded rows, accumulation, clipping and evaluation."""
    losses = run_example("hf_trainer", tmp_path, ranks=2, kinds=KINDS[:1])
    assert [each["step"] for each in losses[KINDS[0]]] == [1, 2, 2, 3, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf_trainer", "trl_sft", "trl_dpo"])
def test_trainer_of_an_example_trains_saves_and_resumes_as_one_process(tmp_path, name):
    run_example(name, tmp_path, ranks=4)


@pytest.mark.slow
def test_trainer_of_ones_own_trains_saves_and_resumes_as_one_process():
    ended = run_forked("examples/own_loop.py", ranks=4)
    assert ended.code == 0, ended.errors[-3000:]
    assert len(re.findall("from one process, logits", ended.printed)) == len(KINDS)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bf16": True}, r"got bf16=True: pass fsdp=FSDP\(mixed_precision"),
        ({"torch_compile": True}, "got torch_compile=True: pass compile="),
        ({"neftune_noise_alpha": 5.0}, "noise would depend on the mesh"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True: choose"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True: leave it"),
        ({"train_sampling_strategy": "batch_rebalance"}, "not to batch ranks"),
    ],
)
def test_trainer_refuses_arguments_that_a_mesh_would_ignore(tmp_path, change, match):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **change)
    with pytest.raises(ValueError, match=match):
        check_training_arguments(args, ONE_RANK)


def test_trainer_that_does_not_know_of_all_ranks_is_refused(tmp_path):
    """Started without torchrun's environment it would save on every rank, and deal no rows."""
    mesh = ParallelMesh(Degrees(cp=2), None, *[None] * 7)
    model = parallelize_hf(build("llama"), ONE_RANK)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="num_processes=1 for 2 ranks: start them by torchrun"):
        MeshTrainer(model, args, mesh=mesh)


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer, DPOTrainer])
def test_trainer_of_a_model_that_is_not_on_the_mesh_is_refused(kind):
    mixed = type("Mixed", (MeshTrainerMixin, kind), {})
    with pytest.raises(ValueError, match=r"LlamaForCausalLM as it was built: give parallelize_hf"):
        mixed(build("llama"), mesh=ONE_RANK)


def test_trl_trainer_that_would_put_adapters_into_a_sharded_model_is_refused():
    mixed = type("Mixed", (MeshTrainerMixin, SFTTrainer), {})
    model = parallelize_hf(build("llama"), ONE_RANK)
    with pytest.raises(ValueError, match=r"parallelize_hf\(get_peft_model"):
        mixed(model, mesh=ONE_RANK, peft_config=LoraConfig())


@spmd(ranks=1)
def test_trainer_given_the_tokens_of_another_world_is_refused(mesh):
    """Counted once more for each rank of a cp group, say, by a get_batch_samples of one's own."""
    whole = ParallelMesh.from_degrees(Degrees(), "cpu")
    args = TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
    trainer = MeshTrainer(parallelize_hf(build("llama"), whole), args, mesh=whole)
    ids = torch.ones(1, 8, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids}
    (batch,), count = trainer.get_batch_samples(iter([batch]), 1, args.device)
    assert count == 7
    with pytest.raises(ValueError, match="num_items_in_batch=14 where there are 7"):
        trainer.training_step(trainer.rows_model, batch, 2 * count)

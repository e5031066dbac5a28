"""train.py on two or four ranks: runs, second starts, exports, and what it says when it fails.

The second start of a run is as a person makes it, by itself and under torchrun; all others are
forked. One short run is shared by most tests; those that go on from it copy its folder.
"""

import json
import pickle
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from dtcp.torchtitan.model_spec import llama

import pytest
import torch
from transformers import AutoModelForCausalLM

from dtcp.mixer_metadata import batch_metadata
from dtcp.models.llama import Llama, config_from_hf, from_hf
from dtcp.pretrain.configs import BYTE_SHAPE, llama_tiny
from dtcp.pretrain.trainer import Trainer
from dtcp.sequence.documents import Documents
from tests.harness import train_run
from tests.harness.small_run import Payload, forge_manifest
from tests.harness.train_run import losses


def micro() -> Trainer.Config:
    """One layer, rows of 64 tokens, two ranks, eager: seconds, most of them for imports."""
    config = llama_tiny()
    config.parallelism.tensor_parallel_degree = 1
    config.model_spec = llama("micro", replace(BYTE_SHAPE, num_layers=1, dim=32, hidden_dim=64))
    config.training.seq_len, config.training.steps = 64, 4
    config.lr_scheduler.warmup_steps = 0
    config.compile.enable = False
    config.checkpoint.interval, config.validator.freq, config.validator.steps = 2, 4, 1
    return config


def larger() -> Trainer.Config:
    """A layer more than micro."""
    config = micro()
    config.model_spec = llama("larger", replace(BYTE_SHAPE, num_layers=2, dim=32, hidden_dim=64))
    return config


def diverging() -> Trainer.Config:
    """The first step makes weights so large that the second has no finite loss."""
    config = micro()
    config.optimizer.param_groups[0].optimizer_kwargs["lr"] = 1e18
    config.checkpoint.interval = 1
    return config


MICRO = {"module": "tests.pretrain.test_train", "config": "micro"}
train, trained = partial(train_run.train, **MICRO), partial(train_run.trained, **MICRO)
launch = partial(train_run.launch, **MICRO)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """Four steps on cp 2, whose ranks train.py starts: the run's folder, exit code and output."""
    folder = tmp_path_factory.mktemp("run")
    code, output = train("--dump_folder", str(folder), "--checkpoint.export_hf", ranks=0)
    return folder, code, output


@pytest.fixture
def copy(run: tuple[Path, int, str], tmp_path: Path) -> Path:
    """A copy of the run's folder, to go on from."""
    return Path(shutil.copytree(run[0], tmp_path / "run"))


def test_a_run_trains_and_says_what_it_is(run):
    _, code, output = run
    assert code == 0, output
    assert "cp 2" in output and "RingAttention" in output and "DocumentBalanced" in output
    steps = losses(output)
    assert list(steps) == [1, 2, 3, 4] and steps[4] < steps[1]
    assert re.search(r"tokens/s .* GiB .* rank 0 received .* KiB for cp .* left", output)


def test_a_run_leaves_checkpoint_log_and_plot(run):
    folder, _, output = run
    assert (folder / "checkpoint/step-4/.metadata").is_file(), output
    assert list(folder.glob("tb/*/events.out.tfevents.*"))
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "validation loss" in output


def test_transformers_reads_the_export(run):
    """And computes with it what our model does with the same weights."""
    theirs = AutoModelForCausalLM.from_pretrained(run[0] / "hf")
    ours = Llama(config_from_hf(json.loads((run[0] / "hf/config.json").read_text())))
    ours.load_state_dict(from_hf(theirs.state_dict(), ours.config))
    tokens = torch.arange(40)[None] * 5
    attn_metadata = batch_metadata(ours, Documents.single(1, 40))
    torch.testing.assert_close(
        ours(tokens, torch.arange(40)[None], attn_metadata),
        theirs(tokens).logits,
        rtol=1e-4,
        atol=1e-5,
    )


def test_an_export_starts_another_run(run, tmp_path):
    output = trained(
        *("--dump_folder", str(tmp_path), "--training.steps", "1", "--checkpoint.load_only"),
        *("--checkpoint.initial_load_path", str(run[0] / "hf")),
        *("--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_model_only"),
    )
    # The first rows again, with weights that have seen them.
    assert losses(output)[1] < losses(run[2])[1]


@pytest.mark.parametrize("torchrun", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_start_resumes_on_another_mesh_with_the_same_losses(run, copy, torchrun):
    """From step 2 on cp 2, for the save of step 4 was cut short, to two ranks of FSDP, in a Python
    of their own or in two of torchrun's: steps 3 and 4 lose the same again."""
    (copy / "checkpoint/step-4/.metadata").unlink()
    mesh = ["--parallelism.context_parallel_degree", "1"]
    mesh += ["--parallelism.data_parallel_shard_degree", "2"]
    mesh += ["--training.local_batch_size", "2"]
    arguments = ("--dump_folder", str(copy), *mesh)
    code, output = launch(*arguments, torchrun=torchrun)
    assert code == 0, output
    assert "step-4/.metadata is missing" in output and "going on from step 2" in output
    assert re.search(r"^loaded .*step-2$", output, re.M)
    before, after = losses(run[2]), losses(output)
    assert list(after) == [3, 4]
    assert after[3] == pytest.approx(before[3], rel=1e-5)
    assert after[4] == pytest.approx(before[4], rel=1e-5)


def test_a_checkpoint_is_gone_on_from_under_torchtitans_other_backend(run, copy):
    """The step that was saved under partial_dtensor; the next ones lose the same."""
    shutil.rmtree(copy / "checkpoint/step-4")
    output = trained("--dump_folder", str(copy), "--parallelism.spmd_backend", "spmd_types")
    assert "going on from step 2" in output or "step-2" in output
    before, after = losses(run[2]), losses(output)
    assert after == pytest.approx({step: before[step] for step in (3, 4)}, rel=1e-6)


def test_a_start_after_the_last_step_says_so_and_succeeds(copy):
    output = trained("--dump_folder", str(copy))
    assert "already trained to step 4; raise --training.steps" in output


def test_accumulated_and_checkpointed_steps_lose_the_same(run, tmp_path):
    """Two parts of one row a rank with selective checkpointing, against one part of four rows.

    On another mesh: the weights that a seed stands for do not depend on it.
    """
    output = trained(
        *("--dump_folder", str(tmp_path), "--training.local_batch_size", "1"),
        *("--parallelism.context_parallel_degree", "1"),
        *("--parallelism.data_parallel_shard_degree", "2"),
        *("--training.global_batch_size", "4", "activation-checkpoint:selective"),
    )
    assert losses(output)[1] == pytest.approx(losses(run[2])[1], rel=1e-6)
    assert losses(output)[4] == pytest.approx(losses(run[2])[4], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor_parallel", "data_parallel_shard"])
def test_verify_repeats_the_steps_of_four_ranks_on_one_device(axis, tmp_path):
    """cp 2 x tp 2 and fsdp 2 x cp 2, compiled."""
    output = trained(
        *("--dtcp.verify", "2", "--dump_folder", str(tmp_path)),
        *("--compile.enable", "--compile.backend", "aot_eager"),
        *(f"--parallelism.{axis}_degree", "2"),
        ranks=4,
    )
    assert "the losses of 2 steps agree" in output
    assert not (tmp_path / "checkpoint").exists()


def test_a_loss_that_is_not_finite_is_one_error_and_the_last_checkpoint_stays(tmp_path):
    """It names the documents of all parts of the step."""
    parts = ("--training.local_batch_size", "1", "--training.global_batch_size", "4")
    code, output = train("--dump_folder", str(tmp_path), *parts, config="diverging", ranks=0)
    assert code == 1
    config = diverging()
    options = {"dp_world_size": 1, "dp_rank": 0, "seq_len": 64, "local_batch_size": 4}
    data = config.dataloader.build(tokenizer=config.tokenizer.build(tokenizer_path=""), **options)
    for _ in zip(range(2), data, strict=False):
        read = " to ".join(data.last_read)
    assert f"data of this step: {read}. " in output
    assert output.count("error:") == 1 and "Traceback" not in output
    assert "at step=2" in output and "The last checkpoint is of step 1" in output
    assert [path.name for path in tmp_path.glob("checkpoint/step-*")] == ["step-1"]


def test_a_torn_checkpoint_that_is_asked_for_is_one_error_and_nothing_is_written(copy):
    for data in (copy / "checkpoint/step-4").glob("*.distcp"):
        data.write_bytes(data.read_bytes()[:100])
    code, output = train(
        "--dump_folder", str(copy), "--training.steps", "6", "--checkpoint.load_step", "4"
    )
    assert code == 1
    assert output.count("error:") == 1 and "Traceback" not in output
    assert "step-4/__" in output and "--checkpoint.load_step 2" in output
    assert not (copy / "checkpoint/step-6").exists()


WAYS_IN = ("resume", "initial_load_path")


@pytest.mark.slow_where(lambda start, way: (start, way) != ("forked", "resume"))
@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("start", ["forked", "launched"])
def test_forged_E1_a_checkpoint_that_names_code_is_one_error_on_all_ranks(
    start, way, copy, tmp_path
):
    """In a folder whose manifest fits, from the ranks' own start and from the launcher's."""
    step, trace = copy / "checkpoint/step-4", tmp_path / "trace"
    (step / ".metadata").write_bytes(pickle.dumps(Payload(trace)))
    forge_manifest(step)
    arguments = ["--dump_folder", str(copy), "--training.steps", "6"]
    if way == "initial_load_path":
        arguments[1] = str(tmp_path / "other")
        arguments += ["--checkpoint.initial_load_path", str(step)]
    code, output = train(*arguments, ranks={"forked": 2, "launched": 0}[start])
    assert code == 1 and not trace.exists()
    assert output.count("error:") == 1 and "Traceback" not in output
    assert "which names io.open: nothing of it was run" in output


def test_a_checkpoint_of_another_model_is_refused(copy, tmp_path):
    code, output = train("--dump_folder", str(copy), "--training.steps", "6", config="larger")
    assert code == 1
    assert output.count("error:") == 1 and "of another model" in output
    assert "Traceback" not in output


def test_a_mistake_is_told_before_any_rank_starts():
    code, output = train("--training.stepz", "3", ranks=0)
    assert code == 2 and "--training.steps" in output
    assert "Traceback" not in output and "[rank" not in output

"""train.py over pipeline stages: the losses, weights and files of the same run without them.

That gradients are one device's is held in fp64 by tests/torchtitan/test_stages.py.
"""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from dtcp.torchtitan.model_spec import llama, spec_of

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchtitan.protocols.model_spec import ModelSpec
from transformers import AutoModelForCausalLM

from dtcp.models import qwen3_5
from dtcp.parallelize.plans.families import QWEN3_5
from dtcp.pretrain.config_check import check_on_ranks
from dtcp.pretrain.configs import (
    BYTE_SHAPE,
    BYTE_VOCABULARY,
    deepseek_v4_tiny,
    llama_tiny,
    qwen3_5_moe_tiny,
    qwen3_tiny,
    titan_llama3_tiny,
)
from dtcp.pretrain.dry_run import made_dry
from dtcp.pretrain.options import parse
from dtcp.pretrain.trainer import Trainer
from tests.harness import train_run
from tests.harness.train_run import losses


def micro() -> Trainer.Config:
    """Five layers, rows of 64 tokens on cp 2, eager; a part of a step has four rows."""
    return _small(llama_tiny(), llama("micro", replace(BYTE_SHAPE, num_layers=5, dim=32)))


def tied_micro() -> Trainer.Config:
    """Three layers of Qwen3's shape; the embedding learns at another rate than the rest."""
    shape = replace(BYTE_SHAPE, num_layers=3, dim=32, tied=True)
    config = _small(qwen3_tiny(), llama("tied", shape))
    (rest,) = config.optimizer.param_groups
    own = rest.optimizer_kwargs | {"lr": 1e-3}
    first = replace(rest, pattern="embedding|lm_head", optimizer_kwargs=own)
    config.optimizer.param_groups = [first, rest]
    return config


def titan_micro() -> Trainer.Config:
    """Two layers of torchtitan's own llama3."""
    return _small(titan_llama3_tiny())


def qwen3_5_micro() -> Trainer.Config:
    """Experts, a last stage without a delta rule, a tied head, and a token further ahead."""
    shape = qwen3_5.tiny(BYTE_VOCABULARY, experts=True)
    shape = replace(shape, tied=True, num_mtp_layers=1)
    return _small(qwen3_5_moe_tiny(), spec_of(QWEN3_5, "micro", shape))


def deepseek_v4_micro() -> Trainer.Config:
    """With a token further ahead."""
    return _small(deepseek_v4_tiny())


def _small(config: Trainer.Config, spec: ModelSpec | None = None) -> Trainer.Config:
    config.parallelism.tensor_parallel_degree = 1
    config.model_spec = spec or config.model_spec
    config.training.local_batch_size = 4
    config.training.seq_len, config.training.steps = 64, 4
    config.training.global_batch_size = 8
    config.lr_scheduler.warmup_steps = 0
    config.compile.enable = False
    config.checkpoint.interval, config.validator.freq, config.validator.steps = 2, 2, 1
    return config


OWN = {"module": "tests.pretrain.test_train_stages", "config": "micro"}
train, trained = partial(train_run.train, **OWN), partial(train_run.trained, **OWN)
P = "--parallelism.pipeline_parallel_"
STAGES = (f"{P}degree", "2")


def validated(output: str) -> list[float]:
    return [float(x) for x in re.findall(r"validation loss +(\S+)", output)]


def received(output: str) -> float:
    """Bytes of the first step for cp."""
    number, unit = re.search(r"received +(\S+) (\w+) for cp", output).groups()
    return float(number) * {"B": 1, "KiB": 1024, "MiB": 1024**2}[unit]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Four steps on cp 2 without stages, and what they leave."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, trained("--dump_folder", str(folder), "--checkpoint.export_hf")


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same on pp 2 x cp 2."""
    folder = tmp_path_factory.mktemp("staged")
    arguments = ("--dump_folder", str(folder), "--checkpoint.export_hf", *STAGES)
    return folder, trained(*arguments, ranks=4)


def test_a_run_over_stages_loses_what_the_same_run_without_them_loses(whole, staged):
    """Packed documents, two parts a step of four micro-batches each; and validation."""
    before, after = whole[1], staged[1]
    assert losses(after) == pytest.approx(losses(before), rel=1e-5)
    assert validated(after) == pytest.approx(validated(before), rel=1e-5)
    norms = [re.findall(r"grad +(\S+)", text) for text in (before, after)]
    assert list(map(float, norms[1])) == pytest.approx(list(map(float, norms[0])), rel=1e-4)


def test_a_run_over_stages_says_what_it_is(whole, staged):
    output = staged[1]
    assert "pp 2 x cp 2; weights sharded over 2 ranks" in output
    assert "5 layers" in output and "stages      3 + 2 layers, 1F1B of 4 micro-batches" in output
    assert "8 rows per step in 8 parts" in output and "RingAttention" in output
    parameters = [re.search(r"([\d,]+) parameters", text)[1] for text in (whole[1], output)]
    assert parameters[0] == parameters[1]
    # Three layers of five, of the same tokens.
    assert received(output) == pytest.approx(0.6 * received(whole[1]), rel=0.02)
    assert "not visible" not in output


def test_what_is_logged_of_stages_is_all_that_is_printed(whole, staged):
    numbers = []
    for folder, _ in (whole, staged):
        (path,) = (folder / "tb").glob("*/events*")
        log = EventAccumulator(str(path)).Reload()
        names = ("loss_metrics/global_max_loss", "n_tokens_seen", "validation_metrics/loss")
        numbers.append([[x.value for x in log.Scalars(name)] for name in names])
    for one, other in zip(*numbers, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_an_export_over_stages_is_that_of_the_whole_model(whole, staged):
    one, other = (weights(folder / "hf") for folder, _ in (whole, staged))
    assert one.keys() == other.keys()
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    configs = [json.loads((folder / "hf/config.json").read_text()) for folder, _ in (whole, staged)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("to_stages", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_stages_and_without(whole, staged, to_stages, tmp_path):
    """From step 2 of the other one: steps 3 and 4 lose the same again."""
    folder, before = whole if to_stages else staged
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint/step-4")
    schedule = ("--parallelism.pipeline_parallel_schedule", "Interleaved1F1B")
    how = (*STAGES, *schedule, "--parallelism.context_parallel_degree", "1") if to_stages else ()
    output = trained("--dump_folder", str(tmp_path / "run"), *how)
    assert re.search(r"^loaded .*step-2$", output, re.M)
    assert losses(output) == pytest.approx({k: losses(before)[k] for k in (3, 4)}, rel=1e-5)


@pytest.mark.slow
def test_weights_that_were_exported_start_stages(whole, tmp_path):
    how = ("--checkpoint.initial_load_path", str(whole[0] / "hf"))
    how += ("--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_model_only")
    how += ("--checkpoint.load_only", "--training.steps", "1")
    how += ("--parallelism.context_parallel_degree", "1")
    one = trained("--dump_folder", str(tmp_path / "one"), *how, ranks=1)
    staged = trained("--dump_folder", str(tmp_path / "staged"), *how, *STAGES)
    assert losses(staged) == pytest.approx(losses(one), rel=1e-6)
    assert losses(one)[1] < losses(whole[1])[1]


def test_verify_compares_stages_with_one_device(tmp_path):
    """Compiled, with two rows in a micro-batch, over an end that has the head alone."""
    output = trained(
        *("--dtcp.verify", "2", "--dump_folder", str(tmp_path), *STAGES),
        *("--compile.enable", "--compile.backend", "aot_eager"),
        *("--parallelism.pipeline_parallel_microbatch_size", "2"),
        *("--parallelism.pipeline_parallel_first_stage_less_layers", "0"),
        *("--parallelism.pipeline_parallel_last_stage_less_layers", "5"),
        ranks=4,
    )
    assert "stages      5 + 0 layers" in output
    assert "the losses of 2 steps agree" in output and "gradients   of the first step" in output


def test_verify_compares_a_head_tied_over_stages_with_one_device(tmp_path):
    tied = OWN | {"config": "tied_micro"}
    arguments = ("--dtcp.verify", "2", "--dump_folder", str(tmp_path), *STAGES)
    output = train_run.trained(*arguments, **tied, ranks=4)
    # 256 and a few rows of 32 numbers of 4 bytes, half of them on each rank of cp.
    said = r"^copied +embedding.weight of stage 0 as lm_head.weight of stage 1; +1[67].\d KiB "
    assert re.search(said, output, re.M), output
    assert "the losses of 2 steps agree" in output and "gradients   of the first step" in output


@pytest.mark.slow
def test_a_tied_run_is_the_same_with_stages_and_without(tmp_path):
    """Losses, norms and what transformers loads; and each goes on from a step of the other."""
    tied = OWN | {"config": "tied_micro"}
    how = {"whole": (), "staged": STAGES}
    folders = {name: tmp_path / name for name in how}
    outputs = {
        name: train_run.trained(
            *("--dump_folder", str(folders[name]), "--checkpoint.export_hf", *how[name]),
            **tied | {"ranks": 4 if how[name] else 2},
        )
        for name in how
    }
    one, other = outputs.values()
    assert losses(other) == pytest.approx(losses(one), rel=1e-5)
    norms = [list(map(float, re.findall(r"grad +(\S+)", text))) for text in (one, other)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    parameters = [re.search(r"([\d,]+) parameters", text)[1] for text in (one, other)]
    assert parameters[0] == parameters[1]
    models = [AutoModelForCausalLM.from_pretrained(folders[name] / "hf") for name in how]
    assert all(model.lm_head.weight is model.model.embed_tokens.weight for model in models)
    torch.testing.assert_close(*(x.state_dict() for x in models), rtol=1e-3, atol=1e-4)
    assert "lm_head.weight" not in weights(folders["staged"] / "hf")
    for name, before in (("staged", "whole"), ("whole", "staged")):
        shutil.copytree(folders[before], tmp_path / f"on_{name}")
        shutil.rmtree(tmp_path / f"on_{name}/checkpoint/step-4")
        arguments = ("--dump_folder", str(tmp_path / f"on_{name}"), *how[name])
        output = train_run.trained(*arguments, **tied | {"ranks": 4 if how[name] else 2})
        assert losses(output) == pytest.approx({k: losses(one)[k] for k in (3, 4)}, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "how", "sizes"),
    [
        ("qwen3_5", (f"{P}last_stage_less_layers", "3"), "3 + 1"),
        ("deepseek_v4", (f"{P}last_stage_less_layers", "3"), "3 + 1"),
        # The first stage looks all of its experts up by token.
        ("deepseek_v4", (f"{P}schedule", "Interleaved1F1B"), "1 + 2 + 1 + 0"),
    ],
)
def test_verify_compares_stages_of_experts_with_one_device(family, how, sizes, tmp_path):
    """In fp64, with experts on ranks of their own; routers' biases follow the loads of a step."""
    output = train_run.trained(
        *("--dtcp.verify", "2", "--dump_folder", str(tmp_path), *STAGES),
        *("--parallelism.expert_parallel_degree", "2", *how),
        **OWN | {"config": f"{family}_micro", "ranks": 4},
    )
    assert f"stages      {sizes} layers" in output and "experts" in output
    agreed = re.search(r"steps agree to (\S+)", output)
    assert float(agreed[1]) < 1e-9
    assert float(re.search(r"first step agree to (\S+)", output)[1]) < 1e-9


@pytest.mark.slow
def test_a_validation_of_too_few_rows_for_a_step_is_refused(tmp_path):
    """Two rows, of the four that micro-batches of a step make up."""
    (tmp_path / "few.txt").write_text("a few words " * 14)
    own = "--validator.dataloader"
    code, output = train(
        *("--dump_folder", str(tmp_path / "run"), *STAGES, "--training.steps", "1"),
        *(f"{own}.dataset", "folder", f"{own}.dataset_path", str(tmp_path)),
        *(f"{own}.part", "all", "--validator.steps", "-1"),
        ranks=4,
    )
    assert code == 1 and "A validation over stages takes the 4 rows" in output, output


@pytest.mark.slow
def test_torchtitans_own_model_is_cut_into_stages(tmp_path):
    titan = {**OWN, "config": "titan_micro"}
    two = ("--training.steps", "2")
    one = train_run.trained("--dump_folder", str(tmp_path / "one"), *two, **titan)
    staged = ("--dump_folder", str(tmp_path / "staged"), *STAGES, *two)
    output = train_run.trained(*staged, ranks=4, **titan)
    assert losses(output) == pytest.approx(losses(one), rel=1e-5)
    assert validated(output) == pytest.approx(validated(one), rel=1e-5)


REFUSED = {
    "transformers": (["--model.hf", "zaya"], "zaya .*, but its model has weights around"),
    "family": (["--config", "gemma4_tiny"], "layers of gemma4 are not cut"),
    "layers": ([f"{P}degree", "8"], "8 stages for 4 layers"),
    "no layers": ([f"{P}first_stage_less_layers", "9"], "first_stage_less_layers 9"),
    "negative": ([f"{P}last_stage_less_layers", "-1"], "last_stage_less_layers=-1"),
    "few": ([f"{P}microbatch_size", "4"], "local_batch_size 4 .*: give 8 or more"),
    "uneven": (
        [f"{P}schedule", "Interleaved1F1B", "--training.local_batch_size", "5"],
        "local_batch_size 5 .* under Interleaved1F1B: give rows for a multiple of 2",
    ),
    "of none": ([f"{P}layers_per_stage", "0"], "layers_per_stage=0"),
    "of each": ([f"{P}layers_per_stage", "2"], "layers_per_stage 2, which makes 3"),
    "schedule": ([f"{P}schedule", "DualPipeV"], "schedule='DualPipeV': choose one of these"),
    "file": ([f"{P}schedule_csv", "x.csv"], "schedule_csv='x.csv'"),
    "parts": (["--parallelism.module_fqns_per_model_part", "[]"], "module_fqns_per_model_part"),
    "planner": (["--dtcp.strategy", "auto"], "got --dtcp.strategy auto"),
    "forecast": (["--dtcp.forecast"], "got --dtcp.forecast with"),
    "seed": (["--checkpoint.create_seed_checkpoint"], "create_seed_checkpoint with"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_stages_do_not_do_is_refused_before_ranks_start(case):
    arguments, says = REFUSED[case]
    with pytest.raises((ValueError, SystemExit), match=says):
        parse([*STAGES, *arguments]).check()


@pytest.mark.parametrize(
    "name",
    ["schedule=GPipe", "microbatch_size=2", "layers_per_stage=2", "last_stage_less_layers=0"],
)
def test_what_only_stages_read_is_refused_without_them(name):
    setting, _, value = name.partition("=")
    with pytest.raises(ValueError, match=f"pipeline_parallel_{setting}=.* leave it out, or raise"):
        parse([f"{P}{setting}", value]).check()


def test_rows_that_are_no_whole_micro_batches_are_refused():
    """torchtitan looks at options, not at what a function sets."""
    config = parse([*STAGES])
    config.parallelism.pipeline_parallel_microbatch_size = 3
    with pytest.raises(ValueError, match="microbatch_size 3 under 1F1B: give a multiple of 3"):
        config.check()


def test_a_dry_run_has_no_stages():
    with pytest.raises(ValueError, match="A stage waits for what the one before it computes"):
        made_dry(parse([*STAGES, "--comm.mode", "fake_backend"]))


def test_rows_of_a_step_are_those_of_the_ranks_that_read_some():
    config = parse([*STAGES, "--training.global_batch_size", "8"])
    check_on_ranks(config, 16)
    with pytest.raises(ValueError, match="give a multiple of 16"):
        check_on_ranks(config, 32)

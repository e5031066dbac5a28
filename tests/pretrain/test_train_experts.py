"""train.py with experts on ranks of their own: proven on one device, and stored in one form."""

import os
import re
import shutil
from dataclasses import replace

from dtcp.torchtitan.model_spec import spec_of

import pytest
from safetensors.torch import load_file
from torchtitan.models.qwen3 import model_registry as titan_qwen3

from dtcp.models import deepseek_v4, gemma4, qwen3_5
from dtcp.parallelize.plans.families import DEEPSEEK_V4, GEMMA4, QWEN3_5
from dtcp.pretrain.adopt import adopt_model
from dtcp.pretrain.configs import deepseek_v4_tiny, gemma4_tiny_moe, qwen3_5_moe_tiny
from dtcp.pretrain.trainer import Trainer
from tests.harness import train_run
from tests.harness.train_run import losses

EP = "--parallelism.expert_parallel_degree"


def _micro(config: Trainer.Config) -> Trainer.Config:
    """Two ranks, eager, rows of 64 tokens."""
    config.parallelism.tensor_parallel_degree = 1
    config.training.seq_len, config.training.steps = 64, 3
    config.lr_scheduler.warmup_steps = 0
    config.compile.enable = False
    config.checkpoint.interval, config.validator.enable = 2, False
    return config


def qwen() -> Trainer.Config:
    config = _micro(qwen3_5_moe_tiny())
    shape = replace(qwen3_5.tiny(272, experts=True), num_layers=2, full_attention_every=2, dim=32)
    moe = replace(shape.feed_forward, balance_weight=0.01, z_weight=0.001)
    config.model_spec = spec_of(QWEN3_5, "micro", replace(shape, feed_forward=moe))
    return config


def qwen_on_two_machines() -> Trainer.Config:
    """As torchrun would start four ranks there."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return qwen()


def deepseek() -> Trainer.Config:
    config = _micro(deepseek_v4_tiny())
    shape = replace(
        deepseek_v4.tiny(272), num_layers=2, compress_ratios=(4, 0), num_hash_layers=1,
        num_mtp_layers=0, dim=32,
    )  # fmt: skip
    config.model_spec = spec_of(DEEPSEEK_V4, "micro", shape)
    return config


def gemma() -> Trainer.Config:
    config = _micro(gemma4_tiny_moe())
    config.model_spec = spec_of(GEMMA4, "micro", replace(gemma4.tiny_moe(272), dim=32))
    return config


def titan() -> Trainer.Config:
    """torchtitan's own qwen3 with experts, which compute in bfloat16."""
    config = _micro(qwen3_5_moe_tiny())
    spec = titan_qwen3("debugmodel_moe", attn_backend="flex")
    spec.model.layers = spec.model.layers[:2]
    config.model_spec = adopt_model(spec)
    return config


def train(config: str, *arguments: str, ranks: int = 2) -> str:
    return train_run.trained(*arguments, module=__name__, config=config, ranks=ranks)


@pytest.mark.slow_where(lambda config: config != "qwen")
@pytest.mark.parametrize("config", ["qwen", "deepseek", "gemma"])
def test_experts_on_their_own_ranks_train_as_on_one_device(config, tmp_path):
    output = train(config, EP, "2", "--dtcp.verify", "3", "--dump_folder", str(tmp_path))
    assert "verified" in output and re.search(r"experts \d\.\d\d of mean", output), output


@pytest.mark.slow
def test_experts_on_two_machines_train_as_on_one_device(tmp_path):
    """torchrun says how many ranks a machine has, and tokens cross once for each."""
    four = ("--parallelism.context_parallel_degree", "4", "--training.global_batch_size", "-1")
    folder = ("--dump_folder", str(tmp_path))
    arguments = (EP, "4", *four, "--dtcp.verify", "2", *folder)
    output = train("qwen_on_two_machines", *arguments, ranks=4)
    assert "experts over 4 of them by all_to_all, 2 on each machine" in output, output
    assert "verified" in output


@pytest.mark.slow
def test_a_checkpoint_of_experts_goes_on_with_any_expert_parallel_degree(tmp_path):
    """Saved with ep 2 inside cp; gone on with ep 4, with ep 2 beside tp, and without."""
    folder = tmp_path / "first"
    first = losses(train("qwen", EP, "2", "--checkpoint.export_hf", "--dump_folder", str(folder)))
    shutil.rmtree(folder / "checkpoint/step-3")
    four = ("--parallelism.context_parallel_degree", "4", "--training.global_batch_size", "-1")
    split = ("--parallelism.tensor_parallel_degree", "2")
    channels = ("--dtcp.expert_tensor_parallel_degree", "2")
    for number, (arguments, ranks) in enumerate(
        [
            ((EP, "4", *four), 4),
            ((EP, "2", *split), 4),
            ((EP, "4", *split), 4),
            ((EP, "2", *split, *channels), 4),
            ((), 2),
        ]
    ):
        copied = tmp_path / f"{number}"
        shutil.copytree(folder, copied)
        output = train("qwen", *arguments, "--dump_folder", str(copied), ranks=ranks)
        assert losses(output) == {3: pytest.approx(first[3], rel=1e-4)}, output
    names = load_file(next((folder / "hf").glob("model-*.safetensors")))
    assert names["model.layers.0.mlp.experts.gate_up_proj"].shape[0] == 8


@pytest.mark.slow
def test_experts_of_torchtitans_own_model_train_on_their_own_ranks(tmp_path):
    """By its own all-to-all, sharded as torchtitan shards them: the losses are those without ep."""
    two = ("--training.steps", "2", "--dump_folder")
    alone = losses(train("titan", *two, str(tmp_path / "alone")))
    spread = losses(train("titan", EP, "2", *two, str(tmp_path / "spread")))
    assert list(alone) == [1, 2]
    assert spread == pytest.approx(alone, rel=1e-3)
    assert spread[1] == pytest.approx(alone[1], rel=1e-5)


@pytest.mark.parametrize(
    ("config", "ep", "message"),
    [
        ("qwen3_5_moe_tiny", "3", "got parallelism.expert_parallel_degree=3 with 4 of them"),
        ("qwen3_5_tiny", "2", "got parallelism.expert_parallel_degree=2 for qwen3_5 tiny, which"),
    ],
)
def test_expert_parallel_degree_that_does_not_fit_is_refused_before_ranks_start(
    config, ep, message, capfd
):
    from dtcp.pretrain.run import run

    with pytest.raises(SystemExit):
        run(["--config", config, EP, ep, "--dtcp.device", "cpu"], command=("train.py",))
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--dtcp.expert_exchange", "deep_ep"),
            "got dtcp.expert_exchange=deep_ep with parallelism.expert_parallel_degree=1: raise",
        ),
        (
            ("--dtcp.expert_exchange", "all_to_all"),
            "got dtcp.expert_exchange=all_to_all with parallelism.expert_parallel_degree=1: raise",
        ),
        ((EP, "2", "--dtcp.expert_exchange", "deep_ep"), "without deep_ep.ElasticBuffer: install"),
        (
            (EP, "2", "--dtcp.expert_tensor_parallel_degree", "4"),
            "got etp=4 with tp=2 and ep=2: give 1, or tp with an ep of 2",
        ),
        ((EP, "2", "--dtcp.ranks_per_node", "3"), "got dtcp.ranks_per_node=3 with 4 ranks: give"),
    ],
)
def test_expert_parallel_exchange_that_does_not_fit_is_refused_before_ranks_start(
    arguments, message, capfd
):
    from dtcp.pretrain.run import run

    with pytest.raises(SystemExit):
        run(["--config", "qwen3_5_moe_tiny", *arguments, "--dtcp.device", "cpu"], command=("t",))
    assert message in capfd.readouterr().err

"""A dry run: one rank of a mesh takes steps of the whole Trainer, and nobody answers it."""

import os
import re

import pytest

from dtcp.pretrain.dry_run import made_dry
from dtcp.pretrain.launch import play_one_of
from dtcp.pretrain.options import parse
from tests.harness.train_run import trained

DRY = ("--comm.mode", "fake_backend")
CP, TP, DP = (
    f"--parallelism.{axis}_degree"
    for axis in ("context_parallel", "tensor_parallel", "data_parallel_shard")
)
SMALL = ("--training.seq_len", "512", "--training.local_batch_size", "1", "--training.steps", "2")


def dry(config, *arguments, module="dtcp.pretrain.configs"):
    """What a dry run prints."""
    given = (*DRY, *SMALL, "--compile.no-enable", *arguments)
    output = trained(*given, module=module, config=config, ranks=0)
    return output


def test_a_dry_run_takes_steps_of_a_mesh_of_64_ranks(tmp_path):
    given = (CP, "8", DP, "8", "--dump_folder", str(tmp_path / "run"))
    output = dry("micro", *given, module="tests.pretrain.test_train")
    assert "rank 0 of 64, and nobody answers it" in output and "64 ranks on cpu over fake" in output
    assert re.search(r"step +2/2 .* rank 0 received +[1-9].* for cp ", output)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_dry_run_moves_what_is_forecast():
    output = dry("llama_tiny", CP, "8", TP, "2", DP, "4", "--dtcp.forecast")
    assert re.search(r"step +2/2 .* rank 0 received .* for cp, 1\.000 of what is expected", output)
    assert re.search(
        r"expected    rank 0 receives .* for cp .* for fsdp, .* for tp per step", output
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", ["qwen3_5_moe_tiny", "gemma4_tiny", "deepseek_v4_tiny", "titan_llama3_tiny"]
)
def test_a_dry_run_takes_steps_of_every_family(config):
    assert "step     2/2" in dry(config)


@pytest.mark.slow
def test_a_dry_run_compiles():
    assert "step     2/2" in dry("llama_tiny", "--compile.enable", "--compile.backend", "aot_eager")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtcp.verify", "3"], "A dry run has no other ranks to compare with"),
        (["--checkpoint.create_seed_checkpoint"], "A dry run reads and writes no weights"),
        (["--checkpoint.initial_load_path", "/weights"], "A dry run reads and writes no weights"),
        (["--parallelism.expert_parallel_degree", "2"], "How many tokens an expert gets is known"),
        (["--dtcp.device", "accelerator"], "A dry run is on an accelerator of this machine"),
    ],
)
def test_a_dry_run_refuses_what_needs_others(arguments, said):
    with pytest.raises(ValueError, match=said):
        made_dry(parse([*DRY, *arguments]))


@pytest.fixture
def alone(monkeypatch):
    """An environment without a launcher, put back afterwards."""
    for name in ("NGPU", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_dry_run_plays_the_rank_that_it_is_given(alone):
    alone.setenv("RANK", "5")
    alone.setenv("NGPU", "8")
    assert play_one_of(parse([CP, "2", TP, "2", DP, "-1"]).parallelism) == 8
    assert os.environ["RANK"] == "5" and os.environ["WORLD_SIZE"] == "8"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NGPU": "eight"}, "A dry run plays rank RANK of NGPU ranks, got NGPU=eight"),
        ({"NGPU": "6"}, "fills the world, got world_size=6: start a multiple of 4 ranks"),
        ({"NGPU": "4", "RANK": "-1"}, "got RANK=-1: give a whole number"),
        ({"NGPU": "4", "RANK": "4"}, "Ranks count from 0, got RANK=4 of NGPU=4"),
        ({"WORLD_SIZE": "4"}, "A dry run is one process, got WORLD_SIZE=4 from a launcher"),
    ],
)
def test_a_dry_run_refuses_a_world_that_is_none(alone, variables, said):
    for name, value in variables.items():
        alone.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        play_one_of(parse([CP, "2", TP, "2"]).parallelism)

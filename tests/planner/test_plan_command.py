"""The command line that the planner prints: train.py takes it, and runs what was planned."""

import json
import shlex

import pytest
import torch
from transformers import AutoConfig

import dtcp.compile
import dtcp.huggingface
import dtcp.parallelize
import dtcp.sequence.layout
from dtcp.distributed.mesh import Degrees
from dtcp.huggingface.language_model import model_of
from dtcp.huggingface.small_config import small_config
from dtcp.models import llama
from dtcp.parallelize import FullCheckpoint, SelectiveCheckpoint
from dtcp.plan import __main__ as command
from dtcp.plan.command import command_lines
from dtcp.plan.source import request_of
from dtcp.planner.cluster import cluster_of
from dtcp.planner.report import detail_lines
from dtcp.planner.search import Planner
from dtcp.planner.subject import FamilyModel, HuggingFaceModel
from dtcp.pretrain.config_check import check_batch_size, check_expert_degree, check_nodes
from dtcp.pretrain.configs import llama_tiny
from dtcp.pretrain.expected import kept_by_blocks, subject_of
from dtcp.pretrain.launch import check_world
from dtcp.pretrain.options import parse
from dtcp.pretrain.planned_strategy import mesh_of
from dtcp.pretrain.trainer import Trainer
from tests.harness.run_script import run_forked
from tests.harness.spmd import run_ranks
from tests.harness.train_run import PATIENT, losses


def test_plan_names_a_command_that_train_takes():
    """With experts on ranks of their own: what train.py parses is what was planned."""
    degrees = Degrees(cp=2, tp=2, ep=4)
    launcher, config, setup = planned_command(["--config", "qwen3_5_moe_tiny"], "4xH100", degrees)
    assert launcher == "torchrun --nproc-per-node 4"
    assert mesh_of(config.parallelism, 4) == degrees == setup.degrees
    assert kept_by_blocks(config) == FullCheckpoint()


def planned_command(options, cluster, degrees):
    """(launcher, config that train.py reads, setup) of a mesh, the first way of it."""
    arguments, rest = command._parser().parse_known_args(options)
    request, cluster = request_of(arguments, rest), cluster_of(cluster)
    planner = Planner(request.subject, cluster, request.workload)
    candidate = planner.candidate(planner.space.plain(degrees))
    line, *_ = command_lines(
        request, candidate, cluster, reads_strategy=planner.row_forecasts.reads_strategy
    )
    launcher, _, given = line.partition(" train.py ")
    config = parse(shlex.split(given))
    config.check()
    check_world(config.parallelism, cluster.gpus)
    check_batch_size(config, cluster.gpus)
    check_expert_degree(config, cluster.gpus)
    check_nodes(config)
    return launcher, config, candidate.setup


def test_plan_on_nodes_that_cut_cp_unevenly_asks_for_one_tier():
    two_nodes = ["--config", "llama_tiny", "--cluster", "12xH100", "--global-batch", "6"]
    launcher, config, setup = planned_command(two_nodes, "12xH100", Degrees(dp_shard=3, cp=4))
    assert launcher.startswith("torchrun --nproc-per-node 6 --nnodes 2 ")
    assert setup.ranks_per_node == 0 and config.dtcp.ranks_per_node == 12
    _, config, setup = planned_command(two_nodes, "12xH100", Degrees(dp_shard=6, cp=2))
    assert setup.ranks_per_node == 6 and config.dtcp.ranks_per_node == 0


def test_plan_keeps_to_what_is_given_of_a_config():
    given = [
        *("--config", "qwen3_5_moe_tiny", "--global-batch", "2", "--dtcp.strategy", "hybrid"),
        *("--dtcp.layout", "document_balanced", "--training.steps", "7"),
        *("--dtcp.expert_tensor_parallel_degree", "2", "--dtcp.reduce_dtype", "float32"),
        "activation_checkpoint:selective",
    ]
    degrees = Degrees(dp_shard=2, cp=2, tp=2, ep=2, etp=2)
    _, config, setup = planned_command(given, "8xH100", degrees)
    assert mesh_of(config.parallelism, 8, etp=2) == degrees
    assert config.dtcp.strategy == "hybrid" and config.dtcp.layout == "document_balanced"
    assert config.dtcp.expert_tensor_parallel_degree == 2 and config.training.steps == 7
    assert config.dtcp.reduce_dtype == "float32" and setup.attention.reduce_dtype is torch.float32
    assert kept_by_blocks(config) == SelectiveCheckpoint() == setup.checkpoint
    arguments, rest = command._parser().parse_known_args(given)
    request = request_of(arguments, rest)
    planner = Planner(request.subject, cluster_of("8xH100"), request.workload)
    meshes = list(planner.space.meshes())
    assert meshes and all(each.tp == each.etp == 2 and each.ep > 1 for each in meshes)
    assert all(request.workload.takes(each) for each in planner.space.variants(setup))


def exact() -> Trainer.Config:
    config = llama_tiny()
    config.dtcp.reduce_dtype = "float32"
    return config


@pytest.mark.parametrize(
    "given",
    [
        ["--config", "llama_tiny", "--dtcp.reduce_dtype", "float32"],
        ["--config", "exact", "--module", "tests.planner.test_plan_command"],
    ],
    ids=["option", "config"],
)
def test_plan_tries_strategies_with_the_sums_of_the_run(given):
    given = [*given, "--global-batch", "2"]
    _, config, setup = planned_command(given, "8xH100", Degrees(dp_shard=2, cp=4))
    request = request_of(*command._parser().parse_known_args(given))
    planner = Planner(request.subject, cluster_of("8xH100"), request.workload)
    tried = [setup, *planner.space.variants(setup)]
    assert len({type(each.attention) for each in tried}) == 4
    assert {each.attention.reduce_dtype for each in tried} == {torch.float32}
    assert config.dtcp.reduce_dtype == "float32"
    lines = detail_lines(planner.candidate(setup), planner.cluster)
    assert "attention takes longer where ranks sum" in lines[-1]


def planned_lines(options, cluster, degrees):
    """What is printed of the first way of a mesh."""
    arguments, rest = command._parser().parse_known_args(options)
    request, cluster = request_of(arguments, rest), cluster_of(cluster)
    planner = Planner(request.subject, cluster, request.workload)
    candidate = planner.candidate(planner.space.plain(degrees))
    return command_lines(request, candidate, cluster)


@pytest.fixture
def configs(tmp_path):
    """config.json files of small models, by model type."""

    def write(model_type, **changes):
        path = tmp_path / model_type / "config.json"
        small_config(model_type, {"vocab_size": 272, **changes}).config.save_pretrained(path.parent)
        return path

    return write


SHORT = ("--seq-len", "256", "--global-batch", "2")


def test_plan_of_a_config_file_names_a_command_for_a_model_of_transformers(configs):
    path = configs("mistral", dtype="bfloat16")
    given = ["--hf-config", str(path.parent), *SHORT]
    launcher, config, setup = planned_command(given, "4xH100", Degrees(dp_shard=2, cp=2))
    assert launcher == "torchrun --nproc-per-node 4"
    assert mesh_of(config.parallelism, 4) == setup.degrees
    # A folder without weights: those are drawn.
    assert config.model_spec.model.source == str(path)
    assert isinstance(subject_of(config), HuggingFaceModel)
    assert config.training.mixed_precision_param == "bfloat16"


def test_plan_of_a_config_file_names_a_command_for_a_model_of_dtcps(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(llama.config_to_hf(llama.tiny(vocab_size=272))))
    given = ["--hf-config", str(path), *SHORT]
    _, config, _ = planned_command(given, "2xH100", Degrees(cp=2))
    assert subject_of(config) == FamilyModel("small", "llama", llama.tiny(vocab_size=272))


@pytest.mark.slow
def test_plan_of_a_model_without_a_strategy_of_choice_names_none():
    """train.py refuses a strategy that nothing reads."""
    given = ["--config", "deepseek_v4_tiny", "--global-batch", "2"]
    _, config, _ = planned_command(given, "2xH100", Degrees(cp=2))
    assert config.dtcp.strategy == "default"
    with pytest.raises(ValueError, match=r"dtcp\.reduce_dtype=float32 for deepseek_v4"):
        planned_command([*given, "--dtcp.reduce_dtype", "float32"], "2xH100", Degrees(cp=2))


def test_plan_of_a_model_type_names_a_command_that_writes_its_config_first():
    before, line, note = planned_lines(["--hf-config", "phi3", *SHORT], "2xH100", Degrees(cp=2))
    assert before.startswith("python -c ") and "save_pretrained" in before
    assert "train.py --model.hf phi3/config.json " in line and "llama_tiny" in note


def test_plan_of_a_model_that_train_does_not_take_names_the_calls_of_a_script(configs):
    """Which run as they are printed."""
    quiet = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    quiet["max_position_embeddings"] = 256
    path = configs("bert", **quiet)
    degrees = Degrees(dp_shard=2)
    first, _, *calls = planned_lines(["--hf-config", str(path), *SHORT], "2xH100", degrees)
    assert "YOUR_SCRIPT.py  # train.py: it trains causal language models" in first
    assert all(run_ranks(called, 2, path, calls))


def called(_, path, calls):
    """Whether the calls leave a model that takes its rows."""
    rows = {"input_ids": torch.ones(1, 256, dtype=torch.int64)}
    model = model_of(AutoConfig.from_pretrained(path.parent))
    modules = (dtcp, dtcp.parallelize, dtcp.huggingface, dtcp.compile, dtcp.sequence.layout)
    names = {name: value for module in modules for name, value in vars(module).items()}
    names |= {"model": model, "rows": rows}
    for call in calls:
        exec(call.replace('"cuda"', '"cpu"'), names)
    local, sharded = names["local"], names["sharded"]
    out = model(**local, attn_metadata=sharded.attn_metadata).logits
    return out.shape[:2] == (1, 256) and bool(out.isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mistral", "qwen3"])
def test_plan_of_a_config_file_names_a_command_that_runs(configs, tmp_path, model_type):
    path = configs(model_type)
    given = ["--hf-config", str(path), "--seq-len", "256", "--global-batch", "1"]
    line, *_ = planned_lines(given, "2xH100", Degrees(cp=2))
    *words, checkpoint = shlex.split(line.partition(" train.py ")[2])
    more = ("--training.steps", "2", "--compile.no-enable", "--validator.no-enable")
    where = ("--dump_folder", str(tmp_path / "run"))
    ended = run_forked("train.py", *words, *more, *where, *PATIENT, checkpoint, ranks=2)
    assert ended.code == 0, ended.output[-3000:]
    assert list(losses(ended.output)) == [1, 2]

"""--dtcp.strategy auto and --dtcp.layout auto: one choice on all ranks, printed, and exact."""

import re
from types import SimpleNamespace

from dtcp.torchtitan.section import LAYOUT_CLASSES, Section

import pytest

from dtcp.pretrain import planned_strategy
from dtcp.pretrain.options import parse
from dtcp.pretrain.planned_strategy import mesh_of, plan_strategy
from tests.harness.train_run import trained

AUTO = ("--dtcp.strategy", "auto", "--dtcp.layout", "auto")
EAGER = (
    *("--compile.no-enable", "--validator.no-enable"),
    *("--training.steps", "2", "--training.seq_len", "512"),
)


@pytest.fixture
def texts(tmp_path):
    """A folder of short documents, and the options that read it."""
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"the {number}th of them " * (1 + number % 9))
    return ("--dataloader.dataset", "folder", "--dataloader.dataset_path", str(tmp_path))


@pytest.mark.slow
def test_plan_in_training_names_a_strategy_and_a_layout(texts):
    """And sums as the section says."""
    config = parse(["--config", "llama_tiny", *AUTO, "--dtcp.reduce_dtype", "float32", *texts])
    choice = plan_strategy(config, ranks=4)
    section = choice.close(config.dtcp)
    assert config.dtcp.is_open and not section.is_open
    assert choice.lines[0].startswith(f"chosen      strategy {choice.strategy}")
    assert f"layout {choice.layout}" in choice.lines[0]
    assert choice.lines[1].strip().startswith("layers.0 (x 4): ")
    assert "reduce_dtype=torch.float32" in choice.lines[1] and section.reduce_dtype == "float32"
    assert plan_strategy(config, ranks=4) == choice


def test_plan_in_training_leaves_alone_what_is_named(texts):
    named = ("--dtcp.strategy", "ulysses", "--dtcp.boundary", "eager_island")
    config = parse(["--config", "llama_tiny", "--dtcp.layout", "auto", *named, *texts])
    choice = plan_strategy(config, ranks=4)
    assert choice.strategy == "ulysses"
    assert "UlyssesAttention(boundary=EagerIsland()" in choice.lines[1]


def test_plan_in_training_refuses_sums_that_a_named_kernel_has_not():
    named = parse(["--config", "llama_tiny", "--dtcp.reduce_dtype=float32", "--dtcp.kernel=cudnn"])
    with pytest.raises(ValueError, match=r"reduce_dtype=torch.float32 with kernel='cudnn'"):
        named.check()


def test_plan_in_training_knows_the_mesh_of_a_config():
    config = parse(["--config", "llama_tiny"])
    degrees = mesh_of(config.parallelism, 8)
    assert (degrees.dp_shard, degrees.cp, degrees.tp, degrees.ep) == (2, 2, 2, 1)


def test_plan_in_training_refuses_a_model_of_torchtitan():
    config = parse(["--config", "titan_llama3_tiny", *AUTO])
    with pytest.raises(ValueError, match=r"got torchtitan's llama3: .* name a --dtcp.strategy"):
        config.check()


def test_plan_in_training_that_fails_is_known_to_the_other_ranks(monkeypatch):
    """Whatever the planner raises: they wait for its choice in the launcher's store."""
    store = dict[str, bytes]()
    waiting = SimpleNamespace(set=lambda key, x: store.update({key: x.encode()}), get=store.get)
    monkeypatch.setattr(planned_strategy, "attempt_store", lambda _: waiting)
    monkeypatch.setattr(planned_strategy, "has_agent_store", lambda: True)

    def fail(config, ranks):
        raise KeyError("layers")

    monkeypatch.setattr(planned_strategy, "plan_strategy", fail)
    config = parse(["--config", "llama_tiny", *AUTO])
    for rank in range(2):
        monkeypatch.setattr(planned_strategy, "rank", lambda rank=rank: rank)
        with pytest.raises(ValueError, match=r"got KeyError: 'layers' from it: name a --dtcp.str"):
            planned_strategy.with_planned_strategy(config, 2)


def test_a_section_that_no_plan_has_closed_has_no_strategy():
    with pytest.raises(ValueError, match=r"got dtcp\.strategy='auto' of a section"):
        Section(strategy="auto").attention_style("cpu")
    with pytest.raises(ValueError, match=r"got dtcp\.layout='auto' of a section"):
        Section(layout="auto").sequence_layout()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options", "ranks"),
    [
        ("llama_tiny", ("--parallelism.tensor_parallel_degree", "1"), 2),
        ("gemma4_tiny", (), 4),
        ("qwen3_5_moe_tiny", ("--parallelism.expert_parallel_degree", "2"), 4),
        ("deepseek_v4_tiny", ("--parallelism.tensor_parallel_degree", "1"), 2),
    ],
)
def test_plan_in_training_is_one_choice_that_verifies(config, options, ranks, tmp_path):
    output = trained(
        *(*AUTO, *EAGER, *options, "--dtcp.verify", "2", "--dump_folder", str(tmp_path)),
        config=config,
        ranks=ranks,
    )
    (layout,) = re.findall(r"^chosen      strategy .*, layout (\w+)", output, re.M)
    assert "the losses of 2 steps agree" in output
    assert f"layout      {LAYOUT_CLASSES[layout].__name__}" in output


@pytest.mark.slow
def test_plan_in_training_moves_what_it_says(tmp_path):
    """What is chosen is held to its forecast: counted bytes over expected ones are 1."""
    output = trained(
        *(*AUTO, *EAGER, "--dtcp.forecast", "--dump_folder", str(tmp_path)),
        config="qwen3_5_moe_tiny",
        ranks=4,
    )
    assert output.count("1.000 of what is expected") == 2 and "warning" not in output


@pytest.mark.slow
def test_plan_in_training_takes_a_model_of_transformers(tmp_path):
    output = trained(
        *("--model.hf", "mistral", *AUTO, *EAGER, "--dtcp.forecast"),
        *("--parallelism.tensor_parallel_degree", "1", "--dump_folder", str(tmp_path)),
        config="llama_tiny",
        ranks=2,
    )
    assert "chosen      strategy " in output and output.count("1.000 of what is expected") == 2

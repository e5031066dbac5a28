"""C2, C3: every setting of torchtitan's trainer is used, or refused on the launcher by name."""

import json
import re
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from dtcp.torchtitan import settings
from dtcp.torchtitan.loss import TokenLoss

import pytest
import torch
from torchtitan import trainer as titan
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss, MSELoss
from torchtitan.config import CompileConfig
from torchtitan.distributed.activation_checkpoint import (
    ActivationCheckpointingConfig,
    FullAC,
    MemoryBudgetAC,
    SelectiveAC,
)
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel_mtp
from torchtitan.models.gpt_oss.config_registry import gpt_oss_debugmodel
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.models.muse_glimmer.config_registry import muse_glimmer_debugmodel

from docs.torchtitan_tables import PAGE
from dtcp.pretrain import config_check, configs
from dtcp.pretrain.adopt import adopt, adopt_model, replaced_parts
from dtcp.pretrain.batches import BatchPreparation
from dtcp.pretrain.config_check import check_batch_size, check_settings
from dtcp.pretrain.options import config_names, parse
from tests.harness import titan_models

ACTIVATION_CHECKPOINTS = [FullAC.Config(), SelectiveAC.Config()]

LOOKED_AT_BELOW = (
    "implementation",
    "dataloader",
    "backend",
    "enable_memory_snapshot",
    "enable_wandb",
    "enable_cpu_offload",
    "gc_debug",
)

CASES = [
    (section, name)
    for section, table in settings.SECTIONS.items()
    for name in table
    if name not in LOOKED_AT_BELOW
]


def ours():
    return configs.llama_tiny()


def theirs():
    return configs.titan_llama3_tiny()


def section_of(config, name):
    """The section of a config; of a policy where the config has none."""
    section = getattr(config, name)
    return SelectiveAC.Config() if section is None else section


def another(field, value):
    """A value of a setting that differs from its default and from the config's."""
    default = settings.default_of(field)
    if isinstance(value, bool):
        return not default
    choices = [x for x in get_args(field.type) if isinstance(x, str) and x != default]
    if choices:
        return choices[-1]
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return "other"
    if isinstance(value, list):
        return ["other"]
    return {"other": 1} if isinstance(value, dict) else "other"


def checked(make, section, name, value):
    config = make()
    changed = section_of(config, section)
    # ParallelismConfig refuses some of it itself, on machines without CUDA.
    object.__setattr__(changed, name, value)
    setattr(config, section, changed)
    check_settings(config)


@pytest.mark.parametrize("make", [ours, theirs])
@pytest.mark.parametrize(
    ("section", "name"), [pytest.param(*x, id=f"C2-{'.'.join(x)}") for x in CASES]
)
def test_a_setting_is_used_or_refused_with_its_value(make, section, name):
    setting = settings.SECTIONS[section][name]
    part = section_of(make(), section)
    field = next(each for each in fields(part) if each.name == name)
    value = another(field, getattr(part, name))
    limits = setting.values is not None and (setting.models is settings.Models.ALL or make is ours)
    if limits and value not in setting.values:
        says = re.escape(f"{section}.{name}={value!r}: {setting.instead}")
        with pytest.raises(ValueError, match=says):
            checked(make, section, name, value)
    else:
        checked(make, section, name, value)


def test_C2_every_setting_of_the_installed_torchtitan_is_in_the_table():
    """A setting that a later release adds is unknown here until somebody has read what it does."""
    config = titan.Trainer.Config()
    assert settings.unlisted(config) == []
    assert {each.name for each in fields(config)} == {*settings.TOP, *settings.SECTIONS}
    for policy in ACTIVATION_CHECKPOINTS:
        assert {each.name for each in fields(policy)} <= {*settings.CHECKPOINTED}
    known = {FullAC.Config, SelectiveAC.Config, MemoryBudgetAC.Config, type(None)}
    assert {get_args(x)[0] for x in get_args(ActivationCheckpointingConfig)} == known
    for section in settings.PLAIN_SECTIONS:
        part = section_of(config, section)
        assert {each.name for each in fields(part)} <= {*settings.SECTIONS[section]}


def test_C2_no_row_of_the_table_is_about_a_setting_that_is_gone():
    config = ours()
    for section, table in settings.SECTIONS.items():
        part = section_of(config, section)
        assert {*table} == {each.name for each in fields(part)}, section


@pytest.mark.parametrize("name", config_names(configs))
def test_C2_our_configs_have_no_setting_that_is_refused(name):
    config = getattr(configs, name)()
    check_settings(config)
    assert settings.unlisted(config) == []
    json.dumps(config.to_dict())


def test_C2_the_page_shows_the_table():
    assert settings.settings_table() in PAGE.read_text(), "python -m docs.torchtitan_tables"


ON_THE_LAUNCHER = {
    "C2-balancer": (
        ["--parallelism.context_parallel_load_balancer", "ptrr"],
        "parallelism.context_parallel_load_balancer='ptrr': choose --dtcp.layout",
    ),
    "C3-stages": (
        ["--parallelism.pipeline_parallel_schedule", "ZBVZeroBubble"],
        "parallelism.pipeline_parallel_schedule='ZBVZeroBubble': choose one of these",
    ),
    "C3-graphs": (
        ["--training.no-disable_cuda_graphs"],
        "training.disable_cuda_graphs=False: set --training.disable_cuda_graphs",
    ),
    "C3-budget": (
        ["activation_checkpoint:memory-budget"],
        "activation_checkpoint=MemoryBudgetAC.Config.*memory budget",
    ),
    "C2-components": (["--compile.components", "loss"], r"compile.components=\['loss'\]"),
    "C2-backend": (["--compile.backend", "inductr"], "backend='inductr': name one of aot_eager"),
    "C2-fake": (["--comm.mode", "local_tensor"], "comm.mode='local_tensor'"),
    "C2-offload": (["--training.enable_cpu_offload"], "training.enable_cpu_offload=True"),
    "C2-bf16-states": (
        ["--optimizer.implementation", "fused_opt_states_bf16"],
        "implementation=fused_opt_states_bf16 for ranks on the CPU: choose fused or foreach",
    ),
    "C2-garbage": (["--training.gc_debug"], "training.gc_debug=True without CUDA"),
    "C2-snapshot": (["--profiler.enable_memory_snapshot"], "profiler.enable_memory_snapshot=True"),
}


@pytest.mark.parametrize("case", ON_THE_LAUNCHER)
def test_a_setting_on_the_command_line_is_refused_before_ranks_start(case):
    arguments, says = ON_THE_LAUNCHER[case]
    with pytest.raises(ValueError, match=says):
        parse(arguments).check()


def test_C2_a_logger_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(config_check, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"metrics.enable_wandb=True .*pip install wandb"):
        checked(ours, "metrics", "enable_wandb", True)


def test_C2_symmetric_memory_is_refused_with_cuda_too():
    with pytest.raises(ValueError, match=r"parallelism.enable_fsdp_symm_mem=True: leave it out"):
        checked(ours, "parallelism", "enable_fsdp_symm_mem", True)


@pytest.mark.parametrize("make", [ours, theirs])
@pytest.mark.parametrize(
    ("loss", "says"),
    [
        pytest.param(ChunkedLossWrapper.Config(), "calls the head itself", id="C3-chunked"),
        pytest.param(MSELoss.Config(), "labels are token ids", id="C3-mse"),
        pytest.param(deepseek_v3_debugmodel_mtp().loss, "shifts labels inside shards", id="C3-mtp"),
    ],
)
def test_a_loss_that_cannot_work_is_refused(make, loss, says):
    with pytest.raises(ValueError, match=rf"got loss=.*{says}.*TokenLoss"):
        check_settings(replace(make(), loss=loss))


UNDER_TYPES = {
    "C3-old-torch": (
        titan_models.llama3,
        2,
        1,
        False,
        "from torch 2.14 on, got .*=2 on torch",
    ),
    "C3-ep": (
        titan_models.qwen3_moe,
        1,
        2,
        True,
        "never run .*expert_parallel_degree=2 for",
    ),
    "C3-bias": (titan_models.gpt_oss, 2, 1, True, "bias of experts .*set .* to partial_dtensor"),
    "C3-taken": (titan_models.llama3, 2, 1, True, ""),
    "C3-heads-of-muse": (titan_models.muse_glimmer, 2, 1, True, ""),
    "C3-one-rank": (titan_models.gpt_oss, 1, 1, False, ""),
}


@pytest.mark.parametrize("case", UNDER_TYPES)
def test_what_spmd_types_shards_is_taken_where_fsdp_reads_it_and_it_is_right(case, monkeypatch):
    make, tp, ep, reads, says = UNDER_TYPES[case]
    monkeypatch.setattr(config_check, "fsdp_reads_annotations", lambda: reads)
    config = replace(theirs(), model_spec=adopt_model(titan_models.small(make)))
    config.training.mixed_precision_param = "bfloat16"
    config.parallelism = replace(
        config.parallelism,
        spmd_backend="spmd_types",
        tensor_parallel_degree=tp,
        expert_parallel_degree=ep,
    )
    if not says:
        check_settings(config)
        return
    with pytest.raises(ValueError, match=says):
        check_settings(config)


def test_C3_experts_that_add_in_bfloat16_alone_are_refused_another_dtype():
    config = replace(theirs(), model_spec=adopt_model(titan_models.small(titan_models.gpt_oss)))
    says = "mixed_precision_param={} with dtcp.verify={}.*: set bfloat16"
    with pytest.raises(ValueError, match=says.format("float32", 0)):
        check_settings(config)
    config.training.mixed_precision_param, config.dtcp.verify = "bfloat16", 2
    with pytest.raises(ValueError, match=says.format("bfloat16", 2)):
        check_settings(config)
    config.dtcp.verify = 0
    check_settings(config)


def test_C3_torchtitans_own_loss_is_refused_where_it_would_not_know_the_vocabularys_shards():
    config = replace(ours(), loss=CrossEntropyLoss.Config())
    check_settings(config)
    config.parallelism.spmd_backend = "spmd_types"
    with pytest.raises(ValueError, match=r"loss=CrossEntropyLoss.Config: under spmd_types.*Token"):
        check_settings(config)
    config.parallelism.tensor_parallel_degree = 1
    check_settings(config)


def test_C3_what_is_replaced_in_a_config_of_torchtitan_is_said(capsys):
    config = llama3_debugmodel()
    said = " | ".join(replaced_parts(config))
    for text in (
        "ChunkedLossWrapper of 8 chunks -> TokenLoss",
        "spmd_types -> partial_dtensor",
        "pipeline_parallel_schedule: Interleaved1F1B -> 1F1B",
        "CUDA graphs: off",
    ):
        assert text in said
    check_settings(adopt(config))
    parse(["--module", "llama3", "--config", "llama3_debugmodel"])
    assert "adopted     loss: ChunkedLossWrapper" in capsys.readouterr().out


def test_C3_a_config_of_torchtitan_in_which_a_part_would_be_dropped_is_refused():
    with pytest.raises(ValueError, match=r"The loss that dtcp replaces .*MTPLoss.Config"):
        adopt(deepseek_v3_debugmodel_mtp())
    config = replace(llama3_debugmodel(), loss=MSELoss.Config())
    with pytest.raises(ValueError, match=r"The loss that dtcp replaces .*MSELoss.Config"):
        adopt(config)
    assert isinstance(adopt(replace(config, loss=CrossEntropyLoss.Config())).loss, TokenLoss.Config)


def test_C2_a_config_with_settings_of_another_trainer_is_refused():
    class Other(titan.Trainer):
        @dataclass(kw_only=True, slots=True)
        class Config(titan.Trainer.Config):
            teacher: str = ""

    config = llama3_debugmodel()
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    with pytest.raises(ValueError, match=r"got \['teacher'\] of .*Other.Config besides"):
        adopt(Other.Config(**values))


def test_C2_a_trainer_with_methods_of_its_own_is_refused():
    """Its config adds nothing: its steps were dropped without a word."""

    class Distiller(titan.Trainer):
        @dataclass(kw_only=True, slots=True)
        class Config(titan.Trainer.Config):
            pass

        def forward_backward_step(self, **_: Any) -> Any:
            """With a teacher."""

    config = llama3_debugmodel()
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    with pytest.raises(ValueError, match=r"own, got .*Distiller, whose methods would be dropped"):
        adopt(Distiller.Config(**values))


def test_C2_a_section_that_a_subclass_adds_to_is_refused_where_it_says_something():
    @dataclass(kw_only=True, slots=True)
    class GraphCompile(CompileConfig):
        mode: str = "jit"

    plain = {"enable": True, "components": ["model"]}
    check_settings(replace(ours(), compile=GraphCompile(**plain)))
    with pytest.raises(
        ValueError, match=r"compile.mode='aot' of .*GraphCompile, which nobody reads"
    ):
        check_settings(replace(ours(), compile=GraphCompile(**plain, mode="aot")))


@pytest.mark.parametrize(
    ("imports", "says"),
    [
        pytest.param(
            ["torchtitan.overrides.nowhere.nothing"], "could not be imported", id="C2-missing"
        ),
        pytest.param(
            ["torchtitan.overrides.fused_swiglu.fused_grouped_experts"],
            "which replace none",
            id="C2-nothing",
        ),
        pytest.param(
            ["tests.entry_points.titan_overrides.windowed"],
            "layers.0.attention .*'window'",
            id="C2-layer",
        ),
        pytest.param(
            ["tests.entry_points.titan_overrides.mixing_rope"],
            "layers.0.attention.rope of .*MixingRoPE",
            id="C2-part",
        ),
    ],
)
def test_an_override_is_looked_at_before_ranks_start(imports, says):
    config = theirs()
    config.override = replace(config.override, imports=imports)
    with pytest.raises(ValueError, match=says):
        config.check()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--parallelism.tensor_parallel_degree", "3", "--training.seq_len", "1020"],
            r"tensor_parallel_degree \(3\) must divide",
        ),
        (["--training.seq_len", "262144"], "262144 exceeds"),
    ],
    ids=["C3-heads", "C3-positions"],
)
def test_what_torchtitan_refuses_on_ranks_is_refused_on_the_launcher(arguments, says):
    with pytest.raises(ValueError, match=says):
        parse(["--config", "titan_llama3_tiny", *arguments]).check()


def test_C3_batches_that_ranks_cannot_share_are_refused_on_the_launcher():
    config = ours()
    check_batch_size(config, 4)
    config.training.global_batch_size = 6
    with pytest.raises(ValueError, match=r"global_batch_size 6 with 4 rows .* multiple of 4"):
        check_batch_size(config, 4)


def test_C3_documents_dealt_out_among_fewer_rows_are_refused_on_the_launcher():
    config = ours()
    config.dataloader.balance_rows = 8
    check_batch_size(config, 4)
    config.dataloader.balance_rows = 3
    with pytest.raises(ValueError, match=r"balance_rows=3 for 4 rows: give 4"):
        check_batch_size(config, 4)


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "auto"])
def test_C3_a_degree_of_the_hybrid_strategy_is_refused_for_others(strategy):
    degree = ["--dtcp.ulysses_degree", "4"]
    parse(["--dtcp.strategy", "hybrid", *degree]).check()
    with pytest.raises(ValueError, match=rf"ulysses_degree=4 with dtcp.strategy={strategy}: name"):
        parse(["--dtcp.strategy", strategy, *degree]).check()


def test_C2_an_override_of_torchtitans_own_is_taken():
    config = theirs()
    imports = ["torchtitan.overrides.fused_swiglu.fused_swiglu"]
    config.override = replace(config.override, imports=imports)
    config.check()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--module", "llama3", "--config", "llama3_8b_mxfp8"], "torchao is not installed"),
        (["--module", "kimi_k2_7", "--config", "kimi_k2_5_debugmodel"], "the package torchvision"),
        (["--module", "flux", "--config", "flux_debugmodel"], "FluxTrainer.Config besides"),
    ],
    ids=["C2-torchao", "C2-torchvision", "C2-flux"],
)
def test_a_config_of_torchtitan_that_cannot_start_is_refused_in_a_sentence(arguments, says):
    with pytest.raises(ValueError, match=says):
        parse(arguments)


def test_C2_heads_of_muse_glimmer_are_not_sharded():
    config = adopt(muse_glimmer_debugmodel())
    check_settings(config)
    config.parallelism.tensor_parallel_degree = 2
    with pytest.raises(ValueError, match=r"parallelism.tensor_parallel_degree=2: set the degree"):
        check_settings(config)


def test_C1_a_decoder_that_was_not_adopted_is_refused_with_the_remedy():
    config = theirs()
    config.model_spec = llama3_debugmodel().model_spec
    with pytest.raises(ValueError, match=r"layers.0 of llama3 .*FlexAttention.*adopt_model"):
        config.check()


def test_C1_varlen_windows_of_gpt_oss_are_adopted():
    config = adopt(gpt_oss_debugmodel())
    masks = {str(x.attention.inner_attention.mask) for x in config.model_spec.model.layers}
    assert masks == {"Causal()", "And(left=Causal(), right=SlidingWindow(size=128, right=None))"}


def test_C2_a_batch_with_more_than_tokens_is_refused() -> None:
    batch: dict[str, Any] = {"input": torch.zeros(1, 4, dtype=torch.long), "pixel_values": 1}
    parts: dict[str, Any] = {"mesh": None, "section": None, "model": None}
    with pytest.raises(ValueError, match=r"got \['pixel_values'\] besides"):
        BatchPreparation(**parts, training=True).prepared(batch, torch.zeros(1, 4))

"""Every setting of torchtitan 0.3.0's trainer: what reads it here, or why it is refused.

One table for the check on the launcher, for the documentation (docs/torchtitan.md) and for the
test that walks the installed config classes, so that no setting is accepted and ignored.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any


class Models(Enum):
    """Whose models a limit is about."""

    ALL = "all models"
    OURS = "dtcp's models"


@dataclass(frozen=True)
class Setting:
    """What becomes of a setting.

    Args:
        use: who reads it; for a setting that is limited, why there is no more to choose.
        values: all that are taken; None for any.
        instead: what to do about another value.
        models: for which models the limit holds.
    """

    use: str
    values: tuple[Any, ...] | None = None
    instead: str = ""
    models: Models = Models.ALL


def used(by: str = "torchtitan's trainer") -> Setting:
    """A setting that takes any value."""
    return Setting(by)


def limited(why: str, *values: Any, instead: str, models: Models = Models.ALL) -> Setting:
    """A setting that takes these values alone."""
    return Setting(why, values, instead, models)


_STAGES = "pipeline stages; refused without them"
_CUT_EVENLY = "stages are cut by numbers of layers"
_NO_RECOMPUTE_OPTION = "blocks of dtcp's models are recomputed as its own plan says"

TRAINING: Mapping[str, Setting] = {
    "local_batch_size": used(
        "the data loader: rows per rank and micro-batch; over stages, of all micro-batches of a "
        "step of the schedule"
    ),
    "global_batch_size": used(),
    "seq_len": used("the data loader and the layout: tokens of a whole row"),
    "max_norm": used(),
    "steps": used(),
    "enable_cpu_offload": used("FSDP; refused for ranks on the CPU"),
    "disable_cuda_graphs": limited(
        "lengths of documents change from batch to batch, and a graph is captured for one",
        True,
        instead="set --training.disable_cuda_graphs",
    ),
    "dtype": used("the model's construction"),
    "mixed_precision_param": used("FSDP"),
    "mixed_precision_reduce": used("FSDP"),
    "gc_freq": used(),
    "gc_debug": used("torchtitan's trainer; refused without CUDA"),
}

PARALLELISM: Mapping[str, Setting] = {
    "data_parallel_replicate_degree": used("the mesh"),
    "data_parallel_shard_degree": used("the mesh; -1 takes the ranks that are left"),
    "fsdp_reshard_after_forward": limited(
        "FSDP; what comes last stays gathered, for backward starts with it; with stages all does",
        "default",
        "never",
        instead="take default",
        models=Models.OURS,
    ),
    "enable_fsdp_symm_mem": limited(
        "gradients are summed by collectives that every backend has", False, instead="leave it out"
    ),
    "tensor_parallel_degree": used("the mesh"),
    "enable_sequence_parallel": limited(
        "tensor-parallel plans of dtcp's models say themselves where tokens are sharded",
        True,
        instead="leave it out",
        models=Models.OURS,
    ),
    "spmd_backend": limited(
        "the mesh, and how torchtitan's models are sharded over tp",
        "spmd_types",
        "partial_dtensor",
        instead="choose spmd_types or partial_dtensor",
    ),
    "pipeline_parallel_degree": used("the mesh; refused for models that are not cut into stages"),
    "module_fqns_per_model_part": limited(
        _CUT_EVENLY,
        None,
        instead="set pipeline_parallel_first_stage_less_layers or _last_stage_less_layers",
    ),
    "pipeline_parallel_first_stage_less_layers": used(_STAGES),
    "pipeline_parallel_last_stage_less_layers": used(_STAGES),
    "pipeline_parallel_layers_per_stage": used(_STAGES),
    "pipeline_parallel_schedule": limited(
        "these run a micro-batch's backward in one piece, as FSDP and compiled blocks need it",
        "1F1B",
        "GPipe",
        "Interleaved1F1B",
        instead="choose one of these",
    ),
    "pipeline_parallel_schedule_csv": limited(
        "schedules are torch's own", "", None, instead="set pipeline_parallel_schedule"
    ),
    "pipeline_parallel_microbatch_size": used(_STAGES),
    "context_parallel_degree": used("the mesh"),
    "context_parallel_load_balancer": limited(
        "the layout balances the ranks", "headtail", instead="choose --dtcp.layout"
    ),
    "context_parallel_ptrr_mask_key": limited(
        "the layout balances the ranks",
        None,
        instead="choose --dtcp.layout block_balanced",
    ),
    "expert_parallel_degree": used(
        "the mesh: ranks out of dp_shard x cp x tp that have different experts; refused for a "
        "model without experts"
    ),
}

COMPILE: Mapping[str, Setting] = {
    "enable": used("each block"),
    "enable_async_tensor_parallel": limited(
        "products are not pipelined with tp's collectives", False, instead="leave it out"
    ),
    "components": limited(
        "blocks are compiled; the loss is not, and works in chunks",
        ["model"],
        ["model", "loss"],
        ["loss", "model"],
        instead="give model, or leave --compile.enable out",
    ),
    "backend": used("each block; aot_eager where this machine lacks a compiler"),
}

CHECKPOINTED: Mapping[str, Setting] = {
    "preserve_rng_state": limited(
        _NO_RECOMPUTE_OPTION, True, instead="leave it out", models=Models.OURS
    ),
    "determinism_check": limited(
        _NO_RECOMPUTE_OPTION, "default", instead="leave it out", models=Models.OURS
    ),
    "debug": limited(_NO_RECOMPUTE_OPTION, False, instead="leave it out", models=Models.OURS),
    "force_recompute_mm_shapes_by_fqns": limited(
        _NO_RECOMPUTE_OPTION, ["moe.router.gate"], instead="leave it out", models=Models.OURS
    ),
}
"""Of FullAC and SelectiveAC; MemoryBudgetAC is refused as a whole."""

COMM: Mapping[str, Setting] = {
    "init_timeout_seconds": used(),
    "train_timeout_seconds": used(),
    "trace_buf_size": used(),
    "save_traces_folder": used(),
    "save_traces_file_prefix": used(),
    "mode": limited(
        "ranks are processes over NCCL or gloo, or one of them is, in a dry run",
        "default",
        "fake_backend",
        instead="leave it out; --dtcp.device cpu needs no accelerator",
    ),
}

DEBUG: Mapping[str, Setting] = {
    "seed": used(),
    "spmd_typechecking": limited(
        "batches and mixers of dtcp bring no types that could be checked",
        False,
        instead="leave it out",
    ),
    "deterministic": used(),
    "deterministic_warn_only": used(),
    "moe_force_load_balance": limited(
        "routers of dtcp's models choose by their scores",
        False,
        instead="leave it out",
        models=Models.OURS,
    ),
    "detect_anomaly": used(),
    "batch_invariant": limited("torchtitan does not train with it", False, instead="leave it out"),
    "print_config": used("the start of a run"),
    "save_config_file": used("rank 0, in --dump_folder"),
    "enable_structured_logging": used("each rank"),
}

PROFILER: Mapping[str, Setting] = dict.fromkeys(
    (
        "enable_profiling",
        "save_traces_folder",
        "profile_freq",
        "profiler_repeat",
        "profiler_skip_first",
        "profiler_skip_first_wait",
        "profiler_active",
        "profiler_warmup",
        "memory_snapshot_freq",
        "save_memory_snapshot_folder",
        "memory_snapshot_max_entries",
        "trace_post_processor",
    ),
    used("torchtitan's profiler"),
) | {"enable_memory_snapshot": used("torchtitan's profiler; refused without CUDA")}

METRICS: Mapping[str, Setting] = dict.fromkeys(
    ("log_freq", "enable_tensorboard", "save_tb_folder", "save_for_all_ranks"),
    used("torchtitan's metrics"),
) | {
    "disable_color_printing": used("torchtitan's metrics; lines of dtcp have no colors"),
    "enable_wandb": used("torchtitan's metrics; refused where wandb is not installed"),
}

CHECKPOINT: Mapping[str, Setting] = dict.fromkeys(
    (
        "enable",
        "folder",
        "interval",
        "initial_load_path",
        "initial_load_model_only",
        "initial_load_in_hf",
        "last_save_model_only",
        "last_save_in_hf",
        "export_dtype",
        "keep_latest_k",
        "load_step",
        "exclude_from_loading",
        "enable_first_step_checkpoint",
        "create_seed_checkpoint",
        "load_only",
        "async_mode",
    ),
    used("torchtitan's checkpoints"),
) | {
    "initial_load_in_hf_quantized": limited(
        "weights are read as they are stored",
        False,
        instead="dequantize them first",
        models=Models.OURS,
    ),
    "export_hf": used("dtcp's checkpoints"),
    "verify_checksums": used("dtcp's checkpoints"),
    "hf_ignore": used("dtcp's checkpoints"),
}

LR_SCHEDULER: Mapping[str, Setting] = dict.fromkeys(
    ("warmup_steps", "total_steps", "decay_ratio", "decay_type", "min_lr_factor"),
    used("torchtitan's schedule"),
)

OPTIMIZER: Mapping[str, Setting] = dict.fromkeys(
    ("param_groups", "implementation", "optimizer_factory_kwargs_by_name"),
    used("torchtitan's optimizers"),
)

VALIDATOR: Mapping[str, Setting] = dict.fromkeys(
    ("freq", "enable", "steps", "dataloader"), used("torchtitan's validator")
)

OVERRIDE: Mapping[str, Setting] = {
    "imports": used("torchtitan; refused where one replaces nothing, or a layer's attention"),
}

LOSS: Mapping[str, Setting] = {"mtp_weight": used("TokenLoss")}

TOP: Mapping[str, Setting] = {
    "hf_assets_path": used(
        "a tokenizer of torchtitan's, and its models' weights; refused of a run that has neither"
    ),
    "dump_folder": used(),
    "model_spec": used(),
    "tokenizer": used("the class that is given"),
    "dataloader": used("the class that is given"),
}

SECTIONS: Mapping[str, Mapping[str, Setting]] = {
    "training": TRAINING,
    "parallelism": PARALLELISM,
    "compile": COMPILE,
    "activation_checkpoint": CHECKPOINTED,
    "loss": LOSS,
    "optimizer": OPTIMIZER,
    "lr_scheduler": LR_SCHEDULER,
    "checkpoint": CHECKPOINT,
    "validator": VALIDATOR,
    "metrics": METRICS,
    "profiler": PROFILER,
    "comm": COMM,
    "debug": DEBUG,
    "override": OVERRIDE,
}

PLAIN_SECTIONS = ("training", "parallelism", "compile", "activation_checkpoint", "comm", "debug")
"""Sections that are no part of their own, which would read what a subclass adds."""


def refusals(section: str, values: Any, *, ours: bool) -> Iterator[str]:
    """What of a section is refused: one sentence per setting, with its value and the remedy.

    Args:
        values: the section, a dataclass.
        ours: whether the model is one of dtcp's.
    """
    table = SECTIONS[section]
    for each in fields(values):
        value, setting = getattr(values, each.name), table.get(each.name)
        name = f"{section}.{each.name}={value!r}"
        if setting is None:
            if section in PLAIN_SECTIONS and value != default_of(each):
                yield (
                    f"Settings are those of torchtitan's own {section} section, got {name} "
                    f"of {type(values).__qualname__}, which nobody reads: leave it out."
                )
            continue
        holds = setting.models is Models.ALL or ours
        if holds and setting.values is not None and value not in setting.values:
            yield f"{_sentence(setting.use)}, got {name}: {setting.instead}."


def default_of(field: Any) -> Any:
    """The default of a dataclass field, or MISSING."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def unlisted(config: Any) -> list[str]:
    """Settings of a trainer's config that the table does not name."""
    missing = []
    for top in fields(config):
        section = getattr(config, top.name)
        if top.name in TOP or top.name == "dtcp" or section is None:
            continue
        if top.name not in SECTIONS or not is_dataclass(section):
            missing.append(top.name)
            continue
        table = SECTIONS[top.name]
        missing += [f"{top.name}.{f.name}" for f in fields(section) if f.name not in table]
    return missing


def settings_table() -> str:
    """The table as Markdown, a row per setting."""
    rows = ["| setting | taken | what reads it, or why there is no choice |", "|---|---|---|"]
    rows += [_row(name, setting) for name, setting in TOP.items()]
    for section, table in SECTIONS.items():
        rows += [_row(f"{section}.{name}", setting) for name, setting in table.items()]
    return "\n".join(rows)


def _row(name: str, setting: Setting) -> str:
    taken = "any" if setting.values is None else " or ".join(f"`{v}`" for v in setting.values)
    if setting.values is not None and setting.models is Models.OURS:
        taken += " (torchtitan's models: any)"
    remedy = f"; else: {setting.instead}" if setting.instead else ""
    return f"| `{name}` | {taken} | {setting.use}{remedy} |"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]

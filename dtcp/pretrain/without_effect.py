"""Refuses settings that another one leaves without effect: none is accepted and ignored."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from dtcp.torchtitan.loss import TokenLoss
from dtcp.torchtitan.section import Section
from dtcp.torchtitan.settings import default_of

from dtcp.pretrain.config_check import expert_counts
from dtcp.pretrain.data import PackedDocuments
from dtcp.pretrain.dry_run import is_dry
from dtcp.pretrain.validation_data import validates

OF_SAVES = (
    "export_hf",
    "last_save_in_hf",
    "create_seed_checkpoint",
    "enable_first_step_checkpoint",
    "export_dtype",
)
OF_CHECKPOINTS = (
    "initial_load_path",
    "initial_load_in_hf",
    "load_step",
    "load_only",
    "exclude_from_loading",
    "hf_ignore",
    *OF_SAVES,
)
NOT_VERIFIED = ("load_step", "load_only", *OF_SAVES)
"""What a run that verifies leaves out, for it starts from drawn weights and keeps nothing."""

UNREAD: Mapping[str, tuple[str, ...]] = {
    "stdlib": ("dataset_path", "split", "text_key", "replace_invalid"),
    "folder": ("split",),
}
"""Settings of a loader that its dataset does not read; one of Hugging Face only ignores bytes."""
UNREAD_OF_HUB = ("replace_invalid",)


def check_effects(config: Any) -> None:
    """Refuse what another setting leaves without effect, by the names of both.

    Args:
        config: a `Trainer.Config`.
    Raises:
        ValueError: naming the setting, its value and the other one.
    """
    for refusal in _refusals(config):
        raise ValueError(refusal)


def without_unread_export(config: Any, named: Collection[str]) -> Any:
    """The config without a dtype of exports where it makes none and no option names one.

    torchtitan's own configs have one beside no export, for runs that ask for some.

    Args:
        named: the options of the command line.
    """
    checkpoint = config.checkpoint
    saves = checkpoint.enable and not checkpoint.load_only and not config.dtcp.verify
    if "checkpoint.export_dtype" in named or (saves and _exports(checkpoint)):
        return config
    (dtype,) = (each for each in fields(checkpoint) if each.name == "export_dtype")
    return replace(config, checkpoint=replace(checkpoint, export_dtype=default_of(dtype)))


def _exports(checkpoint: Any) -> bool:
    """Whether weights are saved by themselves, at the end."""
    return bool(checkpoint.export_hf or checkpoint.last_save_model_only)


OF_STAGES = (
    "pipeline_parallel_first_stage_less_layers",
    "pipeline_parallel_last_stage_less_layers",
    "pipeline_parallel_layers_per_stage",
    "pipeline_parallel_schedule",
    "pipeline_parallel_microbatch_size",
)


def _of_stages(config: Any) -> Iterator[str]:
    if config.parallelism.pipeline_parallel_degree > 1:
        return
    for name, value in _named(config.parallelism, OF_STAGES):
        yield (
            f"Stages are cut and run as their settings say, got parallelism.{name}={value!r} with "
            f"parallelism.pipeline_parallel_degree=1: leave it out, or raise the degree."
        )


def _refusals(config: Any) -> Iterator[str]:
    yield from _of_stages(config)
    yield from _of_checkpoints(config)
    yield from _of_data("dataloader", config.dataloader)
    if validates(config):
        yield from _of_data("validator.dataloader", config.validator.dataloader)
        yield from _of_validation(config.validator)
        yield from _of_held_out(config.dataloader, config.validator.dataloader)
    yield from _of_model(config)


def _of_checkpoints(config: Any) -> Iterator[str]:
    checkpoint = config.checkpoint
    ways = [
        (checkpoint.load_only, OF_SAVES, "checkpoint.load_only, which saves nothing"),
        (not checkpoint.initial_load_in_hf, ("hf_ignore",), "no checkpoint.initial_load_in_hf"),
        (
            not _exports(checkpoint),
            ("export_dtype",),
            "neither checkpoint.export_hf nor checkpoint.last_save_model_only, which it is of",
        ),
        (config.dtcp.verify, NOT_VERIFIED, f"dtcp.verify={config.dtcp.verify}, which keeps none"),
    ]
    if not checkpoint.enable and not is_dry(config):
        ways.insert(0, (True, OF_CHECKPOINTS, "checkpoint.enable=False"))
    for holds, names, other in ways:
        for name, value in _named(checkpoint, names) if holds else ():
            yield (
                f"A run reads and writes checkpoints as its settings say, got checkpoint.{name}="
                f"{value!r} with {other}: change one of them."
            )


def _of_data(name: str, loader: Any) -> Iterator[str]:
    if not isinstance(loader, PackedDocuments.Config):
        return
    for key, value in _named(loader, UNREAD.get(loader.dataset, UNREAD_OF_HUB)):
        yield (
            f"A loader reads what its dataset has, got {name}.{key}={value!r} with {name}.dataset="
            f"{loader.dataset}, which reads no {key}: leave it out, or name another --{name}."
            f"dataset (folder, or one of Hugging Face)."
        )


def _of_validation(validator: Any) -> Iterator[str]:
    loader = validator.dataloader
    if not isinstance(loader, PackedDocuments.Config):
        return
    ways = {
        "infinite": (
            validator.steps > 0,
            f"validator.steps={validator.steps}, which start over until all are taken: leave it "
            f"out, or set --validator.steps -1 to read all documents once",
        ),
        "accept_changes": (
            True,
            "validations that begin anew each time, and go on from nothing: leave it out",
        ),
    }
    for key, value in _named(loader, tuple(ways)):
        holds, other = ways[key]
        if holds:
            yield f"A validation reads rows, got validator.dataloader.{key}={value!r} with {other}."


def _of_held_out(loader: Any, own: Any) -> Iterator[str]:
    """Validation on held-out documents that training reads all the same."""
    if not all(isinstance(each, PackedDocuments.Config) for each in (loader, own)):
        return
    if (loader.dataset, loader.dataset_path, "validation") != (
        own.dataset,
        own.dataset_path,
        own.part,
    ):
        return
    held_out = (
        loader.part == "train"
        if own.dataset in UNREAD
        else (loader.split or loader.part) != (own.split or own.part)
    )
    if not held_out:
        yield (
            f"A validation reads documents that training does not, got validator.dataloader.part="
            f"validation of {own.dataset} with dataloader.part={loader.part}, "
            f"dataloader.split={loader.split!r}: train on another part or split, or set "
            f"--validator.no-enable, or --validator.dataloader.part all to measure it all the same."
        )


def _of_model(config: Any) -> Iterator[str]:
    spec, section = config.model_spec, config.dtcp
    weight = getattr(config.loss, "mtp_weight", None)
    if isinstance(config.loss, TokenLoss.Config) and not getattr(spec.model, "mtp_depths", 0):
        for _ in _named(config.loss, ("mtp_weight",)):
            yield (
                f"The loss of tokens further ahead has a weight where a model predicts them, got "
                f"loss.mtp_weight={weight} for {spec.name} {spec.flavor}, which does not: leave it "
                f"out."
            )
    if config.debug.moe_force_load_balance and not expert_counts(spec.model):
        yield (
            f"Experts get the same number of tokens where a model has some, got debug."
            f"moe_force_load_balance=True for {spec.name} {spec.flavor}, which has none: leave it "
            f"out."
        )
    if getattr(spec.model, "takes_strategy", True):
        return
    for name, value in _named(section, ("strategy", "boundary", "kernel", "reduce_dtype")):
        if value != "auto":
            yield (
                f"A strategy is for attention that several can carry out, got dtcp.{name}={value} "
                f"for {spec.name}, whose mixers have one of their own: leave it out."
            )


def _named(section: Any, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Those of the settings that differ from their defaults, with their values."""
    for each in fields(section):
        value = getattr(section, each.name)
        if each.name in names and value != default_of(each):
            yield each.name, value


def check_started_elsewhere(section: Section, *, accelerated: bool) -> None:
    """Refuse, for ranks that others started, what train.py does only for ranks of its own.

    Args:
        accelerated: whether these ranks run on accelerators.
    Raises:
        ValueError: naming the setting, and whose work it is.
    """
    for name, value in _named(section, ("max_restarts", "stop_seconds")):
        yield_to = "--max-restarts" if name == "max_restarts" else "its own patience"
        raise ValueError(
            f"train.py looks after ranks that it starts by itself, got dtcp.{name}={value} of "
            f"ranks that another launcher started: leave it out; torchrun has {yield_to}."
        )
    wrong = "cpu" if accelerated else "accelerator"
    if section.device == wrong:
        there = "an accelerator each" if accelerated else "none"
        raise ValueError(
            f"Ranks of another launcher run on what they find, got dtcp.device={wrong} where they "
            f"find {there}: leave it out, or hide accelerators (CUDA_VISIBLE_DEVICES=)."
        )

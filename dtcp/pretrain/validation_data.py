"""Which data a validation reads: those held out of what is trained on, unless others are named."""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from typing import Any

from dtcp.pretrain.data import PackedDocuments, open_source
from dtcp.pretrain.sources import TextFiles

FOLLOWED = ("dataset", "dataset_path", "text_key", "replace_invalid")
"""Settings of a loader that say what it reads, but for the part of it."""


def validates(config: Any) -> bool:
    """Whether a run of a `Trainer.Config` makes validations."""
    leaves_out = config.dtcp.verify or config.checkpoint.create_seed_checkpoint
    return bool(config.validator.enable and not leaves_out)


def named_options(arguments: Collection[str]) -> set[str]:
    """Names of the options on a command line, with words joined by _ and switches without `no`."""
    words = (word.partition("=")[0] for word in arguments if word.startswith("--"))
    names = {word.removeprefix("--").replace("-", "_") for word in words}
    return names | {name.replace(".no_", ".") for name in names}


def validated_on_the_same(config: Any, before: Any, named: Collection[str]) -> Any:
    """The config whose validation follows where options have changed what is trained on.

    Where no option is about the validation, one of data that may have nothing held out is off.

    Args:
        config: a `Trainer.Config` after the command line.
        before: the loader of the same config before, and its validation's.
        named: the options of the command line. One that names the validation's dataset, or a
            config that validates on other data, is left alone.
    """
    loader, own = config.dataloader, config.validator.dataloader
    parts = (loader, own, *before)
    if not all(isinstance(part, PackedDocuments.Config) for part in parts):
        return config
    was, own_was = before
    together = all(getattr(was, name) == getattr(own_was, name) for name in FOLLOWED)
    if not together or "validator.dataloader.dataset" in named:
        return config
    names = [name for name in FOLLOWED if f"validator.dataloader.{name}" not in named]
    followed = replace(own, **{name: getattr(loader, name) for name in names})
    validator = replace(config.validator, dataloader=followed)
    moved = (own.dataset, own.dataset_path) != (followed.dataset, followed.dataset_path)
    asked_for = any(name.startswith("validator.") for name in named)
    if moved and not asked_for and not _holds_out(followed):
        validator = replace(validator, enable=False)
    return replace(config, validator=validator)


def _holds_out(loader: PackedDocuments.Config) -> bool:
    """Whether data have documents for validation, as far as this machine's disk shows."""
    # What cannot be read is refused by the check of the config.
    with suppress(ValueError):
        source = open_source(loader)
        # Splits of a Hugging Face dataset have any names, which its hub alone knows.
        return isinstance(source, TextFiles) and not source.is_empty()
    return True


def describe_validation(config: Any) -> str:
    """The validation's data, if they are not training's; or why there is no validation."""
    loader, own = config.dataloader, getattr(config.validator, "dataloader", None)
    data, held_out = (
        [getattr(each, name, None) for name in ("dataset", "dataset_path")]
        for each in (loader, own)
    )
    if not config.validator.enable:
        return f"; not validated ({_reason(loader, own)})"
    if data == held_out:
        return ""
    return f"; validated on {' '.join(filter(None, held_out))}"


def _reason(loader: Any, own: Any) -> str:
    """Why a run makes no validations, and what would make it do so."""
    if all(isinstance(part, PackedDocuments.Config) for part in (loader, own)):
        followed = all(getattr(loader, name) == getattr(own, name) for name in FOLLOWED)
        if followed and not _holds_out(own):
            return NOT_HELD_OUT if own.dataset == "folder" else UNKNOWN_SPLITS
    return "switched off"


NOT_HELD_OUT = "none of its documents is held out, see --validator.dataloader.dataset_path"
UNKNOWN_SPLITS = "its splits are not known, name one by --validator.dataloader.split"

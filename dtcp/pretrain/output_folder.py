"""Checks, before any rank starts, that a run can write what it is going to write."""

import contextlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD

TRIAL = 1 << 20  # bytes
TRIES = 20
GIB = 1 << 30


def check_output(config: Any) -> None:
    """Refuse a folder that cannot be written, or that has no room for one checkpoint.

    A trial of a MiB is written where checkpoints will be, and removed. What a checkpoint takes is
    counted on a model without storage: weights, and for most optimizers two numbers a weight.

    Raises:
        ValueError: naming the folder, and the room or the right that is missing.
    """
    if not config.dump_folder.strip() or config.dump_folder.startswith("~"):
        raise ValueError(
            f"A run writes into a folder, got --dump_folder {config.dump_folder!r}: name one, in "
            f"full (no shell replaces ~ behind =)."
        )
    folder, saves = Path(config.dump_folder), config.checkpoint.enable and not config.dtcp.verify
    if config.debug.save_config_file == "":
        raise ValueError(
            "A config is saved in a file, got --debug.save_config_file '': name it, or leave it."
        )
    if saves:
        _check_settings(config)
    folder = folder / config.checkpoint.folder if saves else folder
    _check_folder(folder, "--dump_folder", config, room=saves and not config.checkpoint.load_only)
    if config.metrics.enable_tensorboard and not config.dtcp.verify:
        logs = Path(config.dump_folder, config.metrics.save_tb_folder)
        _check_folder(logs, "--metrics.save_tb_folder", config, room=False)


def _check_folder(folder: Path, option: str, config: Any, *, room: bool) -> None:
    # `Path.exists` would raise below a folder that is closed to this user.
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        _try(folder, config, room=room)
    except OSError as error:
        raise ValueError(
            f"A run writes into its folder, got {folder} ({error.strerror}): mend it, or choose "
            f"another {option}."
        ) from error
    finally:
        # A run that is refused for something else leaves nothing.
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def _try(folder: Path, config: Any, *, room: bool) -> None:
    for attempt in range(TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_trial(folder)
            if room:
                _check_room(folder, config)
        except FileNotFoundError:
            # torchrun's ranks do this side by side: another one has removed what it had made.
            if attempt == TRIES - 1:
                raise
        else:
            return


def _check_settings(config: Any) -> None:
    checkpoint = config.checkpoint
    for folder in (config.dump_folder, checkpoint.folder):
        if "://" in folder:
            raise ValueError(
                f"A checkpoint becomes visible by a rename, got the folder {folder}: object "
                f"stores have none; save to a file system."
            )
    inside = Path(os.path.normpath(checkpoint.folder))
    if inside.is_absolute() or inside.parts[:1] in ((), ("..",)):
        raise ValueError(
            f"Checkpoints lie below the folder of their run, which has one writer, got "
            f"--checkpoint.folder {checkpoint.folder}: give a name, and the disk in "
            f"--dump_folder, below which checkpoints of earlier runs may be moved."
        )
    on_cpu = config.dtcp.device == "cpu" or not torch.accelerator.is_available()
    if checkpoint.async_mode == "async_with_pinned_mem" and on_cpu:
        raise ValueError(
            "Pinned memory is an accelerator's, got --checkpoint.async_mode "
            "async_with_pinned_mem on the CPU: use --checkpoint.async_mode async."
        )


def _write_trial(folder: Path) -> None:
    trial = folder / f".trial.{uuid.uuid4().hex}"
    try:
        with open(trial, "wb") as file:
            file.write(bytes(TRIAL))
            file.flush()
            os.fsync(file.fileno())
    finally:
        trial.unlink(missing_ok=True)


def _check_room(folder: Path, config: Any) -> None:
    needed, free = checkpoint_size(config), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"A folder has room for a checkpoint, got {folder} with {free / GIB:.2f} GiB free for "
            f"about {needed / GIB:.2f} GiB: make room, or choose another --dump_folder."
        )


def checkpoint_size(config: Any) -> int:
    """About the bytes of one checkpoint of the whole state."""
    with torch.device("meta"):
        model = config.model_spec.model.build()
    dtype = getattr(torch, config.training.dtype)
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    names = {group.optimizer_name for group in config.optimizer.param_groups}
    return weights if names == {SGD.__name__} else 3 * weights

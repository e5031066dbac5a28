"""Which checkpoint a run continues from: the newest whole one, the same on all ranks."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from torch import distributed as dist

from dtcp.distributed.groups import rank_of_process
from dtcp.pretrain.manifest import NAME, Manifest, changed_file, misfit, read_manifest, small_files
from dtcp.pretrain.saved_folders import SavedFolders

T = TypeVar("T")
THREADS = 4
"""How many read at once; a checksum takes less time than reading the file."""


@dataclass(frozen=True)
class Choice:
    """A checkpoint to continue from, and why newer ones were skipped."""

    manifest: Manifest
    skipped: tuple[str, ...] = ()


def first_rank() -> bool:
    """Whether this is the rank that decides, and that moves folders."""
    return rank_of_process() == 0


def agree(decide: Callable[[], T]) -> T:
    """What the first rank decides or does, on every rank.

    Raises:
        ValueError: it could not, for a file or a permission is missing. On every rank alike.
        RuntimeError: it failed otherwise, with the error of the first rank.
    """
    outcome: list[T | _Failure | None] = [None]
    cause: Exception | None = None
    if first_rank():
        try:
            outcome = [decide()]
        except (OSError, ValueError) as error:
            outcome, cause = [_Failure(str(error))], error
        # Only this rank decides, and the others wait in the broadcast below: an error of any class
        # that left here would leave them waiting. All ranks raise it, this one with its cause.
        except Exception as error:  # noqa: BLE001
            text = f"rank 0 failed ({type(error).__name__}: {error})"
            outcome, cause = [_Failure(text, is_expected=False)], error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    failure = outcome[0]
    if isinstance(failure, _Failure):
        raise (ValueError if failure.is_expected else RuntimeError)(failure.text) from cause
    return cast("T", failure)


@dataclass(frozen=True)
class _Failure:
    text: str
    is_expected: bool = True


def choose(folders: SavedFolders, step: int, *, checksums: bool) -> Choice | None:
    """The checkpoint of a step, or the newest whole one for -1; None where there is none at all.

    Each rank reads its share of the files whose checksums are compared.

    Raises:
        ValueError: that step is not whole, or none is; the folder mixes runs. On every rank alike.
    """
    manifests = agree(lambda: _look(folders, step))
    problems: list[str] = []
    for number, manifest in manifests:
        problem = manifest if isinstance(manifest, str) else ""
        if not isinstance(manifest, str):
            problem = changed(folders.path(number), manifest, checksums=checksums)
            if not problem:
                if step < 0:
                    _refuse_mixed_runs(folders, manifest, manifests)
                return Choice(manifest, tuple(problems))
        problems.append(problem)
    if not manifests and step < 0:
        return None
    raise ValueError(_explain(folders, step, problems, agree(folders.whole)))


def changed(folder: Path, manifest: Manifest, *, checksums: bool) -> str:
    """What is wrong with a folder's files, by checksum, on all ranks; empty if nothing."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    names = list(manifest.files) if checksums else small_files(manifest)
    names.sort(key=lambda name: manifest.files[name].size, reverse=True)
    mine = names[rank::ranks]
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        of_files = pool.map(lambda name: changed_file(folder, manifest, [name]), mine)
        problem = next(filter(None, of_files), "")
    problems = [problem] * ranks
    if dist.is_initialized():
        dist.all_gather_object(problems, problem)
    return next(filter(None, problems), "")


def verified(folder: Path, *, checksums: bool) -> Manifest | None:
    """The manifest of a folder somewhere else, after a look at its files; None if it has none.

    Raises:
        ValueError: a file is not what was saved.
    """
    if not agree((folder / NAME).exists):
        return None
    # The first rank looks for all: a folder that changes meanwhile would part the ranks.
    manifest = agree(lambda: read_manifest(folder))
    problem = agree(lambda: misfit(folder, manifest))
    problem = problem or changed(folder, manifest, checksums=checksums)
    if problem:
        raise ValueError(
            f"A run starts from a whole folder of weights, got {problem}: take another, or remove "
            f"its {NAME} if the change is yours."
        )
    return manifest


def _look(folders: SavedFolders, step: int) -> list[tuple[int, Manifest | str]]:
    """Steps to try, the newest first, each with its manifest or why it is not whole."""
    steps = folders.steps() if step < 0 else [step]
    manifests: list[tuple[int, Manifest | str]] = []
    for number in reversed(steps):
        try:
            manifests.append((number, folders.manifest(number)))
        except ValueError as error:
            manifests.append((number, str(error)))
    return manifests


def _refuse_mixed_runs(
    folders: SavedFolders, newest: Manifest, found: Sequence[tuple[int, Manifest | str]]
) -> None:
    """Going on from another run's checkpoint is a choice to make, not one to guess."""
    others = [m.step for _, m in found if isinstance(m, Manifest) and m.run != newest.run]
    if others:
        raise ValueError(
            f"The checkpoints of a folder are of one run, got {folders.path(newest.step)} of "
            f"another run than step {others[0]}: say which to go on from, with "
            f"--checkpoint.load_step {others[0]} or --checkpoint.load_step {newest.step}."
        )


def _explain(
    folders: SavedFolders, step: int, problems: Sequence[str], whole: Sequence[int]
) -> str:
    if step < 0:
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return (
            f"A run goes on from a whole checkpoint, got none in {folders.root}: "
            f"{problems[0]}{others}; move the folder away to start anew, or from a step of it that "
            f"you trust with --checkpoint.initial_load_path."
        )
    if not folders.path(step).is_dir():
        return (
            f"A run goes on from a step that was saved, got --checkpoint.load_step {step} for "
            f"{folders.root} with whole checkpoints of steps {list(whole)}: name one of them."
        )
    sound = [s for s in whole if s != step]
    back = max([s for s in sound if s < step] or sound, default=None)
    remedy = (
        "choose another --dump_folder"
        if back is None
        else f"go back to step {back} with --checkpoint.load_step {back}"
    )
    return f"A run goes on from a whole checkpoint, got {problems[0]}; {remedy}."

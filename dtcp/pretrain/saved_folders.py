"""Folders of a run that appear in one rename, and disappear in one.

    checkpoint/step-6                 a whole checkpoint; `step-6.bak` and the like are not ours
    checkpoint/.saving/step-6.1f2e    one that is being written, or whose save was cut short
    checkpoint/.removing/step-2.9c4d  one that is being deleted
    checkpoint/aside-1/step-8         one that the run left behind when it went back

Nothing is assumed of the file system but that a rename within it happens as a whole, and that
fsync brings data onto the disk.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtcp.pretrain.manifest import Manifest, misfit, read_manifest, sync_folder

SAVING, REMOVING = ".saving", ".removing"
STEP = re.compile(r"step-(0|[1-9]\d*)")
PASSING = re.compile(r"(step-\d+|hf)\.[0-9a-f]{32}")
"""Names in `.saving` and `.removing`."""


@dataclass(frozen=True)
class SavedFolders:
    """The folder that holds a run's checkpoints, as `checkpoint`."""

    root: Path

    def path(self, step: int) -> Path:
        return self.root / f"step-{step}"

    def staging(self, name: str, save: str) -> Path:
        """Where a folder of that name is written before it is visible."""
        return self.root / SAVING / f"{name}.{save}"

    def steps(self) -> list[int]:
        """Steps with a folder of exactly that name, whatever it holds; ascending."""
        if not self.root.is_dir():
            return []
        matches = [STEP.fullmatch(path.name) for path in self.root.iterdir() if path.is_dir()]
        return sorted(int(match[1]) for match in matches if match)

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step, whose files are there and have their sizes.

        Raises:
            ValueError: why this is not a checkpoint of that step, for the middle of a sentence.
        """
        manifest = read_manifest(self.path(step))
        if manifest.step != step:
            raise ValueError(f"{self.path(step)} holds step {manifest.step}: it was renamed")
        problem = misfit(self.path(step), manifest)
        if problem:
            raise ValueError(problem)
        return manifest

    def whole(self) -> list[int]:
        """Steps that a run can continue from, as far as sizes tell; ascending."""
        return [step for step in self.steps() if self._is_whole(step)]

    def remove(self, steps: Sequence[int]) -> list[Path]:
        """Hide checkpoints of ours; the paths returned can be deleted at leisure."""
        paths = [self.path(step) for step in steps]
        # A link is the work of a person, and so is what it leads to.
        return [self._hide(x, read_manifest(x).save) for x in paths if not x.is_symlink()]

    def set_aside_after(self, step: int) -> tuple[str, Path] | None:
        """Move what was saved after a step aside: the names, and where they are; None if none."""
        later = [self.path(each) for each in self.steps() if each > step]
        return (", ".join(path.name for path in later), self.set_aside(later)) if later else None

    def set_aside(self, paths: Sequence[Path]) -> Path:
        """Move folders, as they are, to one that no run reads or deletes; returns it."""
        numbers = (re.fullmatch(r"aside-(\d+)", path.name) for path in self.root.iterdir())
        number = 1 + max((int(match[1]) for match in numbers if match), default=0)
        aside = self.root / f"aside-{number}"
        aside.mkdir()
        for path in paths:
            path.rename(aside / path.name)
        sync_folder(self.root)
        return aside

    def clear(self) -> None:
        """Delete what interrupted saves and deletions have left."""
        for folder in (self.root / SAVING, self.root / REMOVING):
            for path in folder.iterdir() if folder.is_dir() else ():
                if PASSING.fullmatch(path.name) and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)

    def publish(self, staging: Path, final: Path) -> str:
        """Make a written and synced folder visible; one of the same name makes way.

        Returns:
            what became of a folder of that name that is not ours; empty otherwise.
        """
        said, hidden = "", None
        if os.path.lexists(final):
            try:
                hidden = self._hide(final, read_manifest(final).save)
            except ValueError:
                aside = self.set_aside([final])
                said = f"moved       {final.name} to {aside}: it is in the way, and no save of ours"
        try:
            staging.rename(final)
        except OSError:
            if hidden is not None:
                hidden.rename(final)
            raise
        sync_folder(final.parent)
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)
        for parent in (self.root / SAVING, self.root / REMOVING):
            # Tidy where nothing else is on its way.
            with contextlib.suppress(OSError):
                parent.rmdir()
        return said

    def _is_whole(self, step: int) -> bool:
        try:
            self.manifest(step)
        except ValueError:
            return False
        return True

    def _hide(self, path: Path, save: str) -> Path:
        """Rename a folder of ours to where nothing is looked for."""
        if path.is_symlink() or not re.fullmatch(r"[0-9a-f]{32}", save):
            raise ValueError(f"{path} is not a folder that a run has made")
        hidden = self.root / REMOVING / f"{path.name}.{save}"
        hidden.parent.mkdir(parents=True, exist_ok=True)
        if hidden.exists():
            shutil.rmtree(hidden)
        path.rename(hidden)
        sync_folder(path.parent)
        return hidden

"""torchtitan's checkpoints: whole or not there, read as data, and reported in one line.

What is saved is the whole state (weights, optimizer, schedule, place in the data), by name and
global shape: it loads onto any mesh. A folder is written beside, with a manifest, and renamed when
all of it is on the disk (checkpoint_writer, saved_folders); a start looks for the newest whole one
(checkpoint_choice); nothing that a folder holds is run (dtcp.checkpoint).
"""

import threading
import uuid
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dtcp.torchtitan import compat as compat
from dtcp.torchtitan.hf_model import HuggingFaceAdapter

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.checkpointer.base import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    TRAIN_STATE,
)
from torchtitan.components.checkpointer.dcp import AsyncMode
from torchtitan.tools.utils import GarbageCollection

from dtcp.checkpoint import SafeHuggingFaceReader, SafeLoadPlanner, SafeReader
from dtcp.parallelize.save_hf import save_hf
from dtcp.pretrain.checkpoint_choice import agree, choose, first_rank, verified
from dtcp.pretrain.checkpoint_errors import load_failure, save_failure
from dtcp.pretrain.checkpoint_fit import Fingerprinted, refuse_other_model
from dtcp.pretrain.checkpoint_writer import CheckpointWriter
from dtcp.pretrain.config_record import config_changes, config_record
from dtcp.pretrain.finite import not_finite
from dtcp.pretrain.hf_export import complete_export, sync_files
from dtcp.pretrain.hf_weights import read_hf_weights, refuse_not_finite_weights
from dtcp.pretrain.hyperparameters import Hyperparameters
from dtcp.pretrain.manifest import Holds, Manifest, record_files
from dtcp.pretrain.progress import say
from dtcp.pretrain.same_start import refuse_other_weights
from dtcp.pretrain.saved_folders import SavedFolders
from dtcp.pretrain.staged import of_all_stages, pp_of


class Checkpoints(CheckpointManager):
    """CheckpointManager whose folders are whole or not there, and of which nothing is executed."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        export_hf: bool = False
        """After the last step, also write the weights as Hugging Face safetensors to hf/."""

        verify_checksums: bool = True
        """Compare every file with its checksum before it is loaded; else small files alone, and the
        size of all."""

        hf_ignore: list[str] = field(default_factory=list)
        """Patterns of tensors in Hugging Face weights that the model does without on purpose."""

    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.export_hf, self.hf_ignore = config.export_hf, config.hf_ignore
        self.checksums, self.run = config.verify_checksums, ""
        if self.enable:
            self.folders = SavedFolders(Path(self.folder))
        if self.enable and self.export_hf and self.sd_adapter is None:
            raise ValueError(
                "A Hugging Face export needs the model's name map, got "
                "--checkpoint.export_hf for a model without one: leave it out."
            )

    def _load(self, step: int = -1) -> bool:
        """Go on from the newest whole checkpoint, or from that of a step; else from given weights.

        Raises:
            ValueError: there is none that is whole, or it is of another model, data or run.
        """
        if not self.load_only:
            agree(self.folders.clear)
            agree(SavedFolders(self.folders.root.parent).clear)
        choice = choose(self.folders, step, checksums=self.checksums)
        if choice is None:
            return self._start()
        manifest = choice.manifest
        for problem in choice.skipped:
            say(f"skipped     {problem}; going on from step {manifest.step}")
        self._refuse_unfit(manifest)
        self._restore(manifest.step)
        self.run = manifest.run
        self._tell_changes(manifest)
        self._leave_behind(manifest.step)
        checked = "" if self.checksums else " (sizes and small files compared, no checksums)"
        say(f"loaded      {self.folders.path(manifest.step)}{checked}")
        return True

    def _start(self) -> bool:
        """Start from the weights or the state that the settings name, if they name any."""
        path = Path(self.initial_load_path) if self.initial_load_path else None
        if path is not None:
            refuse_other_weights(path)
        manifest = None if path is None else verified(path, checksums=self.checksums)
        loaded = self._restore(-1)
        self._forget_step_of_nothing()
        if path is not None and loaded:
            if not self.initial_load_in_hf:
                refuse_not_finite_weights(self.states[MODEL].state_dict(), path)
            say(
                f"loaded      {path}{'' if manifest else ', which has no manifest to compare with'}"
            )
        return loaded

    def _forget_step_of_nothing(self) -> None:
        """Start the optimizer of a run without a step as a new one.

        torchtitan takes a step of no gradient before it saves the state of a seed checkpoint, and
        AdamW counts it: its first true step would be smaller.
        """
        known = {TRAIN_STATE, OPTIMIZER}.isdisjoint(self.exclude_from_loading)
        if known and self.states[TRAIN_STATE].step == 0:
            for optimizer in self.states[OPTIMIZER]:
                optimizer.state.clear()

    def _restore(self, step: int) -> bool:
        """torchtitan's load, with the optimizers' settings left as they are.

        Raises:
            ValueError: the state does not fit; in one line, where DCP has a traceback per rank.
        """
        settings_of_optimizers = Hyperparameters(self.states[OPTIMIZER])
        try:
            loaded = super()._load(step)
        except CheckpointException as error:
            raise ValueError(self._explain(step, error)) from error
        settings_of_optimizers.restore(self.states[LR_SCHEDULER])
        trainer = self.states.get(TRAIN_STATE)
        if step > 0 and TRAIN_STATE not in self.exclude_from_loading and trainer.step != step:
            raise ValueError(
                f"A checkpoint holds the state after its step, got that after step {trainer.step} "
                f"in {self.folders.path(step)}: it was put together from two; "
                f"{self._way_back(step)}."
            )
        return bool(loaded)

    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        path = Path(checkpoint_id)
        if from_quantized:
            # torchtitan's reader knows scales; that the files are whole and in place is known here.
            SafeHuggingFaceReader(path)
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
        elif from_hf:
            pp = pp_of(self.states[TRAIN_STATE])
            options = (self.sd_adapter, state_dict, path)
            weights = read_hf_weights(*options, ignore=self.hf_ignore, pp=pp)
            self.states[MODEL].load_state_dict(weights)
        else:
            reader = SafeReader(path)
            own = {name: x.shape for name, x in self.states[MODEL].state_dict().items()}
            refuse_other_model(reader, of_all_stages(own, pp_of(self.states[TRAIN_STATE])), path)
            dcp.load(state_dict, storage_reader=reader, planner=SafeLoadPlanner())
            # Weights lie flat beside the rest, so no stateful object of theirs was asked to load.
            self.states[MODEL].load_state_dict(state_dict)

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        """torchtitan's save of a finite state.

        Raises:
            ValueError: the state is not finite, or could not be written; nothing became visible.
        """
        if not self._should_save(curr_step, last_step):
            return False
        # The last save must be through before this one begins.
        self.maybe_wait_for_saving()
        self._refuse_not_finite(curr_step)
        try:
            saved = super()._save(curr_step, last_step)
        except CheckpointException as error:
            raise ValueError(self._explain_save(curr_step, error)) from error
        if self.save_future is None:
            self._after_save(curr_step)
        else:
            say(f"saving      {self.folders.path(curr_step)} in the background")
            self._announced = threading.Event()
            self.save_future.add_done_callback(lambda done: self._in_background(curr_step, done))
        return bool(saved)

    def _wait_for_saving(self) -> None:
        try:
            super()._wait_for_saving()
        except CheckpointException as error:
            raise ValueError(self._explain_save(-1, error)) from error
        # The future wakes its waiters before it runs its callbacks.
        self._announced.wait()

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        final = Path(checkpoint_id)
        holds: Holds = "state" if TRAIN_STATE in state_dict else "weights"
        manifest = self._manifest("huggingface" if to_hf else holds)
        if to_hf:
            self._save_hf(state_dict, final, manifest, {})
            return None
        writer = CheckpointWriter(self.folders, final.name, manifest=manifest)
        if async_mode == AsyncMode.DISABLED:
            dcp.save(state_dict, storage_writer=writer)
            if writer.said:
                say(writer.said)
            if enable_garbage_collection:
                GarbageCollection.collect("GC collection invoked by checkpointer.")
            return None
        return self._save_in_background(state_dict, writer, async_mode)

    def _save_in_background(
        self, state_dict: dict[str, Any], writer: CheckpointWriter, async_mode: AsyncMode
    ) -> Any:
        """torch's async_save; the writer itself would stage without a copy on the CPU."""
        if async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM:
            return dcp.async_save(
                state_dict,
                storage_writer=writer,
                process_group=self.pg,
                async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                async_stager=self.stager,
            )
        stager = DefaultStager(StagingOptions(False, False, False, False))
        future = dcp.async_save(
            state_dict, storage_writer=writer, process_group=self.pg, async_stager=stager
        )
        # torch returns the pair of futures only where staging is in the background, too.
        assert isinstance(future, Future)
        future.add_done_callback(lambda _: stager.close())
        return future

    def _in_background(self, step: int, done: Future[Any]) -> None:
        # A failure is raised where the future is waited for, on every rank.
        try:
            if done.exception() is None:
                self._after_save(step)
        finally:
            self._announced.set()

    def _after_save(self, step: int) -> None:
        say(f"saved       {self.folders.path(step)}")
        if not self.keep_latest_k or not first_rank():
            return
        try:
            for path in self.folders.remove(self.folders.whole()[: -self.keep_latest_k]):
                self.purge_queue.put(str(path))
        except OSError as error:
            say(f"kept        older checkpoints, which cannot be removed ({error})")

    def _purge_stale_checkpoints(self) -> None:
        """Done by `_after_save`: a save in the background is not there yet when this is called."""

    def save_now(self, step: int) -> bool:
        """Save the whole state, whatever the interval, and wait for it; False if none is saved."""
        if not self.enable or self.load_only:
            return False
        if not self._should_save(step):
            self.interval, interval = 1, self.interval
            self.save(step)
            self.interval = interval
        self.maybe_wait_for_saving()
        return True

    def _save_last_step(self, curr_step: int) -> None:
        super()._save_last_step(curr_step)
        if self.export_hf:
            self._export(self.folders.root.parent / "hf")

    def _manifest(self, holds: Holds) -> Manifest:
        loader, trainer = self.states[DATALOADER], self.states[TRAIN_STATE]
        # A seed checkpoint is saved by a run that has loaded nothing.
        run, save = agree(lambda: (self.run or uuid.uuid4().hex, uuid.uuid4().hex))
        self.run = run
        return Manifest(
            step=trainer.step,
            run=run,
            save=save,
            holds=holds,
            config=config_record(trainer.config),
            data=loader.fingerprint() if isinstance(loader, Fingerprinted) else {},
        )

    def _find_load_step(self, folder: str = "") -> int:
        return max(self.folders.whole(), default=-1)

    def newest(self) -> str:
        """Say which checkpoint a new start would go on from."""
        step = self._find_load_step() if self.enable else -1
        return f"The last checkpoint is of step {step}" if step >= 0 else "There is no checkpoint"

    def _export(self, final: Path) -> None:
        """Write weights and config as transformers reads them, and make them visible last."""
        of_transformers = isinstance(self.sd_adapter, HuggingFaceAdapter)  # reads them itself
        state = {} if of_transformers else self.states[MODEL].state_dict()
        weights = {k: x.to(self.export_dtype) for k, x in state.items() if x.is_floating_point()}
        others = {name: _whole(value) for name, value in state.items() if name not in weights}
        others = of_all_stages(others, pp_of(self.states[TRAIN_STATE]))
        self._save_hf(weights, final, self._manifest("huggingface"), others)
        say(f"exported    {final}")

    def _save_hf(
        self, weights: dict[str, Any], final: Path, manifest: Manifest, others: dict[str, Any]
    ) -> None:
        """torchtitan's files of safetensors, written beside on the same file system."""
        folders = SavedFolders(final.parent)
        staging = folders.staging(final.name, manifest.save)
        if isinstance(self.sd_adapter, HuggingFaceAdapter):
            parts, pp = self.states[MODEL].model, pp_of(self.states[TRAIN_STATE])
            model = parts[0] if pp is None else nn.ModuleList(parts)
            save_hf(model, staging, dtype=self.export_dtype, pp=pp)
        else:
            super().dcp_save(weights, str(staging), AsyncMode.DISABLED, to_hf=True)

        def publish() -> str:
            complete_export(staging, self.sd_adapter, others)
            sync_files(staging)
            # The weights; a config may be edited by hand.
            files = record_files(staging, ".safetensors", ".safetensors.index.json")
            replace(manifest, files=files).write(staging)
            return folders.publish(staging, final)

        said = agree(publish)
        if said:
            say(said)

    def _refuse_unfit(self, manifest: Manifest) -> None:
        """Refuse a checkpoint that is whole and still cannot be continued from."""
        path = self.folders.path(manifest.step)
        if manifest.step > 0 and manifest.holds != "state":
            raise ValueError(
                f"A run goes on from its whole state, got {path} with weights only "
                f"(--checkpoint.last_save_model_only): {self._way_back(manifest.step)}, or give "
                f"them as --checkpoint.initial_load_path to a run with another --dump_folder."
            )

    def _refuse_not_finite(self, step: int) -> None:
        """A loss is only looked at where it is logged; a NaN must not get into a checkpoint."""
        objects = {k: v for k, v in self.states.items() if k not in (DATALOADER, TRAIN_STATE)}
        bad = not_finite({name: value.state_dict() for name, value in objects.items()})
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise ValueError(
                f"A state is finite when it is saved, got NaN or infinity in {bad[0]}{more} at "
                f"step={step}: nothing was written. {self.newest()}; lower the learning rate and "
                f"start again."
            )

    def _tell_changes(self, manifest: Manifest) -> None:
        changed = config_changes(manifest.config, config_record(self.states[TRAIN_STATE].config))
        if changed and manifest.step > 0:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            say(f"changed     {', '.join(changed[:5])}{more}, since step {manifest.step} was saved")

    def _leave_behind(self, step: int) -> None:
        """Move later steps out of the way: the run goes another way from here."""
        # By the first rank alone: another might look when they are gone.
        moved = None if self.load_only else agree(lambda: self.folders.set_aside_after(step))
        if moved is not None:
            say(f"moved       {moved[0]} to {moved[1]}: this run goes on from step {step}")

    def _way_back(self, step: int) -> str:
        before = [s for s in self.folders.whole() if s < step]
        return (
            f"go back to step {before[-1]} with --checkpoint.load_step {before[-1]}"
            if before
            else "choose another --dump_folder"
        )

    def _explain(self, step: int, error: CheckpointException) -> str:
        path = self.folders.path(step) if step >= 0 else self.initial_load_path
        return load_failure(error, path, self._way_back(step))

    def _explain_save(self, step: int, error: CheckpointException) -> str:
        if first_rank():
            self.folders.clear()
        return save_failure(error, self.folders.root, step, self.newest())


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value

"""torchtitan's checkpoints, with one clear error where a checkpoint does not fit or does not read.

What is saved is the whole state (weights, optimizer, schedule, place in the data), by name and
global shape: it loads onto any mesh. DCP writes `.metadata` last, so a save that was cut short
has none, and is passed over.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtcp.torchtitan.model_spec import NameMapAdapter

import torch
from safetensors.torch import save_file
from torch import distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.checkpointer.base import MODEL
from torchtitan.components.checkpointer.dcp import AsyncMode

from dtcp.pretrain.progress import say

STATE_PREFIXES = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")


class Checkpoints(CheckpointManager):
    """CheckpointManager that names what is wrong with a checkpoint, and never saves a NaN."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        export_hf: bool = False
        """After the last step, also write the weights as Hugging Face safetensors to hf/."""

    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.export_hf = config.export_hf
        if self.enable and self.export_hf and self.sd_adapter is None:
            raise ValueError(
                "A Hugging Face export needs the model's name map, got "
                "--checkpoint.export_hf for a model without one: leave it out."
            )

    def _load(self, step: int = -1) -> bool:
        """Restore the state, or say which checkpoint cannot be and what to do about it.

        Raises:
            ValueError: the checkpoint is torn, or of another model.
        """
        self._report_torn()
        try:
            loaded = super()._load(step)
        except CheckpointException as error:
            raise ValueError(self._explain(step, error)) from error
        if loaded:
            say(f"loaded      {self._path(step)}")
        return loaded

    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        if not from_hf:
            self._refuse_foreign(Path(checkpoint_id))
        super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if self._should_save(curr_step, last_step):
            self._refuse_not_finite(curr_step)
        saved = super()._save(curr_step, last_step)
        if saved:
            say(f"saved       {self._create_checkpoint_id(curr_step)}")
        return saved

    def _save_last_step(self, curr_step: int) -> None:
        super()._save_last_step(curr_step)
        if self.export_hf:
            self._export(Path(self.folder).parent / "hf")

    def _export(self, path: Path) -> None:
        """Write weights and config as transformers reads them."""
        state = self.states[MODEL].state_dict()
        weights = {
            name: value.to(self.export_dtype)
            for name, value in state.items()
            if value.is_floating_point()
        }
        self.dcp_save(weights, str(path), AsyncMode.DISABLED, to_hf=True)
        others = {name: _whole(value) for name, value in state.items() if name not in weights}
        if dist.get_rank() == 0:
            if others:
                _add_to_export(path, self.sd_adapter.to_hf(others))
            # Each rank's part, from which torchtitan has put the whole together.
            shutil.rmtree(path / "sharded", ignore_errors=True)
            if isinstance(self.sd_adapter, NameMapAdapter):
                (path / "config.json").write_text(json.dumps(self.sd_adapter.hf_config(), indent=1))
        say(f"exported    {path}")

    def _refuse_foreign(self, path: Path) -> None:
        """DCP reads the weights it looks for and ignores the rest: refuse a larger model."""
        saved = FileSystemReader(path).read_metadata().state_dict_metadata
        known = self.states[MODEL].state_dict()
        extra = [
            name for name in saved if not name.startswith(STATE_PREFIXES) and name not in known
        ]
        if extra:
            raise ValueError(
                f"A checkpoint holds the weights of this model, got {path} with {extra[0]} and "
                f"{len(extra) - 1} more that the model lacks: it is of another model; choose "
                f"another --dump_folder, or the config it was made with."
            )

    def _refuse_not_finite(self, step: int) -> None:
        """A loss is only looked at where it is logged; a NaN must not get into a checkpoint."""
        bad = torch.stack(
            [~_local(value).isfinite().all() for value in self.states[MODEL].state_dict().values()]
        ).any()
        flag = bad.to(torch.int32)
        dist.all_reduce(flag)
        if flag.item():
            raise ValueError(
                f"Weights are finite when they are saved, got NaN or infinity at step={step}: "
                f"nothing was written. {self.newest()}; lower the learning rate and start again."
            )

    def newest(self) -> str:
        """Say which checkpoint a new start would go on from."""
        step = self._find_load_step() if self.enable else -1
        return f"The last checkpoint is of step {step}" if step >= 0 else "There is no checkpoint"

    def _report_torn(self) -> None:
        folder = Path(self.folder)
        steps = sorted(folder.glob("step-*")) if folder.is_dir() else []
        for path in steps:
            if not (path / ".metadata").is_file() and not list(path.glob("*.safetensors*")):
                say(f"skipped     {path}: its save was cut short")

    def _path(self, step: int) -> str:
        step = self._find_load_step() if step == -1 else step
        if step < 0:
            return str(self.initial_load_path)
        return self._create_checkpoint_id(step)

    def _explain(self, step: int, error: CheckpointException) -> str:
        """One line for what DCP reports once per rank, as nested tracebacks."""
        first = next(iter(error.failures.values()))[0]
        cause = re.sub(r"\s+", " ", str(first))[:300]
        earlier = [p for p in _complete(Path(self.folder)) if str(p) != self._path(step)]
        remedy = (
            f"go on from an earlier one with --checkpoint.load_step {_step(earlier[-1])}"
            if earlier
            else "choose another --dump_folder"
        )
        return (
            f"A checkpoint holds the whole state of this model, got {self._path(step)} "
            f"({type(first).__name__}: {cause}): it is torn, or of another model; {remedy}."
        )


def _add_to_export(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write integers beside the weights: torch puts ranks' parts together of floats only (2.13)."""
    file, index_path = "model-integers.safetensors", path / "model.safetensors.index.json"
    save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, path / file)
    index = json.loads(index_path.read_text())
    index["weight_map"] |= dict.fromkeys(tensors, file)
    index["metadata"]["total_size"] += sum(x.nbytes for x in tensors.values())
    index_path.write_text(json.dumps(index, indent=2))


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _complete(folder: Path) -> list[Path]:
    """Checkpoints whose save came to its end, oldest first."""
    return sorted((path.parent for path in folder.glob("step-*/.metadata")), key=_step)

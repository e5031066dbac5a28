"""A run without ranks, rows or loss: what a checkpoint manager needs of one, in milliseconds."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dtcp.torchtitan import compat as compat

import torch
import xxhash
from torch import nn
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw

from dtcp.pretrain.checkpoint import Checkpoints
from dtcp.pretrain.manifest import read_manifest, record_files


class SmallRun:
    """A trainer's state with steps that take one update of AdamW each.

    Args:
        folder: its dump folder.
        lr: as the config has it.
        settings: of Checkpoints.Config.
    """

    def __init__(self, folder: Path, *, lr: float = 1e-2, width: int = 8, **settings: Any) -> None:
        torch.manual_seed(0)
        self.folder, self.step, self.ntokens_seen = folder, 0, 0
        self.parallel_dims = SimpleNamespace(get_optional_mesh=lambda name: None)
        self.config = SimpleNamespace(to_dict=lambda: {"optimizer": {"lr": lr}})
        self.model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8))
        self.optimizers = default_adamw(lr=lr).build(model_parts=[self.model])
        self.schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(
            optimizers=self.optimizers, training_steps=20
        )
        self.loader = SmallLoader()
        config = {"enable": True, "interval": 2, "keep_latest_k": 0, "last_save_model_only": False}
        config |= {"initial_load_model_only": False, **settings}
        self.checkpoints = Checkpoints.Config(**config).build(
            dataloader=self.loader,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={"train_state": self},
            sd_adapter=None,
            base_folder=str(folder),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.ntokens_seen = state["step"], state["ntokens_seen"]

    def train(self, steps: int) -> "SmallRun":
        """Go on to that step, saving every second one."""
        while self.step < steps:
            self.step += 1
            self.loader.document = self.step
            generator = torch.Generator().manual_seed(self.step)
            self.model(torch.randn(4, 8, generator=generator)).square().mean().backward()
            self.optimizers.step()
            self.schedulers.step()
            self.optimizers.zero_grad()
            self.checkpoints.save(self.step)
        return self

    def resume(self, step: int = -1) -> "SmallRun":
        self.checkpoints.load(step)
        return self

    def weights(self) -> torch.Tensor:
        return torch.cat([x.detach().flatten() for x in self.model.parameters()])

    @property
    def root(self) -> Path:
        return self.folder / "checkpoint"


class SmallLoader(BaseDataLoader):
    """A place in the data, without data."""

    document = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def fingerprint(self) -> dict[str, Any]:
        return {"documents": "none"}

    def state_dict(self) -> dict[str, Any]:
        return {"document": self.document}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.document = state_dict["document"]


class Payload:
    """Leaves a file where it is unpickled, and gives something innocent back."""

    def __init__(self, trace: Path, call: str = "open") -> None:
        self.trace, self.call = str(trace), call

    def __reduce__(self) -> tuple[Any, ...]:
        if self.call == "open":
            return open, (self.trace, "w")
        return os.system, (f"touch {self.trace}",)


def forge_manifest(folder: Path, **changes: Any) -> None:
    """Make the manifest of a folder say what a forger wants, with checksums that fit."""
    manifest = read_manifest(folder)
    body = {**asdict(manifest), **changes}
    body["files"] = {name: asdict(record) for name, record in record_files(folder).items()}
    body = json.loads(json.dumps({"format": 1, **body}))
    digest = xxhash.xxh3_64(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**body, "checksum": digest}))

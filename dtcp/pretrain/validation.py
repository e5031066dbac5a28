"""torchtitan's Validator on batches that are made ahead, as the Trainer's are.

Every validation reads the same rows, from the first one on. The thread of its loader makes the
first batch while the training step before it runs, and each further one while the last is used.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dtcp.torchtitan import compat as compat

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.validate import Validator

from dtcp.microbatches import run_forward
from dtcp.pretrain.batches import BatchPreparation, LocalBatch
from dtcp.pretrain.data import PackedDocuments
from dtcp.pretrain.staged import loss_of_stages


@dataclass
class OpenedLoader:
    """Stands for the config of a loader that is open already."""

    loader: BaseDataLoader

    def build(self, **_: Any) -> BaseDataLoader:
        return self.loader


@dataclass(frozen=True)
class _ForwardStages:
    """A schedule as torchtitan's Validator calls it: every stage gets the losses."""

    schedule: Any
    parts: Sequence[nn.Module]
    pp: DeviceMesh

    def eval(self, *, losses: list[Tensor], **micro_batches: Any) -> None:
        for stage in self.parts:
            stage.zero_grad()  # of the step before, which the optimizer has taken
        device = micro_batches["target_mbs"][0].device
        losses.append(loss_of_stages(run_forward(self.schedule, **micro_batches), self.pp, device))


class Validation(Validator):
    """torchtitan's Validator on the same batches as the Trainer that owns it."""

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        pass

    # Set by the Trainer: torchtitan builds a validator from its own sections only.
    preparation: BatchPreparation
    config: Any
    dl_config: Any
    _opened: BaseDataLoader | None = None
    _rows: int
    """Of a micro-batch."""

    def __init__(self, config: Config, **kwargs: Any) -> None:
        ends_together = isinstance(config.dataloader, PackedDocuments.Config)
        with _unsaid("might cause hangs because of unequal sample counts", ends_together):
            super().__init__(config, **kwargs)
        # All a rank has, but for stages, which torchtitan gives micro-batches.
        staged = self.parallel_dims.pp_enabled
        self._rows = (
            self.parallelism.pipeline_parallel_microbatch_size if staged else self.local_batch_size
        )

    def run_stages(self, schedule: Any, parts: Sequence[nn.Module], pp: DeviceMesh) -> None:
        """Validate by the stages of a schedule, forward alone; every stage gets the loss."""
        self.pp_schedule = _ForwardStages(schedule, parts, pp)
        self.pp_has_first_stage = self.pp_has_last_stage = True

    def read_ahead(self) -> None:
        """Open the loader of the next validation, and start on its first batch."""
        self._opened = self.dl_config.build(
            dp_world_size=self.dp_world_size,
            dp_rank=self.dp_rank,
            tokenizer=self.tokenizer,
            seq_len=self.seq_len,
            local_batch_size=self._rows,
        )
        if isinstance(self._opened, PackedDocuments):
            self._opened.prepare = self._only_prepared
            self._opened.read_ahead()

    def _only_prepared(self, input_dict: dict[str, Any], labels: Tensor) -> dict[str, Any]:
        """Whole rows stay on the host: torchtitan's copies all of a batch to the device."""
        return {"prepared": self.preparation.ahead(input_dict, labels)["prepared"]}

    def post_dataloading_process(
        self, input_dict: dict[str, Any], labels: Tensor, model_parts: list[nn.Module]
    ) -> LocalBatch:
        return self.preparation.local(input_dict, labels, labels.device)

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """torchtitan's, which divides by the number of tokens (0.3.0); without any, the loss is 0.

        Raises:
            ValueError: stages, and fewer rows in all than a step of their schedule takes.
        """
        if self._opened is None:
            self.read_ahead()
        config, self.dl_config = self.dl_config, OpenedLoader(self._opened)
        try:
            super().validate(model_parts, step)
        except ZeroDivisionError:
            self.metrics_processor.log_validation(loss=0.0, step=step)
            for model in model_parts:
                model.train()
        except AssertionError as error:
            if not self.parallel_dims.pp_enabled:
                raise
            rows = self.local_batch_size * self.dp_world_size
            raise ValueError(
                f"A validation over stages takes the {rows} rows of a step of their schedule, got "
                f"fewer from all documents of {self.config.dataloader.dataset}: set "
                f"--validator.steps to a number, which reads them again, or --validator.no-enable."
            ) from error
        finally:
            self.dl_config, self._opened = config, None


@contextmanager
def _unsaid(text: str, untrue: bool) -> Iterator[None]:
    """Inside, the root logger, which is torchtitan's, leaves out what is not true of this run.

    Every rank packs every row, so that the last micro-batch is the last on all of them.
    """

    def passes(record: logging.LogRecord) -> bool:
        return not (untrue and text in record.getMessage())

    logger = logging.getLogger()
    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)

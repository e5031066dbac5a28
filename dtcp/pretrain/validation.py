"""torchtitan's Validator on batches that are made ahead, as the Trainer's are.

Every validation reads the same rows, from the first one on. The thread of its loader makes the
first batch while the training step before it runs, and each further one while the last is used.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dtcp.torchtitan import compat as compat

from torch import Tensor, nn
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.validate import Validator

from dtcp.pretrain.batches import BatchPreparation, LocalBatch
from dtcp.pretrain.data import PackedDocuments


@dataclass
class OpenedLoader:
    """Stands for the config of a loader that is open already."""

    loader: BaseDataLoader

    def build(self, **_: Any) -> BaseDataLoader:
        return self.loader


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

    def __init__(self, config: Config, **kwargs: Any) -> None:
        ends_together = isinstance(config.dataloader, PackedDocuments.Config)
        with _unsaid("might cause hangs because of unequal sample counts", ends_together):
            super().__init__(config, **kwargs)

    def read_ahead(self) -> None:
        """Open the loader of the next validation, and start on its first batch."""
        self._opened = self.dl_config.build(
            dp_world_size=self.dp_world_size,
            dp_rank=self.dp_rank,
            tokenizer=self.tokenizer,
            seq_len=self.seq_len,
            local_batch_size=self.local_batch_size,
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
        """torchtitan's, which divides by the number of tokens (0.3.0): the loss of none is 0."""
        if self._opened is None:
            self.read_ahead()
        config, self.dl_config = self.dl_config, OpenedLoader(self._opened)
        try:
            super().validate(model_parts, step)
        except ZeroDivisionError:
            self.metrics_processor.log_validation(loss=0.0, step=step)
            for model in model_parts:
                model.train()
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

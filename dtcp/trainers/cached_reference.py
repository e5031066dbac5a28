"""The reference of a preference loss, computed before training starts, for all rows on all ranks.

TRL writes its numbers into a file that the first process makes and the others open. If the data set
lies in memory, each process has its own folder for such files: the others fail, and the first one
waits for them. Ranks of a mesh have all numbers anyway, so each keeps them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def with_reference_log_probs(
    trainer: Any, dataset: Any, batch_size: int, prepare: Callable[[Any], Any]
) -> Any:
    """A data set with the reference's numbers of each row in additional columns, named as in TRL.

    Args:
        trainer: a DPOTrainer or a KTOTrainer on a mesh; all ranks call this together.
        batch_size: rows of each batch rank that the reference reads at once.
        prepare: puts a batch where the trainer computes on it.
    Raises:
        ValueError: a data set that is a stream, whose rows are not known beforehand.
    """
    from datasets import Dataset, IterableDataset, concatenate_datasets
    from torch.utils.data import DataLoader

    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"A reference is computed beforehand of rows that are known, got "
            f"precompute_ref_log_probs=True with a stream ({type(dataset).__name__}): leave it "
            f"False, or give a data set that has a length."
        )
    rows = DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=trainer.data_collator,
        num_workers=trainer.args.dataloader_num_workers,
    )
    model = trainer.ref_model or trainer.model
    batches: list[list[Tensor]] = []
    for batch in trainer.accelerator.prepare(rows):
        numbers = trainer.compute_ref_log_probs(model, prepare(batch))
        log_probs = tuple(x for x in numbers if x is not None)
        batches.append([x.cpu() for x in trainer.accelerator.gather_for_metrics(log_probs)])
    names = ("ref_chosen_logps", "ref_rejected_logps")
    if hasattr(trainer, "calculate_KL"):
        names = ("ref_logps", "ref_KL_logps")
    columns = {
        name: torch.cat(parts).tolist()
        for name, parts in zip(names, zip(*batches, strict=True), strict=False)
    }
    return concatenate_datasets([dataset, Dataset.from_dict(columns)], axis=1)


@contextmanager
def shards_for_hashes(model: Any) -> Iterator[None]:
    """Inside, the state dict of a model holds this rank's shards as plain tensors.

    TRL names its file by a hash of all weights, and a DTensor has none. The name is not used here.
    """
    handle = model.register_state_dict_post_hook(_local_parts)
    try:
        yield
    finally:
        handle.remove()


def _local_parts(_: Any, state: dict[str, Any], *__: Any) -> None:
    for key, x in state.items():
        if isinstance(x, DTensor):
            state[key] = x.to_local()

"""torchtitan's Trainer, with the batch cut for context parallelism before the model sees it.

Between the data loader and the model stands `shard_batch`: labels are shifted per document
already, the row is laid out, and each rank keeps its tokens, with what its mixers need to know.
The loss stays torchtitan's: the sum over local tokens, divided by the global count of valid ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dtcp.torchtitan.model_spec import PlainModel
from dtcp.torchtitan.parallelize import check_backend
from dtcp.torchtitan.section import Section

import torch
from torch import Tensor, nn
from torchtitan import trainer as titan
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.components.validate import Validator
from torchtitan.models.common.decoder import Decoder

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import ParallelMesh
from dtcp.labels import look_ahead
from dtcp.pretrain.data import PackedDocuments, open_source
from dtcp.pretrain.output_folder import check_output
from dtcp.pretrain.progress import describe_run, say
from dtcp.pretrain.start_weights import check_start
from dtcp.pretrain.tokenizer import Tokenizer
from dtcp.sequence.documents import Documents

LocalBatch = tuple[Tensor, Tensor, dict[str, Any]]


class Trainer(titan.Trainer):
    """torchtitan's Trainer over a dtcp mesh."""

    @dataclass(kw_only=True, slots=True)
    class Config(titan.Trainer.Config):
        dtcp: Section = field(default_factory=Section)

        def check(self) -> None:
            """Refuse what cannot work before any rank starts.

            Raises:
                ValueError: data that is not there, or a part that another part does not honour.
            """
            check_backend(self.parallelism)
            _check_data(self)
            check_start(self)
            check_output(self)
            spec = self.model_spec
            if isinstance(self.loss, ChunkedLossWrapper.Config) and not isinstance(
                spec.model, Decoder.Config
            ):
                raise ValueError(
                    f"A chunked loss calls the head itself, which {spec.name} does not leave to "
                    f"it, got loss=ChunkedLossWrapper: use dtcp.torchtitan.loss.TokenLoss."
                )

    mesh: ParallelMesh
    resumed_step: int = 0

    def __init__(self, config: Config) -> None:
        # torchtitan gives parallelize_fn its own sections only.
        spec = config.model_spec
        bound = partial(spec.parallelize_fn, section=config.dtcp)
        super().__init__(replace(config, model_spec=replace(spec, parallelize_fn=bound)))
        self.mesh = ParallelMesh.from_parallel_dims(self.parallel_dims)
        self._check_vocabulary()
        if config.validator.enable:
            self.validator.mesh, self.validator.section = self.mesh, config.dtcp
        say(describe_run(self))

    def post_dataloading_process(self, input_dict: dict[str, Any], labels: Tensor) -> LocalBatch:
        batch = local_batch(
            input_dict,
            labels,
            mesh=self.mesh,
            section=self.config.dtcp,
            model=self.model_parts[0],
        )
        self.ntokens_seen += batch[0].numel()
        return batch

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Any], Tensor]]) -> None:
        """One step of torchtitan's; where its loss is not finite, say what can be done."""
        try:
            super().train_step(data_iterator)
        except RuntimeError as error:
            if "Loss is not finite" not in str(error):
                raise
            raise ValueError(
                f"A loss is finite, got NaN or infinity at step={self.step}: no rank goes on, and "
                f"nothing was saved since. {self.checkpointer.newest()}; lower the learning rate, "
                f"or look at the data of this step."
            ) from error

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.resumed_step = self.step

    def _check_vocabulary(self) -> None:
        tokens, scored = self.tokenizer.get_vocab_size(), self.model_config.vocab_size
        if tokens > scored:
            raise ValueError(
                f"A model embeds every token of its tokenizer, got {tokens} tokens for "
                f"vocab_size={scored}: choose another --tokenizer.folder or config."
            )


class Validation(Validator):
    """torchtitan's Validator on the same batches as the Trainer that owns it."""

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        pass

    # Set by the Trainer: torchtitan builds a validator from its own sections only.
    mesh: ParallelMesh
    section: Section

    def post_dataloading_process(
        self, input_dict: dict[str, Any], labels: Tensor, model_parts: list[nn.Module]
    ) -> LocalBatch:
        return local_batch(
            input_dict, labels, mesh=self.mesh, section=self.section, model=model_parts[0]
        )


def local_batch(
    input_dict: dict[str, Any],
    labels: Tensor,
    *,
    mesh: ParallelMesh,
    section: Section,
    model: nn.Module,
) -> LocalBatch:
    """This rank's tokens of a batch, and what the model's forward takes besides.

    Args:
        input_dict: "input" and "positions" [B, S]; "documents" where the loader knows them on
            the host, which spares a copy back from the device.
        labels: [B, S], the next token of each.
    Returns:
        tokens and labels [B, L], and the keyword arguments of the forward; labels [B, 1 + depths,
        L] for a model that predicts further ahead.
    """
    documents, tokens = batch_documents(input_dict), input_dict["input"]
    whole = {"input_ids": tokens, "labels": labels, "position_ids": input_dict["positions"]}
    whole |= ahead_of(model, tokens, labels, documents)
    local, sharded = shard_batch(
        whole,
        mesh,
        section.sequence_layout(),
        model=model,
        documents=documents,
        device=labels.device,
    )
    names = ("position_ids", "attn_metadata")
    if isinstance(model, Decoder):
        names = ("positions", "attention_masks")
    extra = dict(zip(names, (local["position_ids"], sharded.attn_metadata), strict=True))
    if "mtp_labels" not in local:
        return local["input_ids"], local["labels"], extra
    extra["mtp_input_ids"] = local["mtp_input_ids"]
    all_labels = torch.cat((local["labels"][:, None], local["mtp_labels"]), dim=1)
    return local["input_ids"], all_labels, extra


def ahead_of(
    model: nn.Module, tokens: Tensor, labels: Tensor, documents: Documents
) -> dict[str, Tensor]:
    """What a model reads to predict further ahead than the next token, while it trains."""
    depths = model.mtp_depths if isinstance(model, PlainModel) and model.training else 0
    return look_ahead(tokens, labels, documents, depths=depths) if depths else {}


def batch_documents(input_dict: dict[str, Any]) -> Documents:
    """The documents of a batch: our loader names them, other loaders' positions imply them."""
    documents = input_dict.get("documents")
    if documents is None:
        documents = Documents.from_position_ids(input_dict["positions"].cpu())
    return documents


def _check_data(config: Trainer.Config) -> None:
    loaders = [config.dataloader]
    if config.validator.enable:
        loaders.append(config.validator.dataloader)
    for loader in loaders:
        if isinstance(loader, PackedDocuments.Config):
            open_source(loader)
        elif config.dtcp.verify:
            raise ValueError(
                f"Verifying reads the same rows on any number of ranks, got "
                f"dataloader={type(loader).__qualname__}: use PackedDocuments."
            )
    tokenizer = config.tokenizer
    named = tokenizer.folder if isinstance(tokenizer, Tokenizer.Config) else ""
    if named and not Path(named).is_dir():
        raise ValueError(
            f"A tokenizer is read from a folder, got --tokenizer.folder {named}: no such folder."
        )

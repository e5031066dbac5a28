"""A rank's part of a data loader's batches: made in the loader's thread, or when used.

Labels are shifted per document already. `prepare_batch` lays a row out and picks this rank's tokens
of it; the loader's thread does that while the step before runs. Of a batch that is used, ranks
compare a few numbers and copy their part to the device (`shard_prepared`).
"""

from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from dtcp.torchtitan.model_spec import PlainModel
from dtcp.torchtitan.section import Section

import torch
from torch import Tensor, nn
from torchtitan.models.common.decoder import Decoder

from dtcp.batch import PreparedBatch, prepare_batch, shard_prepared
from dtcp.distributed.mesh import ParallelMesh
from dtcp.labels import look_ahead
from dtcp.sequence.documents import Documents
from dtcp.sharded_batch import ShardedBatch

LocalBatch = tuple[Tensor, Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """A batch that was prepared ahead, or the error of it, with the tensors it was made from."""

    tokens: Tensor
    labels: Tensor
    outcome: "Future[PreparedBatch]"

    def to(self, device: Any) -> "Prepared":
        """Itself: the validator moves whatever is in a batch."""
        return self


@dataclass(frozen=True)
class BatchPreparation:
    """How a trainer, or a validator, makes a rank's part of its batches.

    Args:
        model: or this rank's pipeline stages, in an nn.ModuleList if there are several.
        training: whether the model predicts further ahead, if it can.
    """

    mesh: ParallelMesh
    section: Section
    model: nn.Module
    training: bool

    def prepared(self, input_dict: dict[str, Any], labels: Tensor) -> PreparedBatch:
        """This rank's tokens of a batch, and what its mixers read.

        Args:
            input_dict: "input" and "positions" [B, S]; "documents" where the loader knows them on
                the host, which spares a copy back from the device.
            labels: [B, S], the next token of each.
        """
        unread = input_dict.keys() - {"input", "positions", "documents"}
        if unread:
            raise ValueError(
                f"A batch is tokens, their positions and documents, got {sorted(unread)} besides: "
                f"use a loader of text, for what is not cut with the rows would be left out."
            )
        documents, tokens = batch_documents(input_dict), input_dict["input"]
        whole = {"input_ids": tokens, "labels": labels, "position_ids": input_dict["positions"]}
        whole |= ahead_of(self.model, tokens, labels, documents, training=self.training)
        layout = self.section.sequence_layout()
        # Of all stages: each alone could cut rows in another way.
        stage = getattr(_first(self.model), "stage", None)
        masks = stage.masks if stage is not None and layout.balances_work else None
        return prepare_batch(
            whole, self.mesh, layout, model=self.model, documents=documents, balance_for=masks
        )

    def ahead(self, input_dict: dict[str, Any], labels: Tensor) -> dict[str, Any]:
        """The batch, prepared; for a loader's thread, as `PackedDocuments.prepare`.

        What is raised here waits for the step that uses the batch.
        """
        outcome: Future[PreparedBatch] = Future()
        try:
            outcome.set_result(self.prepared(input_dict, labels))
        # Held back, never swallowed: the step that uses the batch raises it, whatever its class,
        # and the other ranks of the cp and tp group hear of it there. Raised in this thread it
        # would be this rank's alone, and they would wait for it in their first exchange.
        except Exception as error:  # noqa: BLE001
            outcome.set_exception(error)
        return input_dict | {"prepared": Prepared(input_dict["input"], labels, outcome)}

    def local(self, input_dict: dict[str, Any], labels: Tensor, device: torch.device) -> LocalBatch:
        """What the model is called with, whether or not the batch was prepared ahead."""
        prepared = partial(self.prepared, input_dict, labels)
        if "prepared" in input_dict:
            prepared = input_dict["prepared"].outcome.result
        shards = shard_prepared(prepared, self.mesh, device=device)
        return model_inputs(*shards, self.model)


def only_prepared(input_dict: dict[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor]:
    """A prepared batch without its whole rows, unless these were replaced since."""
    batch = dict(input_dict)
    prepared = batch.pop("prepared", None)
    if prepared is None or prepared.labels is not labels or prepared.tokens is not batch["input"]:
        return batch, labels
    return {"prepared": prepared}, labels


def model_inputs(local: dict[str, Tensor], sharded: ShardedBatch, model: nn.Module) -> LocalBatch:
    """Tokens and labels [B, L], and the keyword arguments of the forward.

    Labels are [B, 1 + depths, L] for a model that predicts further ahead.
    """
    inputs = (local["position_ids"], sharded.attn_metadata)
    extra = dict(zip(forward_names(model), inputs, strict=True))
    stage = getattr(_first(model), "stage", None)
    if stage is not None and stage.reads_ids:
        extra["token_ids"] = local["input_ids"]
    if "mtp_labels" not in local:
        return local["input_ids"], local["labels"], extra
    extra["mtp_input_ids"] = local["mtp_input_ids"]
    all_labels = torch.cat((local["labels"][:, None], local["mtp_labels"]), dim=1)
    return local["input_ids"], all_labels, extra


def forward_names(model: nn.Module) -> tuple[str, str]:
    """What a model's forward calls its position ids and the metadata of the batch."""
    if isinstance(_first(model), Decoder):
        return "positions", "attention_masks"
    return "position_ids", "attn_metadata"


def _first(model: nn.Module) -> nn.Module:
    """The model, or the first one of several stages."""
    return model[0] if isinstance(model, nn.ModuleList) else model


def ahead_of(
    model: nn.Module, tokens: Tensor, labels: Tensor, documents: Documents, *, training: bool
) -> dict[str, Tensor]:
    """What a model reads to predict further ahead than the next token, while it trains."""
    own = _first(model)
    depths = own.mtp_depths if isinstance(own, PlainModel) and training else 0
    return look_ahead(tokens, labels, documents, depths=depths) if depths else {}


def batch_documents(input_dict: dict[str, Any]) -> Documents:
    """The documents of a batch: given by our loader, implied by other loaders' positions."""
    documents = input_dict.get("documents")
    if documents is None:
        documents = Documents.from_position_ids(input_dict["positions"].cpu())
    return documents

"""The documents of a batch as transformers' collators make it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dtcp.sequence.arguments import check_batch, check_tensor, rows_of
from dtcp.sequence.batch_documents import (
    DOCUMENT_KEYS,
    documents_of_batch,
    documents_of_ids,
    read_padding_mask,
)
from dtcp.sequence.documents import Documents


def documents_of_hf_batch(batch: Mapping[str, Any]) -> Documents:
    """The documents of every row, from all keys by which transformers' collators give them.

    Raises:
        ValueError: keys that contradict each other, padding anywhere but on the right, a mask of
            another shape or meaning, or position_ids that do not count each document from 0.
    """
    primary = "input_ids" if batch.get("input_ids") is not None else "inputs_embeds"
    check_batch("A batch", batch, primary)
    rows, seq_len = rows_of("A batch", primary, batch[primary])
    said = {key: batch.get(key) for key in ("position_ids", "padding_mask", *DOCUMENT_KEYS)}
    mask = batch.get("attention_mask")
    explicit = None
    if mask is not None:
        mask = _checked_mask(mask, rows, seq_len)
        if bool((mask > 1).any()):
            # Numbers from 1 on, as collators of packed rows have them.
            explicit = documents_of_ids(mask - 1, name="attention_mask less 1,")
        padding = read_padding_mask(said["padding_mask"], rows, seq_len)
        if padding is not None and not torch.equal(padding, mask == 0):
            raise ValueError(
                "A batch says once what is padding, got an attention_mask (0: padding) and a "
                "padding_mask (1: padding) that differ: pass one of them."
            )
        said["padding_mask"] = mask == 0
    documents = documents_of_batch(said, rows, seq_len, documents=explicit, name="attention_mask")
    if said["position_ids"] is not None:
        _check_counted(said["position_ids"], documents)
    return documents


def _checked_mask(mask: Tensor, rows: int, seq_len: int) -> Tensor:
    """An attention_mask [B, S] on the host, of whole numbers: 0 for padding on the right."""
    check_tensor("A batch", shape="[B, S]", attention_mask=mask)
    if mask.shape != (rows, seq_len):
        raise ValueError(
            f"An attention_mask is [B, S], 1 for tokens and then 0 for padding on the right, got "
            f"shape {tuple(mask.shape)} for {rows} rows of {seq_len}: pad on the right; for packed "
            f"documents pass position_ids."
        )
    mask = mask.cpu()
    odd = (mask != mask.long()) | (mask < 0)
    if bool(odd.any()):
        row, token = odd.nonzero()[0].tolist()
        raise ValueError(
            f"An attention_mask [B, S] is 1 for tokens and 0 for padding, got attention_mask[{row},"
            f" {token}]={mask[row, token].item()}: give the mask of the tokenizer, not one that "
            f"is added to scores."
        )
    mask = mask.long()
    left = (mask[:, 1:] != 0) & (mask[:, :-1] == 0)
    if bool(left.any()):
        row, token = left.nonzero()[0].tolist()
        raise ValueError(
            f"An attention_mask is 1 for tokens and then 0 for padding on the right, got padding "
            f"at token {token} of row {row} with a token after it: pad on the right; for packed "
            f"documents pass position_ids."
        )
    return mask


def _check_counted(position_ids: Tensor, documents: Documents) -> None:
    """Refuse position ids that differ from those that the documents imply."""
    counted, document = documents.position_ids(), documents.document()
    if position_ids.ndim != 2:
        raise ValueError(
            f"Position ids of transformers' text models are one per token, got position_ids.shape="
            f"{tuple(position_ids.shape)}: give [B, S], or shard the batch by shard_batch."
        )
    wrong = (position_ids.cpu() != counted) & (document >= 0)
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        position = position_ids.expand(documents.batch, -1)[row, token].item()
        raise ValueError(
            f"Position ids count each document from 0, got position_ids[{row}, {token}]={position} "
            f"at token {counted[row, token].item()} of document {document[row, token].item()}: "
            f"leave position_ids out, or shard the batch by shard_batch to keep others."
        )

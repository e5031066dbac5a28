"""Labels of whole rows: shifted before sharding, since a shard ends where its neighbour starts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dtcp.sequence.arguments import check_ints, check_tensor
from dtcp.sequence.documents import Documents, anywhere, check_documents, count_true
from dtcp.sequence.host import on_host

IGNORED = -100
"""The label of a token that has no loss."""


@on_host
def shift_labels(input_ids: Tensor, documents: Documents, *, by: int = 1) -> Tensor:
    """Labels of next-token prediction: the token `by` places further on, in the same document.

    Args:
        input_ids: [B, S], whole rows.
        by: 1 for the next token; more for multi-token prediction.
    Returns:
        [B, S]; -100 where the document ends first, and in padding.
    Raises:
        ValueError: by < 1, unsigned input_ids, or rows that are not those of the documents.
    """
    check_tensor("Labels of next tokens", shape="[B, S]", input_ids=input_ids)
    check_ints("Labels of next tokens", by=by)
    check_documents("Labels end with their Documents", documents)
    document = documents.document()
    floats = input_ids.is_floating_point() or input_ids.is_complex()
    if by < 1 or floats or not input_ids.dtype.is_signed:
        raise ValueError(
            f"A label is a token further on, {IGNORED} where there is none, got by={by}, "
            f"ids of {input_ids.dtype} to shift: shift by 1 or more, ids of int64."
        )
    if input_ids.shape != document.shape:
        raise ValueError(
            f"Labels are shifted in whole rows, got ids or labels of {tuple(input_ids.shape)} with "
            f"documents for {tuple(document.shape)}: shift before sharding and padding."
        )
    labels = torch.full_like(input_ids, IGNORED)
    same = (document[:, by:] == document[:, :-by]) & (document[:, by:] >= 0)
    labels[:, :-by] = torch.where(same.to(input_ids.device), input_ids[:, by:], IGNORED)
    return labels


@on_host
def look_ahead(
    input_ids: Tensor, labels: Tensor, documents: Documents, *, depths: int
) -> dict[str, Tensor]:
    """What multi-token prediction reads, for a batch's whole rows: shifted before sharding.

    Depth k = 1, 2, .. reads the token k places on and predicts the one after it.

    Args:
        input_ids: [B, S].
        labels: [B, S], shifted already: the next token of each.
        depths: tokens beyond the next one that are predicted.
    Returns:
        `mtp_input_ids` and `mtp_labels`, [B, depths, S]: id 0 and label -100 where the document
        ends first. A depth's last tokens of a document have no token to read and no loss.
    Raises:
        ValueError: depths < 1.
    """
    check_ints("Multi-token prediction", depths=depths)
    check_tensor("Multi-token prediction", input_ids=input_ids, labels=labels)
    if depths < 1:
        raise ValueError(
            f"Multi-token prediction looks one token ahead or more, got depths={depths}: leave "
            f"mtp_input_ids out of the batch of a model without MTP layers."
        )
    steps = range(1, depths + 1)
    ids = torch.stack([shift_labels(input_ids, documents, by=step) for step in steps], dim=1)
    return {
        "mtp_input_ids": ids.masked_fill(ids == IGNORED, 0),
        "mtp_labels": torch.stack([shift_labels(labels, documents, by=x) for x in steps], dim=1),
    }


def check_shifted(batch: Mapping[str, Any]) -> None:
    """Refuse labels that are not shifted yet: each is the very token that the model reads.

    Args:
        batch: maybe input_ids and labels, [B, S], on the host. Elsewhere, and of fewer than
            LABELS_THAT_TELL labels, nothing is said, nor of rows of one token.
    """
    both = _labels_and_ids(batch)
    if both is not None and _are_all(*both) and not _are_next(*both):
        raise ValueError(
            "Labels are shifted before rows are cut, got labels that are input_ids wherever there "
            "is one, so that each token would predict itself: give shift_labels(labels, documents) "
            "or, where that is meant, give them under another key, by fields=DEFAULT_FIELDS | "
            '{"targets": TokenField(1, -100)} say.'
        )


def check_not_shifted(batch: Mapping[str, Any]) -> None:
    """Refuse labels that are shifted already, where they are going to be; as `check_shifted`."""
    both = _labels_and_ids(batch)
    if both is not None and _are_next(*both) and not _are_all(*both):
        raise ValueError(
            "Labels of a language model of transformers are not shifted yet, got labels that are "
            "the next of input_ids wherever there is one, so that tokens would predict the one "
            "after: give them as transformers has them, labels[b, s] for input_ids[b, s]."
        )


LABELS_THAT_TELL = 16
"""So many labels are not those of other tokens by chance."""


def _labels_and_ids(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Both, where they can be compared and no device is waited for."""
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if not isinstance(labels, Tensor) or not isinstance(ids, Tensor):
        return None
    kinds = {(x.dtype, x.device.type) for x in (labels, ids)}
    alike = labels.ndim == 2 and labels.shape == ids.shape and labels.shape[1] > 1
    return (labels, ids) if alike and kinds == {(torch.int64, "cpu")} else None


def _are_next(labels: Tensor, ids: Tensor) -> bool:
    return _are_all(labels[:, :-1], ids[:, 1:])


def _are_all(labels: Tensor, ids: Tensor) -> bool:
    """Whether labels are these ids wherever there is one. A few columns mostly tell."""
    for step in (1 + labels.shape[1] // 256, 1):
        some = labels[:, ::step]
        labeled = some != IGNORED
        if anywhere(labeled & (some != ids[:, ::step])):
            return False
    return int(count_true(labeled).sum()) >= LABELS_THAT_TELL


def check_labels(batch: Mapping[str, Tensor], documents: Documents, padding: Tensor | None) -> None:
    """Refuse a loss on a token of padding: either the label or the padding is wrong.

    Args:
        batch: maybe labels [B, S], shifted already, and loss_mask [B, S], 0 where there is no loss.
        padding: [B, S] bool on the host, True for padding. What is in no document is padding too.
    """
    labels, loss_mask = batch.get("labels"), batch.get("loss_mask")
    used = [sum(row) for row in documents.lengths]
    if labels is None or (padding is None and min(used, default=0) == documents.seq_len):
        return
    first = _first_padding(used, padding)
    wrong = torch.arange(first, documents.seq_len) >= torch.tensor(used)[:, None]
    if padding is not None:
        wrong = wrong | padding[:, first:]
    wrong = wrong & (labels[:, first:].cpu() != IGNORED)
    if loss_mask is not None:
        wrong = wrong & (loss_mask[:, first:].cpu() != 0)
    if anywhere(wrong):
        row, token = wrong.nonzero()[0].tolist()
        token += first
        raise ValueError(
            f"Padding has no loss, got labels[{row}, {token}]={labels[row, token].item()} at a "
            f"token of padding: set it to {IGNORED} (shift_labels does), or correct the padding."
        )


def _first_padding(used: list[int], padding: Tensor | None) -> int:
    """A column before which no row has padding: labels there need not be read."""
    first = min(used, default=0)
    if padding is None:
        return first
    if anywhere(padding[:, :-1] > padding[:, 1:]):
        return 0  # between documents
    return min(first, padding.shape[1] - int(count_true(padding).max()))

"""Refuses what a batch says about its rows under keys that are not read: it would be lost."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from dtcp.sequence.arguments import check_tensor, rows_of
from dtcp.sequence.documents import restarts


def padding_of_mask(mask: Tensor) -> Tensor:
    """Read padding off an attention_mask: [B, S], True for padding.

    Args:
        mask: [B, S], 0 for padding; or of four dims, bool or added to scores, in which a token of
            padding does not see itself.
    Returns:
        [B, S], bool.

    Raises:
        ValueError: a mask of another kind, which would be read as its opposite.
    """
    check_tensor("A batch", attention_mask=mask)
    if mask.ndim == 4 and (mask.dtype == torch.bool or mask.is_floating_point()):
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        padding = seen.diagonal(dim1=-2, dim2=-1).logical_not()
        # Tokens that see others but not themselves are those of an inverted mask.
        inverted = padding.all(-1) & seen.any(-1).any(-1)
        if not bool((mask > 0).any() if mask.is_floating_point() else inverted.any()):
            return padding
    elif mask.ndim == 2 and not bool((mask < 0).any()):
        return mask.bool().logical_not()
    raise ValueError(
        f"An attention_mask is [B, S] and 0 for padding, or of four dims and bool, or added to "
        f"scores, got attention_mask of shape {tuple(mask.shape)}, {mask.dtype}: give a "
        f"padding_mask [B, S] in its place, True for padding."
    )


def agreed_padding(mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """The padding of a batch, [B, S], from its attention_mask, its padding_mask or both.

    Args:
        mask: as for `padding_of_mask`, or None.
        padding: [B, S], True for padding, or None.
    Raises:
        ValueError: one that `padding_of_mask` refuses, or two that differ.
    """
    if mask is None:
        return padding
    of_mask = padding_of_mask(mask)
    if padding is None:
        return of_mask
    check_tensor("A batch", shape="[B, S]", padding_mask=padding)
    alike = padding.ndim == 2 and of_mask.shape[1] == padding.shape[1]
    alike = alike and len(of_mask) in (1, len(padding))
    if not alike or bool((padding.bool().cpu() != of_mask.cpu()).any()):
        raise ValueError(
            f"A batch says once what is padding, got an attention_mask of shape "
            f"{tuple(mask.shape)} and a padding_mask (True: padding) of shape "
            f"{tuple(padding.shape)} that differ: pass one of them."
        )
    return padding


def check_rows(batch: Mapping[str, Any], primary: str, keys: Collection[str]) -> None:
    """Refuse keys [B, S, ...] whose rows are not as long as those that the model reads.

    Args:
        primary: the key that the model reads.
    Raises:
        ValueError: such a key, or position_ids that are neither [B, S] nor [axes, B, S].
    """
    rows_of("A batch", primary, batch[primary])
    for key in keys:
        if batch.get(key) is not None:
            named: dict[str, Any] = {key: batch[key]}
            check_tensor("A batch", shape="[B, S, ...]", **named)
    shapes = {key: tuple(batch[key].shape) for key in keys if isinstance(batch.get(key), Tensor)}
    seq_len = shapes[primary][1:2]
    if not seq_len or any(shape[1:2] != seq_len for shape in shapes.values()):
        raise ValueError(
            f"The keys of a batch have rows of one length, got shapes={shapes}: give each "
            f"[B, S, ...], as {primary}."
        )
    position_ids = batch.get("position_ids")
    if position_ids is not None:
        check_tensor("A batch", shape="[B, S]", position_ids=position_ids)
    if position_ids is not None and (
        position_ids.ndim not in (2, 3) or position_ids.shape[-1:] != seq_len
    ):
        raise ValueError(
            f"Position ids go with tokens, got position_ids.shape={tuple(position_ids.shape)} for "
            f"rows of {seq_len[0]}: give [B, S], [1, S], or [axes, B, S]."
        )


def check_one_document(
    batch: Mapping[str, Any], padding: Tensor | None, *, remedy: str, unread: Collection[str] = ()
) -> None:
    """Refuse rows whose documents are given only by keys not read: they would see each other.

    Args:
        padding: [B, S], True for padding, where position ids mean nothing.
        remedy: how to give the documents instead.
        unread: keys that are not read, of which any would tell documents apart.
    Raises:
        ValueError: an attention_mask that numbers documents, position ids that restart, such a key.
    """
    hints = [key for key in unread if batch.get(key) is not None]
    if batch.get("qkv_format") == "thd":
        hints.append("qkv_format='thd'")
    mask, position_ids = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and mask.ndim == 2 and bool((mask > 1).any()):
        hints.append("an attention_mask that numbers documents")
    if mask is not None and mask.ndim == 4 and _cuts_documents(mask):
        hints.append("an attention_mask in which tokens do not see the one before them")
    if position_ids is not None and restarts(position_ids, padding):
        hints.append("position_ids that restart")
    if hints:
        raise ValueError(
            f"A batch gives its documents where they are read, got {' and '.join(hints)}: {remedy}."
        )


def _cuts_documents(mask: Tensor) -> bool:
    """Whether some token of a mask [B, 1, S, S] does not see the one before it: they are packed."""
    diagonals = (mask[:, 0].diagonal(offset, -2, -1) for offset in (0, -1))
    token, before = (x if x.dtype == torch.bool else x == 0 for x in diagonals)
    return bool((token[:, 1:] & token[:, :-1] & ~before).any())

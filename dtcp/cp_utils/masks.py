"""Read the documents and the padding of a batch off its attention_mask."""

import torch
from torch import Tensor

from dtcp.sequence.arguments import check_ints, check_tensor
from dtcp.sequence.documents import Documents


def documents_of_mask(
    mask: Tensor, position_ids: Tensor | None, rows: int, seq_len: int
) -> Documents:
    """The documents of rows, read off their mask.

    Args:
        mask: [B, S], 1 for tokens and 0 for padding on the right; or [B, 1, S, S] (or with equal
            heads), bool, or 0 and the least of its dtype, as added to scores: causal in each
            document, whatever padding sees. On the host.
        position_ids: [B, S], restarting with each document; read with a mask of two dims only.
    Raises:
        ValueError: a mask that means anything else.
    """
    check_tensor("A batch", attention_mask=mask)
    check_ints("A batch", least=1, rows=rows, seq_len=seq_len)
    if mask.ndim == 2 and mask.shape == (rows, seq_len):
        if bool(((mask != 0) & (mask != 1)).any()):
            raise _unknown(mask, "it holds values other than 0 and 1")
        return Documents.from_padded(position_ids, mask == 0)
    if mask.ndim != 4 or mask.shape[-2:] != (seq_len, seq_len) or mask.shape[0] not in (1, rows):
        raise _unknown(mask, f"a batch of {rows} rows of {seq_len} tokens has no such mask")
    allowed = _allowed(mask)
    if bool((allowed != allowed[:, :1]).any()):
        raise _unknown(mask, "its heads differ")
    seen = allowed[:, 0].expand(rows, -1, -1)  # [B, S, S]
    padding = ~seen.diagonal(dim1=1, dim2=2)
    if bool((padding.all(1) & seen.any(dim=2).any(1)).any()):
        raise _unknown(mask, "its tokens see others but not themselves, as in an inverted one")
    first = seen.int().argmax(dim=2)  # [B, S]
    index = torch.arange(seq_len)
    # A token whose first visible key is itself starts a document.
    within = index - torch.where(first == index, index, 0).cummax(dim=1).values
    documents = Documents.from_padded(within, padding)
    document = documents.document()
    same = (document[:, :, None] == document[:, None]) & (index <= index[:, None])
    wrong = (seen != same) & ~padding[:, :, None]
    if bool(wrong.any()):
        raise _unknown(mask, "its tokens do not see just what came before in their document")
    return documents


def _allowed(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise _unknown(mask, "of four dims it is bool, or added to scores")
    hidden = mask <= torch.finfo(mask.dtype).min
    if bool(((mask != 0) & ~hidden).any()):
        raise _unknown(mask, "it adds other than 0 to scores of keys that are seen")
    return ~hidden


def _unknown(mask: Tensor, reason: str) -> ValueError:
    return ValueError(
        f"An attention_mask says which tokens are padding, or that documents are causal, got "
        f"attention_mask of shape {tuple(mask.shape)}, {mask.dtype}: {reason}. Leave it out and "
        f"give padding_mask, position_ids that restart with each document, or a model with a Mask."
    )

"""Shard a batch: what every rank of a cp group read alike becomes each rank's part of it.

Runs on the host, once a batch, with no communication: the ranks of a cp group read the same
rows, so each picks its own tokens. A table says of each key where its sequence is and what
padding is made of; keys it does not name are refused, since a tensor sharded by no rule, or
left whole beside sharded ones, is wrong without a word.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from dtcp.distributed import relayout
from dtcp.distributed.mesh import ParallelMesh
from dtcp.loss import IGNORED
from dtcp.metadata import BatchMetadata
from dtcp.mixer import collect_metadata
from dtcp.sequence.documents import Documents, restarts
from dtcp.sequence.layout import HeadTail, SequenceLayout
from dtcp.sequence.masks import (
    Causal,
    Coords,
    Mask,
    vision_blocks,
)


class Fill(Enum):
    """A pad rule that is not a constant."""

    COUNT_ON = "each padding token continues from the one before it"


@dataclass(frozen=True)
class TokenField:
    """How one key of a batch is sharded and padded.

    Args:
        seq_dim: which of its dims is the sequence; counted from the end if negative.
        pad: what padding tokens hold: a constant, or Fill.COUNT_ON.
    """

    seq_dim: int
    pad: int | float | bool | Fill


WHOLE = None
"""A key that has no sequence dim and goes to every rank as it is."""

DEFAULT_FIELDS: Mapping[str, TokenField | None] = {
    "input_ids": TokenField(1, 0),
    "labels": TokenField(1, IGNORED),
    "loss_mask": TokenField(1, 0),
    "inputs_embeds": TokenField(1, 0.0),
    "position_ids": TokenField(-1, Fill.COUNT_ON),
    "mm_token_type_ids": TokenField(1, 0),
    "token_type_ids": TokenField(1, 0),
    "padding_mask": TokenField(1, True),
    "mtp_input_ids": TokenField(2, 0),
    "mtp_labels": TokenField(2, IGNORED),
}
MASK_FIELDS = ("prefix", "block")
"""Read by masks before sharding: [B, S]. Without block, mm_token_type_ids tells the images."""


@dataclass(frozen=True)
class ShardedBatch:
    """How a batch was sharded, and how to shard or gather anything else that goes with it.

    Args:
        attn_metadata: what the model's mixers read of this batch; on the device.
        unpadded_len: tokens a row before padding.
    """

    layout: SequenceLayout
    documents: Documents
    coords: Coords
    attn_metadata: BatchMetadata
    unpadded_len: int
    mesh: ParallelMesh

    def shard(self, x: Tensor, *, dim: int = 1, pad: int | float | bool = 0) -> Tensor:
        """This rank's part of a token-aligned tensor that every rank of the cp group holds.

        Args:
            x: unpadded_len or seq_len tokens at dim, in position order.
        """
        if x.shape[dim] not in (self.unpadded_len, self.layout.seq_len):
            raise ValueError(
                f"A batch plan shards what goes with its rows of {self.unpadded_len} tokens "
                f"({self.layout.seq_len} padded), got x.shape={tuple(x.shape)}, dim={dim}: name "
                f"the sequence's dim, or use the plan of that batch."
            )
        return _part(x, self.layout, self.mesh.rank("cp"), dim=dim % x.ndim, pad=pad)

    def gather(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """All ranks' parts in position order, padding removed; differentiable."""
        whole = x
        if self.mesh.cp is not None:
            whole = relayout.gather(x, self.layout, self.mesh.cp, dim=dim % x.ndim)
        return whole.narrow(dim, 0, self.unpadded_len)


def shard_batch(
    batch: Mapping[str, Tensor],
    mesh: ParallelMesh,
    layout: type[SequenceLayout] = HeadTail,
    *,
    model: nn.Module | None = None,
    documents: Documents | None = None,
    fields: Mapping[str, TokenField | None] = DEFAULT_FIELDS,
    device: torch.device | str | None = None,
    balance_for: Mask | None = None,
) -> tuple[dict[str, Tensor], ShardedBatch]:
    """Cut a batch into this rank's part, out of place and without communication.

    Args:
        batch: whole rows on the host, alike on every rank of the cp group. Labels are shifted
            already (shift_labels): a shard does not hold its neighbour's next token.
        layout: which tokens go to which rank; a class, made for the batch.
        model: whose mixers the metadata are for; None for none.
        documents: of every row; None reads them off batch["position_ids"] that restart, and
            else takes a row as one document. What padding_mask marks is in none.
        fields: how each key is sharded and padded. A key of WHOLE stays as it is.
        device: where the parts go; None leaves them where they are.
        balance_for: the mask whose work BlockBalanced balances; None for Causal().
    Returns:
        the local batch, with `padding_mask` (True: padding) if padding was added or given, and
        the plan.
    Raises:
        ValueError: a key no field names, rows of different lengths, or documents that do not
            fit the rows.
        TypeError: a value that is no tensor.
    """
    _check_keys(batch, fields)
    whole = {key: x for key, x in batch.items() if key not in MASK_FIELDS}
    rows, seq_len = _shape(whole, fields)
    documents = _documents(batch, documents, rows, seq_len)
    num_shards = mesh.size("cp")
    padded_len = -(-seq_len // layout.multiple(num_shards)) * layout.multiple(num_shards)
    documents = documents.padded(padded_len)
    coords = _coords(batch, documents, seq_len)
    work = _work(balance_for or Causal(), coords)
    placed = layout.for_batch(documents, num_shards, work=work)

    metadata = collect_metadata(nn.Module() if model is None else model, coords, placed)
    metadata = metadata if device is None else metadata.to(device)
    plan = ShardedBatch(placed, documents, coords, metadata, seq_len, mesh)
    if padded_len > seq_len and "padding_mask" not in whole:
        whole["padding_mask"] = torch.zeros(rows, seq_len, dtype=torch.bool)
    local = {}
    for key, x in whole.items():
        rule = fields[key]
        if rule is not None:
            x = _part(x, placed, mesh.rank("cp"), dim=rule.seq_dim % x.ndim, pad=rule.pad)
        local[key] = x if device is None else x.to(device, non_blocking=True)
    return local, plan


def shift_labels(input_ids: Tensor, documents: Documents, *, by: int = 1) -> Tensor:
    """Labels of next-token prediction: the token `by` places on, in the same document.

    Args:
        input_ids: [B, S], whole rows.
        by: 1 for the next token; more for multi-token prediction.
    Returns:
        [B, S]; -100 where the document ends first, and in padding.
    """
    document = documents.document()
    if by < 1 or not input_ids.dtype.is_signed:
        raise ValueError(
            f"Labels are tokens further on, and {IGNORED} where there is none, got by={by}, "
            f"input_ids of {input_ids.dtype}: shift by 1 or more, ids of int64."
        )
    if input_ids.shape != document.shape:
        raise ValueError(
            f"Labels are shifted in whole rows, got input_ids.shape={tuple(input_ids.shape)} with "
            f"documents for {tuple(document.shape)}: shift before sharding and padding."
        )
    labels = torch.full_like(input_ids, IGNORED)
    same = (document[:, by:] == document[:, :-by]) & (document[:, by:] >= 0)
    labels[:, :-by] = torch.where(same.to(input_ids.device), input_ids[:, by:], IGNORED)
    return labels


def look_ahead(
    input_ids: Tensor, labels: Tensor, documents: Documents, *, depths: int
) -> dict[str, Tensor]:
    """What multi-token prediction reads, for a batch's whole rows: shifted before sharding.

    Depth k = 1, 2, .. reads the token k places on and predicts the one after it.

    Args:
        input_ids: [B, S].
        labels: [B, S], shifted already: the next token of each.
    Returns:
        `mtp_input_ids` and `mtp_labels`, [B, depths, S]: id 0 and label -100 where the document
        ends first. A depth's last tokens of a document have no token to read and no loss.
    """
    if depths < 1:
        raise ValueError(
            f"Multi-token prediction looks one token ahead or more, got depths={depths}: leave "
            f"mtp_input_ids out of the batch of a model without MTP layers."
        )
    ids = [shift_labels(input_ids, documents, by=depth) for depth in range(1, depths + 1)]
    further = [shift_labels(labels, documents, by=depth) for depth in range(1, depths + 1)]
    found = torch.stack(ids, dim=1)
    return {
        "mtp_input_ids": found.masked_fill(found == IGNORED, 0),
        "mtp_labels": torch.stack(further, dim=1),
    }


def _check_keys(batch: Mapping[str, Tensor], fields: Mapping[str, TokenField | None]) -> None:
    unknown = [key for key in batch if key not in fields and key not in MASK_FIELDS]
    if unknown:
        raise ValueError(
            f"A batch holds keys whose sequence dim is known, got {unknown}: add them to `fields` "
            f"(WHOLE for what has none)."
        )
    other = {key: type(x).__name__ for key, x in batch.items() if not isinstance(x, Tensor)}
    if other:
        raise TypeError(f"A batch holds tensors, got {other}: leave out what there is none of.")


def _shape(batch: Mapping[str, Tensor], fields: Mapping[str, TokenField | None]) -> tuple[int, int]:
    """(rows, tokens a row), the same for every key."""
    lengths, rows = {}, {}
    for key, x in batch.items():
        rule = fields[key]
        if rule is None:
            continue
        if not -x.ndim <= rule.seq_dim < x.ndim:
            raise ValueError(
                f"The sequence of {key} is its dim {rule.seq_dim}, got {key}.shape="
                f"{tuple(x.shape)}: give it all its dims, the batch first."
            )
        lengths[key] = x.shape[rule.seq_dim]
        if rule.seq_dim == 1:
            rows[key] = x.shape[0]
    counts = set(rows.values())
    if len(set(lengths.values())) != 1 or len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"The keys of a batch have rows of one length, got tokens={lengths}, rows={rows}: "
            f"give each [B, S, ...], with input_ids or inputs_embeds among them."
        )
    return counts.pop(), next(iter(lengths.values()))


def _documents(
    batch: Mapping[str, Tensor], documents: Documents | None, rows: int, seq_len: int
) -> Documents:
    padding = batch.get("padding_mask")
    if documents is None:
        restarting = _restarting(batch.get("position_ids"), padding, rows)
        if padding is not None:
            documents = Documents.from_padded(restarting, padding.bool().cpu())
        elif restarting is not None:
            documents = Documents.from_positions(restarting)
        else:
            documents = Documents.single(rows, seq_len)
    if (documents.batch, documents.seq_len) != (rows, seq_len):
        raise ValueError(
            f"Documents describe the rows of their batch, got documents of {documents.batch} rows "
            f"of {documents.seq_len} tokens for a batch of {rows} of {seq_len}: build them from it."
        )
    if padding is not None:
        _check_padding(padding.bool().cpu(), documents)
    return documents


def _restarting(position_ids: Tensor | None, padding: Tensor | None, rows: int) -> Tensor | None:
    """Position ids that say where documents start, [B, S]; None if they count each row through."""
    if position_ids is None:
        return None
    if position_ids.ndim not in (2, 3):
        raise ValueError(
            f"Position ids are one a token, or one for each axis, got position_ids.shape="
            f"{tuple(position_ids.shape)}: give [B, S], [1, S], or [axes, B, S]."
        )
    if not restarts(position_ids.cpu(), None if padding is None else padding.cpu()):
        return None
    if position_ids.ndim != 2:
        raise ValueError(
            f"Documents are read off position_ids [B, S], got position_ids.shape="
            f"{tuple(position_ids.shape)} that restart: give documents beside them."
        )
    return position_ids.expand(rows, -1)


def _check_padding(padding: Tensor, documents: Documents) -> None:
    """Refuse padding that a document's tokens follow, for they would see it."""
    document = documents.document()
    same = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
    followed = padding[:, :-1] & ~padding[:, 1:] & same
    if bool(followed.any()):
        row, token = followed.nonzero()[0].tolist()
        raise ValueError(
            f"Padding lies behind the tokens of a document, got padding_mask[{row}, {token}]=True "
            f"with a token of the same document after it: pad on the right, or give documents "
            f"that leave it out."
        )


def _coords(batch: Mapping[str, Tensor], documents: Documents, seq_len: int) -> Coords:
    given: dict[str, Tensor] = {key: batch[key] for key in MASK_FIELDS if key in batch}
    extra: dict[str, Tensor] = {}
    if "block" not in given and "mm_token_type_ids" in batch:
        given["block"] = vision_blocks(batch["mm_token_type_ids"].cpu())
    for key, pad in (("prefix", 0), ("block", -1)):
        if key in given and given[key].shape[1:] != (seq_len,):
            raise ValueError(
                f"Masks read one {key} a token, got {key}.shape={tuple(given[key].shape)} for "
                f"rows of {seq_len}: give [B, S]."
            )
        if key in given:
            extra[key] = _pad(given[key].to(torch.int64), 1, documents.seq_len, pad)
    for key in ("position_ids", "position_ids"):
        if key in batch:
            extra["position_ids"] = _pad(batch[key].cpu(), -1, documents.seq_len, 0)
            break
    return Coords.of(documents, **extra)


def _work(mask: Mask, coords: Coords) -> Tensor:
    """Keys each token sees, over all rows: [S]."""
    first, last = mask.intervals(coords)
    return (last - first + 1).clamp(min=0).sum(0)


def _part(
    x: Tensor, layout: SequenceLayout, rank: int, *, dim: int, pad: int | float | bool | Fill
) -> Tensor:
    """A rank's part of a row that may be shorter than its layout; the whole is never padded."""
    last = x.shape[dim] - 1
    if last + 1 == layout.seq_len:
        return layout.shard(x, rank, dim=dim)
    at = layout.token_indices(rank).to(x.device)
    part = x.index_select(dim, at.clamp(max=last))
    beyond = (at - last).clamp(min=0).view([-1 if d == dim else 1 for d in range(x.ndim)])
    if isinstance(pad, Fill):
        return part + beyond.to(x.dtype)
    return part.masked_fill(beyond > 0, pad)


def _pad(x: Tensor, dim: int, length: int, pad: int) -> Tensor:
    dim %= x.ndim
    shape = [length - size if d == dim else size for d, size in enumerate(x.shape)]
    return torch.cat((x, x.new_full(shape, pad)), dim=dim) if shape[dim] else x

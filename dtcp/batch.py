"""Shard a batch: what all ranks of a cp group read alike becomes each rank's part of it.

Runs on the host, once per batch: the ranks of a cp and tp group read the same rows, so each picks
its own tokens. Nothing is sent but a few numbers by which they find out if one of them reads other
rows (`dtcp.distributed.same_rows`). A table says where the sequence of each key is and what its
padding is made of. A key that the table does not name is refused: a tensor sharded by no rule,
or left whole beside sharded ones, would be wrong without a word.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed import relayout
from dtcp.distributed.mesh import ParallelMesh
from dtcp.distributed.same_rows import prepared_alike
from dtcp.labels import IGNORED, check_labels
from dtcp.metadata import BatchMetadata
from dtcp.mixer import collect_metadata
from dtcp.sequence.arguments import check_batch, check_dim
from dtcp.sequence.documents import Documents
from dtcp.sequence.gate import DOCUMENT_KEYS, documents_of_batch, read_padding_mask
from dtcp.sequence.layout import HeadTail, SequenceLayout
from dtcp.sequence.masks import Causal, Coords, Mask, vision_blocks


class Fill(Enum):
    """A pad rule that is not a constant."""

    COUNT_ON = "each padding token continues from the one before it"


@dataclass(frozen=True)
class TokenField:
    """How one key of a batch is sharded and padded.

    Args:
        seq_dim: the dim that is the sequence; counted from the end if negative.
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
MASK_FIELDS: Mapping[str, int] = {"prefix": 0, "block": -1}
"""Keys [B, S] that masks read before sharding, and what stands for padding in them.

Without `block`, the images of mm_token_type_ids are the blocks.
"""


@dataclass(frozen=True)
class ShardedBatch:
    """How a batch was sharded, and how to shard or gather anything else that goes with it.

    Args:
        attn_metadata: what the model's mixers read of this batch; on the device.
        unpadded_len: tokens per row before padding.
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
            x: unpadded_len or seq_len tokens in dim, in the order of the row.
        """
        check_dim("A ShardedBatch", x, dim)
        if x.shape[dim] not in (self.unpadded_len, self.layout.seq_len):
            raise ValueError(
                f"A ShardedBatch shards what goes with its rows of {self.unpadded_len} tokens "
                f"({self.layout.seq_len} padded), got x.shape={tuple(x.shape)}, dim={dim}: name "
                f"the sequence's dim, or use the ShardedBatch of that tensor's batch."
            )
        return _part(x, self.layout, self.mesh.rank("cp"), dim=dim % x.ndim, pad=pad)

    def gather(self, x: Tensor, *, dim: int = 1, replicated_loss: bool = False) -> Tensor:
        """The parts of all ranks in the order of the row, padding removed; differentiable.

        By default the gradient is that of the sum of all ranks' losses, as it is right where each
        rank has a share of the loss (token_mean_loss). A loss that every rank computes alike from
        the whole row, of pooled tokens or of log-probabilities of whole answers as in DPO, would
        count once for each cp rank: the right loss with gradients cp times too large. Gather with
        replicated_loss=True for it.

        Args:
            replicated_loss: every rank of the cp group computes one and the same loss from the
                result; its gradient is not summed: each rank keeps that of its own tokens.
                Gradients of weights are to be summed over cp, as they are for shares.

        Traffic per rank: (n - 1) * L tokens, and as much back; nothing back if replicated_loss.
        """
        check_dim("A ShardedBatch", x, dim)
        whole = x
        if self.mesh.cp is not None:
            gather = _GatherReplicated.apply if replicated_loss else _gather
            whole = gather(x, self.layout, self.mesh.cp, dim % x.ndim)
        return whole.narrow(dim, 0, self.unpadded_len)


def _gather(x: Tensor, layout: SequenceLayout, mesh: DeviceMesh, dim: int) -> Tensor:
    return relayout.gather(x, layout, mesh, dim=dim)


class _GatherReplicated(torch.autograd.Function):
    """Whose gradient is the same on every rank already, so it is cut and not summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: SequenceLayout, mesh: DeviceMesh, dim: int) -> Tensor:
        ctx.layout, ctx.rank, ctx.dim = layout, mesh.get_local_rank(), dim
        return _gather(x, layout, mesh, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.layout.shard(grad, ctx.rank, dim=ctx.dim), None, None, None


def shard_batch(
    batch: Mapping[str, Any],
    mesh: ParallelMesh,
    layout: type[SequenceLayout] = HeadTail,
    *,
    model: nn.Module | None = None,
    documents: Documents | None = None,
    fields: Mapping[str, TokenField | None] = DEFAULT_FIELDS,
    device: torch.device | str | None = None,
    balance_for: Mask | None = None,
    compare_ranks: bool = True,
) -> tuple[dict[str, Tensor], ShardedBatch]:
    """Cut a batch into this rank's part, out of place.

    Args:
        batch: whole rows on the host, alike on every rank of the cp group. Labels are shifted
            already (shift_labels): a shard does not hold its neighbour's next token.
            DOCUMENT_KEYS may tell documents: document_ids (or seq_idx) [B, S], seq_lens [B, N],
            cu_seqlens (or cu_seq_lens_q, cu_seq_lens_k) [N + 1] through all rows or [B, N + 1];
            they are read and go no further.
        layout: which tokens go to which rank; a class, of which the batch gets an instance.
        model: whose mixers read the metadata; None makes none.
        documents: of every row; None reads them off the batch: a document key, position_ids
            that restart, and otherwise each row is one document. What padding_mask marks is in
            none. What the batch says twice it says alike.
        fields: how each key is sharded and padded. A key of WHOLE stays as it is.
        device: where the parts go; None leaves them where they are.
        balance_for: the mask whose work BlockBalanced balances; None for Causal().
        compare_ranks: whether the ranks of a cp and tp group first compare shape, documents and a
            hash of every key (0.4 ms for three keys of 128K tokens on one CPU core, and the
            exchange); what differs is named on all of them. They call this together.
    Returns:
        the local batch, with `padding_mask` (True: padding) if the batch had one or padding was
        added, and how it was sharded.
    Raises:
        ValueError: a key that no field names, rows of different lengths, documents, position ids
            and padding that contradict each other (by row and token), or labels in padding.
        TypeError: a value that is no tensor.
    """
    return shard_rows(
        lambda: Rows.of(batch, fields, documents),
        mesh,
        layout,
        model=model,
        device=device,
        balance_for=balance_for,
        compare_ranks=compare_ranks,
    )


def shard_rows(
    prepare: "Callable[[], Rows]",
    mesh: ParallelMesh,
    layout: type[SequenceLayout] = HeadTail,
    *,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    balance_for: Mask | None = None,
    compare_ranks: bool = True,
    axes: Sequence[DeviceMesh] = (),
) -> tuple[dict[str, Tensor], ShardedBatch]:
    """`shard_batch` for a caller whose own preparation may refuse a batch on one rank only.

    Args:
        prepare: makes the rows; what it raises, the other ranks hear of.
        axes: of ranks that read the same rows, besides those of the mesh.
    """
    compared = (mesh.cp, mesh.tp, *axes) if compare_ranks else ()

    def prepared() -> Rows:
        _check_layout(layout)
        return prepare()

    rows = prepared_alike(compared, prepared, Rows.contents)
    num_shards, seq_len = mesh.size("cp"), rows.documents.seq_len
    padded_len = -(-seq_len // layout.multiple(num_shards)) * layout.multiple(num_shards)
    documents = rows.documents.padded(padded_len)
    coords = _coords({**rows.for_masks, **rows.tokens}, documents, seq_len)
    balanced = balance_for or Causal()
    # Called by the layouts that read it: intervals of long rows take milliseconds.
    batch_layout = layout.for_batch(documents, num_shards, work=lambda: balanced.work(coords))

    metadata = collect_metadata(nn.Module() if model is None else model, coords, batch_layout)
    metadata = metadata if device is None else metadata.to(device)
    sharded = ShardedBatch(batch_layout, documents, coords, metadata, seq_len, mesh)
    tokens = dict(rows.tokens)
    if padded_len > seq_len:
        tokens.setdefault("padding_mask", torch.zeros(documents.batch, seq_len, dtype=torch.bool))
    local = {}
    for key, x in tokens.items():
        rule = rows.fields[key]
        if rule is not None:
            x = _part(x, batch_layout, mesh.rank("cp"), dim=rule.seq_dim % x.ndim, pad=rule.pad)
        local[key] = x if device is None else x.to(device, non_blocking=True)
    return local, sharded


@dataclass(frozen=True)
class Rows:
    """Whole rows as a batch says them, held against each other."""

    tokens: Mapping[str, Tensor]  # what is cut
    for_masks: Mapping[str, Tensor]
    documents: Documents
    fields: Mapping[str, TokenField | None]

    @classmethod
    def of(
        cls,
        batch: Mapping[str, Any],
        fields: Mapping[str, TokenField | None],
        documents: Documents | None,
    ) -> "Rows":
        """Read a batch as `shard_batch` takes it."""
        check_batch("A batch", batch)
        # A key that `fields` names is a key of the model, whatever it is called.
        keys = [key for key in batch if key in DOCUMENT_KEYS and key not in fields]
        said = {key: batch[key] for key in (*keys, "position_ids", "padding_mask") if key in batch}
        batch = {key: x for key, x in batch.items() if key not in keys}
        if batch.get("padding_mask", 0) is None:
            del batch["padding_mask"]
        _check_keys(batch, fields)
        tokens = {key: x for key, x in batch.items() if key not in MASK_FIELDS}
        rows, seq_len = _shape(tokens, fields)
        documents = documents_of_batch(said, rows, seq_len, documents=documents)
        padding = read_padding_mask(said.get("padding_mask"), rows, seq_len)
        if padding is not None:
            tokens["padding_mask"] = padding.to(batch["padding_mask"].device)
        check_labels(tokens, documents, padding)
        for_masks = {key: batch[key] for key in MASK_FIELDS if key in batch}
        return cls(tokens, for_masks, documents, fields)

    def contents(self) -> tuple[Mapping[str, Tensor], Documents]:
        """What ranks compare."""
        keys = {key: x for key, x in self.tokens.items() if self.fields[key] is not None}
        return {**keys, **self.for_masks}, self.documents


def pad_end(x: Tensor, missing: int, pad: int | float | bool, *, dim: int) -> Tensor:
    """Lengthen dim by `missing` entries of one value, at its end; x itself if none is missing."""
    if missing <= 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat((x, x.new_full(shape, pad)), dim=dim)


def _check_layout(layout: type[SequenceLayout]) -> None:
    if not isinstance(layout, type) or not issubclass(layout, SequenceLayout):
        raise TypeError(
            f"A batch is cut by a class of layouts, of which it gets an instance, got "
            f"layout={layout!r}: give HeadTail, say."
        )


def _check_keys(batch: Mapping[str, Tensor], fields: Mapping[str, TokenField | None]) -> None:
    unknown = [key for key in batch if key not in fields and key not in MASK_FIELDS]
    if unknown:
        raise ValueError(
            f"A batch holds keys whose sequence dim is known, got {unknown}: add them to `fields` "
            f"(WHOLE for a key that has none)."
        )
    other = {key: type(x).__name__ for key, x in batch.items() if not isinstance(x, Tensor)}
    if other:
        raise TypeError(f"A batch holds tensors, got {other}: leave out keys that have none.")


def _shape(batch: Mapping[str, Tensor], fields: Mapping[str, TokenField | None]) -> tuple[int, int]:
    """(rows, tokens per row), the same for every key."""
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


def _coords(batch: Mapping[str, Tensor], documents: Documents, seq_len: int) -> Coords:
    """What masks and mixers read of the whole rows, padded as the documents are."""
    read = {key: batch[key] for key in MASK_FIELDS if key in batch}
    if "block" not in read and "mm_token_type_ids" in batch:
        read["block"] = vision_blocks(batch["mm_token_type_ids"].cpu())
    missing = documents.seq_len - seq_len
    for key, x in read.items():
        if x.shape[1:] != (seq_len,):
            raise ValueError(
                f"Masks read one {key} per token, got {key}.shape={tuple(x.shape)} for rows of "
                f"{seq_len}: give [B, S]."
            )
        read[key] = pad_end(x.to(torch.int64), missing, MASK_FIELDS[key], dim=1)
    if "position_ids" in batch:
        read["position_ids"] = pad_end(batch["position_ids"].cpu(), missing, 0, dim=-1)
    return Coords.of(documents, **read)


def _part(
    x: Tensor, layout: SequenceLayout, rank: int, *, dim: int, pad: int | float | bool | Fill
) -> Tensor:
    """A rank's part of rows that may be shorter than their layout; the whole is never padded."""
    last = x.shape[dim] - 1
    if last + 1 == layout.seq_len:
        return layout.shard(x, rank, dim=dim)
    token_index = layout.token_indices(rank).to(x.device)
    part = x.index_select(dim, token_index.clamp(max=last))
    beyond = (token_index - last).clamp(min=0).view([-1 if d == dim else 1 for d in range(x.ndim)])
    if isinstance(pad, Fill):
        return part + beyond.to(x.dtype)
    return part.masked_fill(beyond > 0, pad)

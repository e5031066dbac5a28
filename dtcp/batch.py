"""Shard a batch: what all ranks of a cp group read alike becomes each rank's part of it.

Runs on the host, once per batch: the ranks of a cp and tp group read the same rows, so each picks
its own tokens. Nothing is sent but a few numbers by which they find out if one of them reads other
rows (`dtcp.distributed.same_rows`). What a batch says is read in `dtcp.rows`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed import relayout
from dtcp.distributed.mesh import ParallelMesh
from dtcp.distributed.replicated_loss import (
    gather_for_replicated_loss,
    sum_for_replicated_loss,
)
from dtcp.distributed.same_rows import RowHashes, prepared_alike
from dtcp.metadata import BatchMetadata
from dtcp.mixer import MixerKinds
from dtcp.row_parts import padded_coords, part_of_rows, real_tokens
from dtcp.rows import DEFAULT_FIELDS, Rows, TokenField, pad_end
from dtcp.sequence.arguments import check_dim, check_ints, check_kind
from dtcp.sequence.buckets import Buckets
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail, SequenceLayout
from dtcp.sequence.mask_work import MaskWork
from dtcp.sequence.masks import Mask
from dtcp.sequence.memory import Memory
from dtcp.sequence.row_layouts import layout_of_batch, pieces_digest
from dtcp.softmax.model_masks import masks_of


@dataclass(frozen=True)
class ShardedBatch:
    """How a batch was sharded, and how to shard or gather anything else that goes with it.

    Args:
        attn_metadata: what the model's mixers read of this batch; on the device.
        unpadded_len: tokens per row before padding.
        unpadded_rows: rows before padding.
    """

    layout: SequenceLayout
    documents: Documents
    coords: Coords
    attn_metadata: BatchMetadata
    unpadded_len: int
    unpadded_rows: int
    mesh: ParallelMesh

    @property
    def padding_fraction(self) -> float:
        """The share of tokens that this batch was padded by: from 0 to below 1.

        What it costs: every layer computes them as it does tokens, attention but for their scores.
        """
        whole = self.documents.batch * self.documents.seq_len
        return 1 - self.unpadded_rows * self.unpadded_len / whole

    def shard(self, x: Tensor, *, dim: int = 1, pad: int | float | bool = 0) -> Tensor:
        """This rank's part of a token-aligned tensor that every rank of the cp group holds.

        Args:
            x: unpadded_len or seq_len tokens in dim, in the order of the row; of a batch that was
                padded by rows its dim 0 is the rows, padded or not.
        """
        check_dim("A ShardedBatch", x, dim)
        if x.shape[dim] not in (self.unpadded_len, self.layout.seq_len):
            raise ValueError(
                f"A ShardedBatch shards what goes with its rows of {self.unpadded_len} tokens "
                f"({self.layout.seq_len} padded), got x.shape={tuple(x.shape)}, dim={dim}: name "
                f"the sequence's dim, or use the ShardedBatch of that tensor's batch."
            )
        if self._has_rows(x, dim) and x.shape[0] == self.unpadded_rows:
            x = pad_end(x, self.documents.batch - self.unpadded_rows, pad, dim=0)
        return part_of_rows(x, self.layout, self.mesh.rank("cp"), dim=dim % x.ndim, pad=pad)

    def gather(self, x: Tensor, *, dim: int = 1, replicated_loss: bool = False) -> Tensor:
        """The parts of all ranks in the order of the row, padding removed; differentiable.

        Rows that were added as padding are removed from dim 0.

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
            gather = gather_for_replicated_loss if replicated_loss else relayout.gather
            whole = gather(x, self.layout, self.mesh.cp, dim=dim % x.ndim)
        if self._has_rows(x, dim):
            whole = whole.narrow(0, 0, self.unpadded_rows)
        return whole.narrow(dim, 0, self.unpadded_len)

    def _has_rows(self, x: Tensor, dim: int) -> bool:
        """Whether dim 0 of x are rows some of which are padding."""
        rows = (self.unpadded_rows, self.documents.batch)
        if rows[0] == rows[1] or dim % x.ndim == 0:
            return False
        if x.shape[0] not in rows:
            raise ValueError(
                f"Of a batch padded from {rows[0]} rows to {rows[1]} dim 0 are the rows, got "
                f"x.shape={tuple(x.shape)}, dim={dim}: move them there."
            )
        return True

    def sum_by_document(self, x: Tensor) -> Tensor:
        """Sum a number of each token over every document, on all ranks alike; differentiable.

        Of token_log_probs it gives the log-probability of each document (or of an answer, where
        the tokens of its question have the label -100). Every rank of the cp group computes one
        and the same loss from the sums, so its gradient is not summed over them: each rank gets
        that of its own tokens, and gradients of weights are to be summed over cp.

        Args:
            x: [B, L], of this rank's tokens.
        Returns:
            [B, N], N the most documents that a row has; 0 for one that a row does not have.
        Raises:
            ValueError: another shape.

        Traffic per rank: (n - 1) * B * N numbers, and none back.
        """
        rows, num_shards = self.documents.batch, self.layout.num_shards
        if x.shape != (rows, self.layout.shard_len):
            raise ValueError(
                f"A ShardedBatch sums a number of each token, got x.shape={tuple(x.shape)}: give "
                f"[B, L] = {(rows, self.layout.shard_len)}."
            )
        token_index = self.layout.token_indices(self.mesh.rank("cp") if num_shards > 1 else 0)
        document = self.coords.document[:, token_index].to(x.device)
        count = max(len(lengths) for lengths in self.documents.lengths)
        # What is in no document is summed in a place that is cut off.
        place = document.where(document >= 0, count)
        sums = x.new_zeros(rows, count + 1).scatter_add(1, place, x)[:, :count]
        return sums if self.mesh.cp is None else sum_for_replicated_loss(sums, self.mesh.cp)


@dataclass(frozen=True)
class PreparedBatch:
    """A rank's part of a batch, on the host, with what its mixers read: all but an exchange.

    Args:
        local: this rank's part of each key.
        rows: what the ranks of a cp and tp group compare before it is used.
    """

    local: Mapping[str, Tensor]
    sharded: ShardedBatch
    rows: Rows

    @cached_property
    def hashes(self) -> RowHashes:
        """What ranks compare: their rows, and what they do with them."""
        layout, metadata = self.sharded.layout, self.sharded.attn_metadata
        plan = " ".join(sorted(key.kinds for key in metadata))
        cut = f"{layout.kind.__name__} {layout.seq_len} {layout.num_shards} {pieces_digest(layout)}"
        return RowHashes.of(*self.rows.contents(), use=f"{cut} {plan}")

    def to(self, device: torch.device | str | None) -> tuple[dict[str, Tensor], ShardedBatch]:
        """As `shard_batch` returns it; None leaves it where it is."""
        if device is None:
            return dict(self.local), self.sharded
        local = {key: x.to(device, non_blocking=True) for key, x in self.local.items()}
        metadata = self.sharded.attn_metadata.to(device)
        return local, replace(self.sharded, attn_metadata=metadata)


def shard_batch(
    batch: Mapping[str, Any],
    mesh: ParallelMesh,
    layout: type[SequenceLayout] = HeadTail,
    *,
    model: nn.Module | None = None,
    documents: Documents | None = None,
    fields: Mapping[str, TokenField | None] = DEFAULT_FIELDS,
    device: torch.device | str | None = None,
    balance_for: Mask | Mapping[Mask, int] | None = None,
    compare_ranks: bool = True,
    buckets: Buckets | None = None,
    memory: ShardedBatch | None = None,
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
        balance_for: the mask whose work BlockBalanced and DocumentBalanced balance, or several,
            with the number of layers of each; None for those of the model, or Causal(). Other
            layouts take none.
        compare_ranks: whether the ranks of a cp and tp group first compare shape, documents,
            layout, plan and a hash of every key (0.2 ms for four keys of 128K tokens on one CPU
            core, and the exchange); what differs is named on all of them. They call this together.
        buckets: sizes that the batch is padded to, so that a compiled model has few graphs; None
            pads no further than the layout needs. ShardedBatch.padding_fraction says what it cost.
        memory: how the sequence was sharded that the model's cross attention reads (an encoder's):
            a batch of as many rows, and in each row as many documents.
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
        buckets=buckets,
        memory=memory,
    )


def shard_rows(
    prepare: "Callable[[], Rows]",
    mesh: ParallelMesh,
    layout: type[SequenceLayout] = HeadTail,
    *,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    balance_for: Mask | Mapping[Mask, int] | None = None,
    compare_ranks: bool = True,
    buckets: Buckets | None = None,
    axes: Sequence[DeviceMesh] = (),
    memory: ShardedBatch | None = None,
) -> tuple[dict[str, Tensor], ShardedBatch]:
    """`shard_batch` for a caller whose own preparation may refuse a batch on one rank only.

    Args:
        prepare: makes the rows; what it raises, the other ranks hear of.
        axes: of ranks that read the same rows, besides those of the mesh.
    """

    def prepared() -> PreparedBatch:
        cut = _Cut(layout, model, balance_for, buckets, memory)
        return cut.prepared(prepare(), mesh)

    return shard_prepared(prepared, mesh, device=device, compare_ranks=compare_ranks, axes=axes)


def shard_prepared(
    prepared: "Callable[[], PreparedBatch]",
    mesh: ParallelMesh,
    *,
    device: torch.device | str | None = None,
    compare_ranks: bool = True,
    axes: Sequence[DeviceMesh] = (),
) -> tuple[dict[str, Tensor], ShardedBatch]:
    """The rest of `shard_batch`, once a batch has been prepared, maybe in a thread.

    The ranks of a cp and tp group call this together: it is all that they exchange of a batch.

    Args:
        prepared: gives the batch of `prepare_batch`; what it raises, the other ranks hear of.
        device, compare_ranks: as in `shard_batch`.
        axes: of ranks that read the same rows, besides those of the mesh.
    """
    check_kind("A batch", ParallelMesh, mesh=mesh)
    compared = (mesh.cp, mesh.tp, *axes) if compare_ranks else ()
    return prepared_alike(compared, prepared, lambda batch: batch.hashes).to(device)


def prepare_batch(
    batch: Mapping[str, Any],
    mesh: ParallelMesh,
    layout: type[SequenceLayout] = HeadTail,
    *,
    model: nn.Module | None = None,
    documents: Documents | None = None,
    fields: Mapping[str, TokenField | None] = DEFAULT_FIELDS,
    balance_for: Mask | Mapping[Mask, int] | None = None,
    buckets: Buckets | None = None,
    memory: ShardedBatch | None = None,
) -> PreparedBatch:
    """All of `shard_batch` that needs no other rank and no device; for a thread, ahead of its use.

    Args and errors are those of `shard_batch`; `shard_prepared` does the rest.
    """
    return prepare_rows(
        lambda: Rows.of(batch, fields, documents),
        mesh,
        layout,
        model=model,
        balance_for=balance_for,
        buckets=buckets,
        memory=memory,
    )


def prepare_rows(
    prepare: "Callable[[], Rows]",
    mesh: ParallelMesh,
    layout: type[SequenceLayout] = HeadTail,
    *,
    model: nn.Module | None = None,
    balance_for: Mask | Mapping[Mask, int] | None = None,
    buckets: Buckets | None = None,
    memory: ShardedBatch | None = None,
) -> PreparedBatch:
    """`prepare_batch` for a caller who makes the rows, as for `shard_rows`."""
    check_kind("A batch", ParallelMesh, mesh=mesh)
    cut = _Cut(layout, model, balance_for, buckets, memory)
    prepared = cut.prepared(prepare(), mesh)
    if mesh.cp is not None or mesh.tp is not None:
        prepared.hashes  # noqa: B018  # worked out here, not where the batch is used
    return prepared


@dataclass(frozen=True, eq=False)
class _Cut:
    """How rows are cut: what of the arguments of `shard_batch` all ranks give alike."""

    layout: type[SequenceLayout]
    model: nn.Module | None
    balance_for: Mask | Mapping[Mask, int] | None
    buckets: Buckets | None
    memory: ShardedBatch | None

    def __post_init__(self) -> None:
        if not isinstance(self.layout, type) or not issubclass(self.layout, SequenceLayout):
            raise TypeError(
                f"A batch is cut by a class of layouts, of which it gets an instance, got "
                f"layout={self.layout!r}: give HeadTail, say."
            )
        nothing, balance_for = type(None), self.balance_for
        check_kind("A batch", (Buckets, nothing), buckets=self.buckets)
        check_kind("A batch", (nn.Module, nothing), model=self.model)
        check_kind("A batch", (Mask, Mapping, nothing), balance_for=balance_for)
        check_kind("A batch", (ShardedBatch, nothing), memory=self.memory)
        if balance_for is not None and not self.layout.balances_work:
            kind = self.layout.__name__
            raise ValueError(f"{kind} balances no work, got {balance_for=}: use DocumentBalanced.")
        for mask, layers in balance_for.items() if isinstance(balance_for, Mapping) else ():
            check_kind("Work to balance", (Mask,), mask=mask)
            check_ints("Work to balance", least=1, layers=layers)

    def prepared(self, rows: Rows, mesh: ParallelMesh) -> PreparedBatch:
        said, unpadded_rows, seq_len = rows, rows.documents.batch, rows.documents.seq_len
        num_shards, rank = mesh.size("cp"), mesh.rank("cp")
        if self.buckets is not None:
            rows = rows.padded(self.buckets.padded_rows(unpadded_rows))
        documents = rows.documents.padded(self.padded_len(seq_len, num_shards))
        other = None if self.memory is None else Memory(self.memory.documents, self.memory.layout)
        coords = padded_coords(rows, documents, other)
        # Called by the layouts that read it: intervals of long rows take milliseconds.
        kinds = MixerKinds.of(nn.Module() if self.model is None else self.model)
        masks = masks_of(kinds) if self.balance_for is None else self.balance_for
        layout = layout_of_batch(self.layout, documents, num_shards, MaskWork.under(masks, coords))
        metadata = kinds.metadata(coords, layout, real=real_tokens(documents, layout, rank))
        sharded = ShardedBatch(layout, documents, coords, metadata, seq_len, unpadded_rows, mesh)
        tokens = dict(rows.tokens)
        if documents.seq_len > seq_len:
            no_padding = torch.zeros(documents.batch, seq_len, dtype=torch.bool)
            tokens.setdefault("padding_mask", no_padding)
        local = {}
        for key, x in tokens.items():
            rule = rows.rule(key)
            if rule is not None:
                dims = {"dim": rule.seq_dim % x.ndim, "rows_dim": rule.rows_dim % x.ndim}
                x = part_of_rows(x, layout, rank, **dims, pad=rule.pad)
            local[key] = x
        return PreparedBatch(local, sharded, said)

    def padded_len(self, seq_len: int, num_shards: int) -> int:
        """Tokens of a row: what the buckets have for it, and a multiple that the layout cuts."""
        wanted = seq_len if self.buckets is None else self.buckets.padded_tokens(seq_len)
        multiple = self.layout.multiple(num_shards)
        return -(-wanted // multiple) * multiple

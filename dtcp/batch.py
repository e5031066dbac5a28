"""Shard a batch: what all ranks of a cp group read alike becomes each rank's part of it.

Runs on the host, once per batch: the ranks of a cp and tp group read the same rows, so each picks
its own tokens. Nothing is sent but a few numbers by which they find out if one of them reads other
rows (`dtcp.distributed.same_rows`). What a batch says is read in `dtcp.rows`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.gradient_sums import warn_of_ddp
from dtcp.distributed.mesh import ParallelMesh, check_parallel_mesh
from dtcp.distributed.same_rows import RowHashes, prepared_alike
from dtcp.distributed.same_weights import warn_of_other_weights
from dtcp.labels import check_shifted
from dtcp.mixer_metadata import MixerKinds
from dtcp.mixer_ranks import check_memory_ranks, check_ranks
from dtcp.row_parts import padded_coords, part_of_rows, real_tokens
from dtcp.rows import DEFAULT_FIELDS, Rows, TokenField
from dtcp.sequence.arguments import check_ints, check_kind
from dtcp.sequence.buckets import Buckets
from dtcp.sequence.documents import Documents
from dtcp.sequence.host import on_device, on_host
from dtcp.sequence.layout import HeadTail, SequenceLayout
from dtcp.sequence.mask_work import MaskWork
from dtcp.sequence.masks import Mask
from dtcp.sequence.memory import Memory
from dtcp.sequence.row_layouts import layout_of_batch, pieces_digest
from dtcp.sharded_batch import ShardedBatch
from dtcp.softmax.model_masks import attends_both_ways, masks_of
from dtcp.token_dropout import TokenDropout, any_drops, drawn_seed, token_keys


@dataclass(frozen=True)
class PreparedBatch:
    """A rank's part of a batch, on the host, with what its mixers read: all but an exchange.

    Args:
        local: this rank's part of each key.
        rows: what the ranks of a cp and tp group compare before it is used.
        model: whose weights ranks of cp compare, at some of its batches.
        dropouts: those of its modules that drop by token.
    """

    local: Mapping[str, Tensor]
    sharded: ShardedBatch
    rows: Rows
    model: nn.Module | None = None
    dropouts: tuple[TokenDropout, ...] = ()

    @cached_property
    def hashes(self) -> RowHashes:
        """What ranks compare: their rows, and what they do with them."""
        layout, metadata = self.sharded.layout, self.sharded.attn_metadata
        mixers = " ".join(sorted(key.kinds for key in metadata))
        cut = f"{layout.kind.__name__} {layout.seq_len} {layout.num_shards} {pieces_digest(layout)}"
        return RowHashes.of(*self.rows.contents(), use=cut, mixers=mixers)

    def hashed(self) -> Self:
        """Itself, with what ranks compare worked out here, not where the batch is used."""
        mesh = self.sharded.mesh
        if not mesh.cp is mesh.tp is mesh.pp is None:
            self.hashes  # noqa: B018
        return self

    @on_host
    def with_token_keys(self, axes: Sequence[DeviceMesh | None]) -> Self:
        """Itself, with what its model's TokenDropouts read: drawn where the batch is used.

        Args:
            axes: whose ranks read the same rows; all of them call this if one does.
        """
        # In evaluation, too, ranks hear of one that drops.
        seed = drawn_seed(axes, drops=any_drops(self.dropouts)) if self.dropouts else None
        if seed is None:
            return self
        sharded, mesh = self.sharded, self.sharded.mesh
        batch, seq_len = sharded.documents.batch, sharded.documents.seq_len
        rows = mesh.rank("batch") * batch + torch.arange(batch)
        whole = torch.arange(seq_len).expand(batch, -1)
        tokens = part_of_rows(whole, sharded.layout, mesh.rank("cp"), dim=1, pad=0)
        metadata = sharded.attn_metadata.with_token_keys(token_keys(seed, rows, tokens))
        return replace(self, sharded=replace(sharded, attn_metadata=metadata))

    def to(self, device: torch.device | str | None) -> tuple[dict[str, Tensor], ShardedBatch]:
        """As `shard_batch` returns it; None leaves it where it is."""
        if device is None:
            return dict(self.local), self.sharded
        local = {key: on_device(x, device) for key, x in self.local.items()}
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
        model: whose mixers read the metadata; None makes none. Under pp the stages of this rank, in
            an nn.ModuleList if there are several.
        documents: of every row; None reads them off the batch: a document key, position_ids
            that restart, and otherwise each row is one document. What padding_mask marks is in
            none. What the batch says twice it says alike.
        fields: how each key is sharded and padded. A key of WHOLE stays as it is.
        device: where the parts go; None leaves them where they are.
        balance_for: the mask whose work BlockBalanced and DocumentBalanced balance, or several,
            with the number of layers of each; None for those of the model, or Causal(). Other
            layouts take none.
        compare_ranks: whether the ranks of a cp, tp and pp group first compare shape, documents,
            layout, plan and a hash of every key (0.2 ms for four keys of 128K tokens on one CPU
            core, and the exchange); what differs is named on all of them. They call this together.
            With a `model`, at its batches 1, 2, 4, 8 .., ranks of cp compare its weights and warn.
        buckets: sizes that the batch is padded to, so that a compiled model has few graphs; None
            pads no further than the layout needs. ShardedBatch.padding_fraction says what it cost.
        memory: how the sequence was sharded that the model's cross attention reads (an encoder's):
            a batch of as many rows, and in each row as many documents.
    Returns:
        the local batch, with `padding_mask` (True: padding) if the batch had one or padding was
        added, and how it was sharded; `attn_metadata.real` marks what is no padding in any batch.
    Raises:
        ValueError: a key that no field names, rows of different lengths, documents, position ids
            and padding that contradict each other (by row and token), or labels in padding; labels
            that are input_ids wherever there is one, since nobody has shifted them. Where a token
            is its own target, and no `model` is given that attends to both sides, give them under
            another key, of a TokenField in `fields`.
        TypeError: a value that is no tensor.
    """

    def prepared() -> PreparedBatch:
        cut = BatchCut(
            mesh, layout, model=model, balance_for=balance_for, buckets=buckets, memory=memory
        )
        return cut.prepared(_rows_of(batch, fields, documents, model))

    return shard_prepared(prepared, mesh, device=device, compare_ranks=compare_ranks)


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
        prepared: gives the batch of `prepare_batch`, or of a `BatchCut`; what it raises, the other
            ranks hear of.
        device, compare_ranks: as in `shard_batch`.
        axes: of ranks that read the same rows, besides those of the mesh.
    """
    check_parallel_mesh("A batch", mesh)
    compared = (mesh.cp, mesh.tp, *axes) if compare_ranks else ()
    stages = mesh.pp if compare_ranks else None
    made = prepared_alike(compared, prepared, lambda batch: batch.hashes, stages=stages)
    if compare_ranks and made.model is not None:
        warn_of_other_weights(made.model, mesh.cp)
    return made.with_token_keys((mesh.cp, mesh.tp, *axes)).to(device)


@on_host
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
    cut = BatchCut(
        mesh, layout, model=model, balance_for=balance_for, buckets=buckets, memory=memory
    )
    return cut.prepared(_rows_of(batch, fields, documents, model)).hashed()


def _rows_of(
    batch: Mapping[str, Any],
    fields: Mapping[str, TokenField | None],
    documents: Documents | None,
    model: nn.Module | None,
) -> Rows:
    rows = Rows.of(batch, fields, documents)
    # A token that sees what comes after it may well be its own target.
    both_ways = model is not None and attends_both_ways(MixerKinds.of(model))
    if fields.get("labels") is not None and not both_ways:
        check_shifted(rows.tokens)
    return rows


@dataclass(frozen=True, eq=False)
class BatchCut:
    """How a batch is cut: what of the arguments of `shard_batch` all ranks give alike."""

    mesh: ParallelMesh
    layout: type[SequenceLayout] = HeadTail
    _: KW_ONLY
    model: nn.Module | None = None
    balance_for: Mask | Mapping[Mask, int] | None = None
    buckets: Buckets | None = None
    memory: ShardedBatch | None = None

    def __post_init__(self) -> None:
        check_parallel_mesh("A batch", self.mesh)
        warn_of_ddp(self.model)
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

    @on_host
    def prepared(self, rows: Rows) -> PreparedBatch:
        """This rank's part of the rows, and what its mixers read; needs no other rank."""
        kinds = MixerKinds.of(nn.Module() if self.model is None else self.model)
        for check in kinds.row_checks:
            check(rows)
        said, unpadded_rows, seq_len = rows, rows.documents.batch, rows.documents.seq_len
        mesh, num_shards, rank = self.mesh, self.mesh.size("cp"), self.mesh.rank("cp")
        if self.buckets is not None:
            rows = rows.padded(self.buckets.padded_rows(unpadded_rows))
        documents = rows.documents.padded(self.padded_len(seq_len, num_shards))
        other = None
        if self.memory is not None:
            check_memory_ranks(self.memory.mesh.cp, mesh.cp)
            other = Memory(self.memory.documents, self.memory.layout)
        coords = padded_coords(rows, documents, other)
        check_ranks((mixer for mixer, _ in kinds.mixers), mesh.cp)
        masks = masks_of(kinds) if self.balance_for is None else self.balance_for
        # Called by the layouts that read it: intervals of long rows take milliseconds.
        layout = layout_of_batch(self.layout, documents, num_shards, MaskWork.under(masks, coords))
        real, last = real_tokens(documents, layout, rank), said.last_position
        metadata = kinds.metadata(coords, layout, real=real, last_position=last)
        sharded = ShardedBatch(layout, documents, coords, metadata, seq_len, unpadded_rows, mesh)
        tokens = dict(rows.tokens)
        if documents.seq_len > seq_len:
            tokens.setdefault("padding_mask", coords.document[:, :seq_len] < 0)
        local = {}
        for key, x in tokens.items():
            rule = rows.rule(key)
            if rule is not None:
                dims = {"dim": rule.seq_dim % x.ndim, "rows_dim": rule.rows_dim % x.ndim}
                x = part_of_rows(x, layout, rank, **dims, pad=rule.pad)
            local[key] = x
        return PreparedBatch(local, sharded, said, self.model, kinds.dropouts)

    def padded_len(self, seq_len: int, num_shards: int) -> int:
        """Tokens of a row: what the buckets have for it, and a multiple that the layout cuts."""
        wanted = seq_len if self.buckets is None else self.buckets.padded_tokens(seq_len)
        multiple = self.layout.multiple(num_shards)
        return -(-wanted // multiple) * multiple

"""The rows of a batch: what each key holds, and all that the batch says held against itself.

A table says where the sequence of each key is and what its padding is made of. A key that the
table does not name is refused: a tensor sharded by no rule, or left whole beside sharded ones,
would be wrong without a word.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dtcp.distributed.same_rows import digests
from dtcp.labels import IGNORED, check_labels
from dtcp.sequence.arguments import (
    WHOLE_NUMBERS,
    check_batch,
    check_ints,
    check_kind,
    check_tensor,
)
from dtcp.sequence.batch_documents import DOCUMENT_KEYS, documents_and_counted, read_padding_mask
from dtcp.sequence.block_runs import TokenTypes
from dtcp.sequence.documents import Documents


class Fill(Enum):
    """A pad rule that is not a constant."""

    COUNT_ON = "each padding token continues from the one before it"


@dataclass(frozen=True)
class TokenField:
    """How one key of a batch is sharded and padded.

    Args:
        seq_dim: the dim that is the sequence; counted from the end if negative.
        pad: what padding tokens hold: a constant, or Fill.COUNT_ON.
        rows_dim: the dim of the rows; the one of the sequence if there are none. One row stands
            for all.
    """

    seq_dim: int
    pad: int | float | bool | Fill
    rows_dim: int = 0

    def __post_init__(self) -> None:
        check_ints("A TokenField", seq_dim=self.seq_dim, rows_dim=self.rows_dim)
        check_kind("A TokenField", (int, float, bool, Fill), pad=self.pad)


WHOLE = None
"""A key that has no sequence dim and goes to every rank as it is."""

DEFAULT_FIELDS: Mapping[str, TokenField | None] = {
    "input_ids": TokenField(1, 0),
    "labels": TokenField(1, IGNORED),
    "loss_mask": TokenField(1, 0),
    "inputs_embeds": TokenField(1, 0.0),
    "position_ids": TokenField(-1, Fill.COUNT_ON, rows_dim=-2),
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
class Rows:
    """Whole rows as a batch says them, held against each other.

    Args:
        tokens: what is cut.
        counted: of each row, whether position_ids are known to count its documents' tokens from 0.
        last_given: the largest position as the batch had it, where those of `tokens` were made.
    """

    tokens: Mapping[str, Tensor]
    for_masks: Mapping[str, Tensor]
    documents: Documents
    fields: Mapping[str, TokenField | None]
    counted: tuple[bool, ...]
    last_given: int | None = None

    @classmethod
    def of(
        cls,
        batch: Mapping[str, Any],
        fields: Mapping[str, TokenField | None],
        documents: Documents | None,
    ) -> "Rows":
        """Read a batch as `shard_batch` takes it."""
        check_batch("A batch", batch)
        check_kind("A batch", Mapping, fields=fields)
        # A key that `fields` names is a key of the model, whatever it is called.
        keys = [key for key in batch if key in DOCUMENT_KEYS and key not in fields]
        said = {
            key: batch[key]
            for key in (*keys, "position_ids", "padding_mask", "block")
            if key in batch
        }
        batch = {key: x for key, x in batch.items() if key not in keys}
        if batch.get("padding_mask", 0) is None:
            del batch["padding_mask"]
        _check_keys(batch, fields)
        tokens = {key: x for key, x in batch.items() if key not in MASK_FIELDS}
        rows, seq_len = _shape(tokens, fields)
        for_masks = {key: batch[key] for key in MASK_FIELDS if key in batch}
        _check_for_masks(for_masks, rows, seq_len)
        padding = said["padding_mask"] = read_padding_mask(said.get("padding_mask"), rows, seq_len)
        documents, counted = documents_and_counted(said, rows, seq_len, documents=documents)
        if padding is not None:
            tokens["padding_mask"] = padding.to(batch["padding_mask"].device)
        if fields.get("labels", WHOLE) is not WHOLE:
            check_labels(tokens, documents, padding)
        return cls(tokens, for_masks, documents, fields, counted)

    @cached_property
    def image_types(self) -> TokenTypes | None:
        """The types of tokens whose images are the blocks of masks; None where these are given."""
        types = self.tokens.get("mm_token_type_ids")
        return None if types is None or "block" in self.for_masks else TokenTypes(types.cpu())

    @property
    def last_position(self) -> int | None:
        """The largest position of all rows; None without positions."""
        position_ids = self.tokens.get("position_ids")
        if self.last_given is not None or position_ids is None:
            return self.last_given
        return int(position_ids.max())

    def rule(self, key: str) -> TokenField | None:
        """How a key of `tokens` is sharded; a padding_mask that was made has a rule always."""
        return self.fields[key] if key in self.fields else DEFAULT_FIELDS[key]

    def padded(self, rows: int) -> "Rows":
        """The same rows, and rows of nothing but padding behind them.

        Raises:
            ValueError: a key whose rows are not where its field says.
        """
        own, seq_len = self.documents.batch, self.documents.seq_len
        if rows == own:
            return self
        tokens = dict(self.tokens)
        tokens.setdefault("padding_mask", self.documents.document() < 0)
        for key, x in tokens.items():
            rule = self.rule(key)
            if rule is not None:
                tokens[key] = _with_rows(key, x, rule, own, rows - own)
        for_masks = {
            key: pad_end(x, rows - own, MASK_FIELDS[key], dim=0)
            for key, x in self.for_masks.items()
        }
        documents = Documents((*self.documents.lengths, *[()] * (rows - own)), seq_len)
        counted = self.counted + (all(self.counted),) * (rows - own)
        return Rows(tokens, for_masks, documents, self.fields, counted, self.last_given)

    def contents(self) -> tuple[Mapping[str, Tensor], Documents]:
        """What ranks compare: keys, in the fewest numbers that tell of all that they hold."""
        rows = (self.documents.batch,)
        keys = {
            key: x
            for key, x in self.tokens.items()
            if self.fields[key] is not WHOLE or x.shape[:1] == rows
        }
        if any(self.counted):
            keys["position_ids"] = digests(self._uncounted())
        if self.image_types is not None and "mm_token_type_ids" in keys:
            of_rows = [[hash(runs)] for runs in self.image_types.runs()]
            keys["mm_token_type_ids"] = torch.tensor(of_rows)
        if self.last_given is not None:
            keys["last_position"] = torch.full((*rows, 1), self.last_given)
        return {**keys, **self.for_masks}, self.documents

    def _uncounted(self) -> list[Tensor]:
        """The position ids of each row that do not follow from its documents."""
        position_ids = self.tokens["position_ids"].expand(len(self.counted), -1)
        each = zip(position_ids, self.documents.lengths, self.counted, strict=True)
        return [row[sum(lengths) :] if counted else row for row, lengths, counted in each]


def _with_rows(key: str, x: Tensor, rule: TokenField, rows: int, missing: int) -> Tensor:
    """x with rows of padding behind its own."""
    seq_dim, dim = rule.seq_dim % x.ndim, rule.rows_dim % x.ndim
    if dim == seq_dim or x.shape[dim] == 1 < rows:
        return x
    if x.shape[dim] != rows:
        raise ValueError(
            f"A batch is padded by rows where each key has them, got {key}.shape="
            f"{tuple(x.shape)} with {rows} rows: name its dim in TokenField(.., rows_dim=..)."
        )
    if not isinstance(rule.pad, Fill):
        return pad_end(x, missing, rule.pad, dim=dim)
    steps = torch.arange(x.shape[seq_dim], device=x.device).to(x.dtype)
    steps = steps.view([-1 if d == seq_dim else 1 for d in range(x.ndim)])
    shape = [missing if d == dim else size for d, size in enumerate(x.shape)]
    return torch.cat((x, steps.expand(shape)), dim=dim)


def pad_end(x: Tensor, missing: int, pad: int | float | bool, *, dim: int) -> Tensor:
    """Lengthen dim by `missing` entries of one value, at its end; x itself if none is missing."""
    if missing <= 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat((x, x.new_full(shape, pad)), dim=dim)


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
    for key, x in batch.items():
        rule = fields.get(key)
        if rule is not None and not _holds(x.dtype, rule.pad):
            raise TypeError(
                f"Padding of a key is of its own dtype, got {key}.dtype={x.dtype}, which does not "
                f"hold pad={rule.pad!r}: convert it (labels to int64), or name another pad."
            )


def _check_for_masks(for_masks: Mapping[str, Tensor], rows: int, seq_len: int) -> None:
    for key, x in for_masks.items():
        if x.shape != (rows, seq_len):
            raise ValueError(
                f"Masks read one {key} per token, got {key}.shape={tuple(x.shape)} for {rows} rows "
                f"of {seq_len}: give [B, S]."
            )
        named: dict[str, Any] = {key: x}
        check_tensor("A mask", shape="[B, S]", dtypes=WHOLE_NUMBERS, **named)


def _holds(dtype: torch.dtype, pad: int | float | bool | Fill) -> bool:
    """Whether a tensor of this dtype can be filled with a value as it is."""
    if isinstance(pad, Fill) or dtype.is_floating_point or dtype.is_complex:
        return True
    if dtype == torch.bool:
        return pad in (0, 1)
    return torch.iinfo(dtype).min <= pad <= torch.iinfo(dtype).max and pad == int(pad)


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

"""Where tokens stand in their row: what masks, mixers and layouts read of a batch."""

from collections.abc import Hashable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dtcp.sequence.arguments import WHOLE_NUMBERS, check_tensor
from dtcp.sequence.block_runs import BlockRuns, TokenTypes, vision_blocks
from dtcp.sequence.documents import Documents, check_documents, check_token_positions
from dtcp.sequence.memory import Memory


@dataclass(frozen=True)
class Coords:
    """Where tokens stand: all that a mask may read. Each field [B, S], int64.

    Args:
        token_index: index in the row.
        document: index of the document in the row, -1 for padding.
        start, end: token index of the first and of the last token of the token's document.
        prefix: tokens at the start of the token's document that all of it sees (PrefixLM).
        block: id of the token's bidirectional block, -1 for none (BlockBidirectional).
        position_ids: what RoPE reads, where that is not the index in the document; one per token,
            or [axes, B, S]. No mask reads it.
        documents: of whole rows, where these are whole rows.
        memory: the sequence that cross attention reads, where these are whole rows.
        block_ends: [2, B, S], the first and the last token of the token's block in its document,
            where they are known already; 0 and -1 for none.
    """

    token_index: Tensor
    document: Tensor
    start: Tensor
    end: Tensor
    prefix: Tensor | None = None
    block: Tensor | None = None
    position_ids: Tensor | None = None
    documents: Documents | None = None
    memory: Memory | None = None
    block_ends: Tensor | None = None

    @classmethod
    def of(
        cls,
        documents: Documents,
        *,
        prefix: Tensor | None = None,
        block: Tensor | None = None,
        image_types: TokenTypes | None = None,
        position_ids: Tensor | None = None,
        memory: Memory | None = None,
    ) -> "Coords":
        """Coordinates of whole rows, in their order.

        Args:
            image_types: of the first tokens of each row; without `block`, images are the blocks.
        """
        check_documents("Coords are of the Documents of a batch", documents)
        if not documents.batch:
            raise ValueError(
                f"A batch has at least one row, got {documents}: give lengths for each, or leave "
                f"the batch out."
            )
        shape = (documents.batch, documents.seq_len)
        for name, extra in (("prefix", prefix), ("block", block)):
            if extra is None:
                continue
            named: dict[str, Any] = {name: extra}
            check_tensor("Coords", shape="[B, S]", dtypes=WHOLE_NUMBERS, **named)
            if extra.shape != shape:
                raise ValueError(
                    f"Coords take one {name} per token, got {name}.shape={tuple(extra.shape)}: "
                    f"pass [B, S] = {shape}, before sharding."
                )
        if position_ids is not None:
            check_token_positions(position_ids, documents.batch, documents.seq_len)
        if memory is not None:
            memory.check(documents)
        return _WholeRows(documents, prefix, block, position_ids, memory, image_types)

    @cached_property
    def memo(self) -> dict[Hashable, Any]:
        """What layouts and mixers both derive from these rows, by what it is derived from."""
        return {}

    def block_runs(self, row: int) -> BlockRuns | None:
        """The blocks of one of whole rows; None where the batch names none."""
        if self.block is None:
            return None
        bounds = np.cumsum([0, *documents_of(self).lengths[row]])
        return BlockRuns.of_blocks(self.block[row], bounds, row=row)

    def of_row(self, row: int) -> "Coords":
        """The coordinates of one whole row by itself, without position ids."""
        documents = Documents((documents_of(self).lengths[row],), self.seq_len)
        memory = None if self.memory is None else self.memory.row(row)
        # What is computed on first use stays that way.
        names = ("prefix", "block")
        read = {name: x[row : row + 1] for name in names if (x := vars(self).get(name)) is not None}
        types: TokenTypes | None = vars(self).get("image_types")
        types = None if types is None else types.row(row)
        return Coords.of(documents, memory=memory, image_types=types, **read)

    @property
    def rows(self) -> int:
        return self.token_index.shape[0]

    @property
    def seq_len(self) -> int:
        return self.token_index.shape[1]

    def select(self, token_index: Tensor) -> "Coords":
        """The coordinates of some tokens of each row: [L] to fields of [B, L]."""
        check_tensor("Coords", shape="[L]", dtypes=WHOLE_NUMBERS, token_index=token_index)
        if bool(((token_index < 0) | (token_index >= self.seq_len)).any()):
            raise ValueError(
                f"Coords are of the {self.seq_len} tokens of a row, got token_index from "
                f"{int(token_index.min())} to {int(token_index.max())}: give indices of tokens."
            )
        read = {each.name: getattr(self, each.name) for each in fields(Coords)}
        taken: dict[str, Any] = {
            name: x[..., token_index] for name, x in read.items() if isinstance(x, Tensor)
        }
        return Coords(**taken)


class _WholeRows(Coords):
    """Coordinates of whole rows; what follows from their documents is computed on first use."""

    documents: Documents
    image_types: TokenTypes | None

    def __init__(
        self,
        documents: Documents,
        prefix: Tensor | None,
        block: Tensor | None,
        position_ids: Tensor | None,
        memory: Memory | None,
        image_types: TokenTypes | None = None,
        block_ends: Tensor | None = None,
        **known: Tensor,
    ) -> None:
        others = {"prefix": prefix, "position_ids": position_ids, "block_ends": block_ends}
        vars(self).update(documents=documents, memory=memory, image_types=image_types, **others)
        if block is not None:
            vars(self)["block"] = block
        # dataclasses.replace hands over what was computed before.
        for name, x in known.items():
            if not torch.equal(x, getattr(self, name)):
                raise ValueError(
                    f"Coords of whole rows follow from their documents, got another {name} beside "
                    f"documents={documents}: give Coords(token_index, document, start, end)."
                )

    @property
    def rows(self) -> int:
        return self.documents.batch

    @property
    def seq_len(self) -> int:
        return self.documents.seq_len

    @cached_property
    def token_index(self) -> Tensor:
        return torch.arange(self.seq_len, device="cpu").expand(self.rows, -1)

    @cached_property
    def document(self) -> Tensor:
        return self.documents.document()

    @cached_property
    def start(self) -> Tensor:
        return self.documents.starts()

    @cached_property
    def end(self) -> Tensor:
        return self.documents.ends()

    @cached_property
    def block(self) -> Tensor | None:
        if self.image_types is None:
            return None
        types = self.image_types.types
        return pad(vision_blocks(types), (0, self.seq_len - types.shape[1]), value=-1)

    def block_runs(self, row: int) -> BlockRuns | None:
        if self.image_types is None or "block" in vars(self):
            return super().block_runs(row)
        bounds = np.cumsum([0, *self.documents.lengths[row]])
        return BlockRuns.of_images(self.image_types, bounds, row=row)


def documents_of(coords: Coords) -> Documents:
    """The documents that coordinates were made of."""
    if coords.documents is None:
        raise ValueError(
            "What crosses at cuts follows from the documents of whole rows, got coords "
            "without documents: take Coords.of(documents)."
        )
    return coords.documents


def tokens_in_documents(coords: Coords) -> Tensor:
    """Which tokens of whole rows are in a document, and not padding: [B, S] bool."""
    used = [sum(lengths) for lengths in documents_of(coords).lengths]
    return coords.token_index < torch.tensor(used, device="cpu")[:, None]

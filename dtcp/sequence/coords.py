"""Where tokens stand in their row: what masks, mixers and layouts read of a batch."""

from collections.abc import Hashable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dtcp.sequence.arguments import WHOLE_NUMBERS, check_tensor
from dtcp.sequence.documents import Documents, check_token_positions
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

    @classmethod
    def of(
        cls,
        documents: Documents,
        *,
        prefix: Tensor | None = None,
        block: Tensor | None = None,
        position_ids: Tensor | None = None,
        memory: Memory | None = None,
    ) -> "Coords":
        """Coordinates of whole rows, in their order."""
        if not isinstance(documents, Documents):
            raise TypeError(
                f"Coords are of the Documents of a batch, got documents of type "
                f"{type(documents).__name__}: give Documents(lengths, seq_len)."
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
        return _WholeRows(documents, prefix, block, position_ids, memory)

    @cached_property
    def found(self) -> dict[Hashable, Any]:
        """What layouts and mixers both work out of these rows, by what it is of."""
        return {}

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
    """Of whole rows; what follows from documents is worked out when it is asked for."""

    documents: Documents

    def __init__(
        self,
        documents: Documents,
        prefix: Tensor | None,
        block: Tensor | None,
        position_ids: Tensor | None,
        memory: Memory | None,
        **known: Tensor,
    ) -> None:
        given = {"prefix": prefix, "block": block, "position_ids": position_ids}
        vars(self).update(documents=documents, memory=memory, **given)
        # What is known already comes from dataclasses.replace.
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
        return torch.arange(self.seq_len).expand(self.rows, -1)

    @cached_property
    def document(self) -> Tensor:
        return self.documents.document()

    @cached_property
    def start(self) -> Tensor:
        return self.documents.starts()

    @cached_property
    def end(self) -> Tensor:
        return self.documents.ends()


def documents_of(coords: Coords) -> Documents:
    """The documents that coordinates were made of."""
    if coords.documents is None:
        raise ValueError(
            "What crosses at cuts follows from the documents of whole rows, got coords "
            "without documents: take Coords.of(documents)."
        )
    return coords.documents

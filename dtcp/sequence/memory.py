"""The other sequence that cross attention reads: its documents, and its layout on the ranks.

It has rows as the queries' batch has, and in each row as many documents: those of one row belong
together in their order, whatever their lengths. It is sharded by a layout of its own.

    queries  aaa bb             memory  AAAAA B          a sees all of A, b sees all of B
"""

from dataclasses import dataclass

from dtcp.sequence.arguments import check_kind
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout


@dataclass(frozen=True)
class Memory:
    """What is known of the other sequence of a batch.

    Args:
        documents: of its rows.
        layout: how these are sharded; None for whole rows on one device.
    """

    documents: Documents
    layout: SequenceLayout | None = None

    def check(self, documents: Documents) -> None:
        """Refuse a memory that does not go with the documents of the queries.

        Raises:
            ValueError: other rows, or in some row another number of documents.
        """
        check_kind("The memory of a batch", Documents, documents=self.documents)
        if self.documents.batch != documents.batch:
            raise ValueError(
                f"A memory has the rows of its batch, got {self.documents.batch} rows of memory "
                f"for a batch of {documents.batch}: give each row its memory."
            )
        pairs = zip(documents.lengths, self.documents.lengths, strict=True)
        for row, (queries, keys) in enumerate(pairs):
            if len(queries) != len(keys):
                raise ValueError(
                    f"Each document attends to the memory document of its own number, got "
                    f"{len(queries)} documents and {len(keys)} of memory in row {row}: pack both "
                    f"sequences alike, and tell their documents to shard_batch."
                )

    def row(self, row: int) -> "Memory":
        """The documents of one row by themselves."""
        return Memory(Documents((self.documents.lengths[row],), self.documents.seq_len))

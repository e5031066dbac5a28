"""How a batch was sharded: what shards, gathers and sums anything else that goes with it."""

from dataclasses import dataclass

from torch import Tensor

from dtcp.distributed import relayout
from dtcp.distributed.mesh import ParallelMesh
from dtcp.distributed.replicated_loss import gather_for_replicated_loss, sum_for_replicated_loss
from dtcp.metadata import BatchMetadata
from dtcp.row_parts import part_of_rows
from dtcp.rows import pad_end
from dtcp.sequence.arguments import check_dim
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import PADDING, Documents
from dtcp.sequence.host import on_device
from dtcp.sequence.layout import SequenceLayout


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
        rows = self.documents.batch
        if x.shape != (rows, self.layout.shard_len):
            raise ValueError(
                f"A ShardedBatch sums a number of each token, got x.shape={tuple(x.shape)}: give "
                f"[B, L] = {(rows, self.layout.shard_len)}."
            )
        document = on_device(self.shard(self.coords.document, pad=PADDING), x.device)
        count = max(len(lengths) for lengths in self.documents.lengths)
        # What is in no document is summed in a place that is cut off.
        place = document.where(document >= 0, count)
        sums = x.new_zeros(rows, count + 1).scatter_add(1, place, x)[:, :count]
        return sums if self.mesh.cp is None else sum_for_replicated_loss(sums, self.mesh.cp)

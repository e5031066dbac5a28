"""One way to run a model: mesh, batch, strategy, precision."""

from dataclasses import dataclass, field

import torch

from dtcp.distributed.mesh import Degrees, check_no_stages
from dtcp.parallelize import ActivationCheckpoint, FullCheckpoint
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail, SequenceLayout
from dtcp.softmax import RingAttention
from dtcp.softmax.style import AttentionStyle


@dataclass(frozen=True)
class Precision:
    """Dtypes of a run: those of FSDP's mixed precision, and of what the optimizer holds.

    Args:
        compute: of gathered parameters and activations.
        reduce: of gradients while they are summed over ranks.
        master: of parameters, gradients and the optimizer's states as they are kept.
        states: numbers that the optimizer keeps per parameter: 2 for Adam.
    """

    compute: torch.dtype = torch.bfloat16
    reduce: torch.dtype = torch.float32
    master: torch.dtype = torch.float32
    states: int = 2


BF16 = Precision()


@dataclass(frozen=True)
class Setup:
    """How a model is run.

    Args:
        documents: of one rank's rows of one micro-batch; its batch is local_batch_size.
        micro_batches: passes forward and backward between two steps of the optimizer.
        reshard: free a block's gathered parameters after its forward pass.
        ranks_per_node: how many a launcher starts on each machine: what several of them read
            crosses to it once. 0: exchanges have one tier.
    """

    degrees: Degrees
    documents: Documents
    layout: type[SequenceLayout] = HeadTail
    attention: AttentionStyle = field(default_factory=RingAttention)
    checkpoint: ActivationCheckpoint = field(default_factory=FullCheckpoint)
    precision: Precision = BF16
    micro_batches: int = 1
    reshard: bool = True
    ranks_per_node: int = 0

    def __post_init__(self) -> None:
        check_no_stages("A plan", self.degrees)

    @property
    def tokens(self) -> int:
        """Tokens of a step, on all ranks together."""
        rows = self.documents.batch * self.degrees.dp_replicate * self.degrees.dp_shard
        return rows * self.documents.seq_len * self.micro_batches

"""What carries attention out on an axis, and what each call of it carries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dtcp.distributed.counting import count_crossed
from dtcp.distributed.moves import Moves
from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax.api import SoftmaxParams
from dtcp.metadata import AttentionMetadata
from dtcp.softmax.inputs import AttentionInputs
from dtcp.softmax.kv_head_replicas import KVHeadReplicas
from dtcp.softmax.moves import AttentionShape, Peers


class ForwardResult(NamedTuple):
    """What forward comes to, and what backward reads again besides the inputs."""

    out: Tensor  # [B, L, H, V], in q's dtype
    saved: list[Tensor]


@dataclass(frozen=True)
class OpContext:
    """What a call carries besides its inputs."""

    op: str
    metadata: Any
    """Of the kind that the strategy reads (`Strategy.metadata_of`)."""
    softmax: SoftmaxParams
    groups: Sequence[str]
    kv_heads: int
    replicas: KVHeadReplicas | None = None
    """Who reads the same rows of the last of the groups, in the one before."""
    shares_kv_heads: bool = False
    """Whether several ranks attend with one kv head, and sum its gradients around this call."""

    def grad_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which gradients of keys travel, of those in this one."""
        return accumulation(dtype) if self.softmax.wide else dtype

    def count(self, group: str, sent: Sequence[int], received: Sequence[int]) -> None:
        """Count bytes that crossed between the ranks of a group in this call, by rank."""
        count_crossed(self.op, group, sent, received, calls=0)


class Strategy(Protocol):
    """How attention is carried out on an axis.

    Backward is given the inputs and the output of forward, unless the strategy keeps its own form
    of them, by heads say: then its q, k, v and out are the first four that forward saves, and the
    inputs are not kept.
    """

    keeps_own_form: bool
    takes_values_only: bool
    """Whether keys may be made of values where they are read (`AttentionInputs.k` None)."""
    takes_latents: bool
    """Whether keys and values may be made of latents where they are read (`AttentionInputs.up`)."""

    def metadata_of(self, tensors: Sequence[Tensor]) -> AttentionMetadata:
        """What the style worked out for the batch, of its tensors: an op takes these alone."""

    def forward(self, x: AttentionInputs, context: OpContext) -> ForwardResult:
        """Attend."""

    def backward(
        self, grad_out: Tensor, x: AttentionInputs, result: ForwardResult, context: OpContext
    ) -> AttentionInputs:
        """The gradients of x."""

    def saved_like(
        self, x: AttentionInputs, metadata: Any, group_sizes: Sequence[int]
    ) -> list[Tensor]:
        """Empty tensors of the shapes and dtypes of what forward saves.

        Args:
            group_sizes: the number of ranks of each of the op's groups, which a fake does not know.
        """

    def moves(self, shape: AttentionShape, length: int, metadata: Any, peers: Peers) -> Moves:
        """What a call of this shape on `length` local tokens moves, of what the host reads."""

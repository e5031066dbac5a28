"""What a mixer of softmax attention becomes once a style has taken it over."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from dtcp.distributed.dtensor_rules import HEADS, SEQ
from dtcp.local_op import check_differentiation
from dtcp.mixer import ClaimedMixer
from dtcp.sequence.arguments import check_tensor
from dtcp.softmax.inputs import AttentionInputs
from dtcp.softmax.mixer import CrossAttention, KeysFromValues, LatentAttention, SoftmaxAttention


class ContextParallelAttention(ClaimedMixer, SoftmaxAttention):
    """A SoftmaxAttention that a style has taken over."""

    carry_out = SoftmaxAttention.forward

    def attend(self, x: AttentionInputs, metadata: Any) -> Tensor:
        """Local shards in, local shard out; DTensors in, DTensor out.

        The op's rule checks their placements (dtensor.py), not traced code.
        """
        check_tensor("Attention", shape="[B, L, heads, width]", q=x.q, k=x.k, v=x.v)
        _check_plain(**{name: getattr(x, name) for name in (*x.per_head, "profiles")})
        check_differentiation("Attention on shards", *x)
        of_tokens: dict[str, Any] = {name: getattr(x, name) for name in x.of_tokens}
        distributed = any(isinstance(each, DTensor) for each in of_tokens.values())
        if not distributed:
            x = x._replace(**{name: self._wrap(each) for name, each in of_tokens.items()})
        out = self.style.op(
            x, metadata, self.softmax(x.q), groups=self.groups, group_sizes=self.group_sizes
        )
        if distributed:
            return out
        return cast(DTensor, out).to_local(grad_placements=self._placements())

    def _wrap(self, x: Tensor) -> DTensor:
        return DTensor.from_local(x, self.mesh, self._placements(), run_check=False)

    def _placements(self) -> tuple[Placement, ...]:
        return (Shard(SEQ), Shard(HEADS))[: self.mesh.ndim]


class ContextParallelCrossAttention(ContextParallelAttention, CrossAttention):
    """A CrossAttention that a style has taken over."""


class ContextParallelKeysFromValues(ClaimedMixer, KeysFromValues):
    """A KeysFromValues that a style has taken over; takes local shards alone."""

    carry_out = KeysFromValues.forward

    def attend(
        self, q: Tensor, v: Tensor, key_scale: Tensor, frequency: Tensor, metadata: Any
    ) -> Tensor:
        if frequency.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"Keys that are made where they arrive give no gradient to what rotates them, got "
                f"frequency.requires_grad=True for {self.style}: pass frequency.detach()."
            )
        x = AttentionInputs(q, None, v, key_scale=key_scale, frequency=frequency)
        return self.style.op(
            x, metadata, self.softmax(q), groups=self.groups, group_sizes=self.group_sizes
        )


class ContextParallelLatentAttention(ClaimedMixer, LatentAttention):
    """A LatentAttention that a style has taken over; takes local shards alone.

    On the mesh of sequence and heads q and up are of this rank's heads, and the gradients of the
    latent and of the rotary key are summed over the heads' axis.
    """

    carry_out = LatentAttention.forward

    def attend(self, q: Tensor, rows: Tensor, up: Tensor, metadata: Any) -> Tensor:
        if self.mesh.ndim == 2:
            placements = (Shard(SEQ), Replicate())
            rows = self.as_summed(rows)
            whole = DTensor.from_local(rows, self.mesh, placements, run_check=False)
            rows = whole.to_local(grad_placements=(Shard(SEQ), Partial()))
        return self.style.op(
            AttentionInputs(q, None, rows, up=up),
            metadata,
            self.softmax(q),
            groups=self.groups,
            group_sizes=self.group_sizes,
            keys_sum_grads=rows.dtype != q.dtype,
        )


def _check_plain(**per_head: Tensor | None) -> None:
    """Refuse DTensors that would get the gradient of this rank's queries as a plain tensor."""
    for name, x in per_head.items():
        if isinstance(x, DTensor) and x.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"Attention on shards reads the {name} of this rank's heads, got a DTensor placed "
                f"{x.placements}: give {name}.to_local(grad_placements=...), Partial() on the axis "
                f"of the sequence."
            )

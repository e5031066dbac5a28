"""How much of a token's write is left for a later token of its chunk, per head or per channel.

With G the running sum of log-decay in a chunk, token i reads of token j

    sum_c a_ic b_jc e^(G_ic - G_jc)        for j <= i in one document

G has one value per head (gated delta net) or one per key channel (Kimi delta attention). A head's
decay can be taken out of the sum. A channel's cannot, and e^(-G) alone overflows; so a chunk is
halved again and again. Between the two halves of a stretch, with r the first token of the second,

    e^(G_i - G_j) = e^(G_i - G_r) e^(G_r - G_j)

and both factors are at most 1. That is one matrix product per level, log2(C) in all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.delta_rule.chunks import running_sum


@dataclass(frozen=True)
class HeadDecay:
    """One decay for all channels of a head."""

    between: (
        Tensor  # [R, H, N, C, C], from column to row; 0 across documents and above the diagonal
    )
    enter: Tensor  # [R, H, N, C, 1], from the chunk's start to the token
    leave: Tensor  # [R, H, N, C, 1], from the token to the chunk's end

    @classmethod
    def of(cls, total: Tensor, same: Tensor, enter: Tensor) -> "HeadDecay":
        between = (total - total.mT).masked_fill(~same, -torch.inf).exp()
        return cls(between, enter, between[..., -1, :, None])

    def scores(self, a: Tensor, b: Tensor) -> Tensor:
        """What rows a [R, H, N, C, K] read of rows b [R, H, N, C, K], decayed: [R, H, N, C, C]."""
        return (a @ b.mT) * self.between

    def scores_backward(self, grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a and b."""
        grad = grad * self.between
        return grad @ b, grad.mT @ a


class Level(NamedTuple):
    """A chunk cut into S stretches, and each stretch into two halves of `half` tokens."""

    half: int
    down: Tensor  # [R, H, N, S, half, K], from the second half's first token to each token of it
    up: Tensor  # [R, H, N, S, half, K], from each token of the first half to the second's first


@dataclass(frozen=True)
class ChannelDecay:
    """One decay per channel of a head's key; a chunk must have a power of two tokens."""

    total: Tensor  # [R, H, N, C, K]
    same: Tensor  # [R, 1, N, C, C], whether the column's token is not later, in the same document
    enter: Tensor  # [R, H, N, C, K]
    leave: Tensor  # [R, H, N, C, K]

    @classmethod
    def of(cls, total: Tensor, same: Tensor, enter: Tensor) -> "ChannelDecay":
        kept = same[..., -1, :, None]
        leave = (total[..., -1:, :] - total).masked_fill(~kept, -torch.inf).exp()
        return cls(total, same, enter, leave)

    def scores(self, a: Tensor, b: Tensor) -> Tensor:
        """What rows a [R, H, N, C, K] read of rows b [R, H, N, C, K], decayed: [R, H, N, C, C]."""
        scores = torch.diag_embed((a * b).sum(-1))
        for level in self._levels():
            early, late = _halves(b, level.half)[0], _halves(a, level.half)[1]
            _blocks(scores, level.half).copy_((late * level.down) @ (early * level.up).mT)
        return scores.where(self.same, 0)

    def scores_backward(self, grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a and b."""
        grad = grad.where(self.same, 0)
        own = grad.diagonal(dim1=-2, dim2=-1)[..., None]
        d_a, d_b = own * b, own * a
        for level in self._levels():
            early, late = _halves(b, level.half)[0], _halves(a, level.half)[1]
            block = _blocks(grad, level.half)
            _halves(d_a, level.half)[1].add_((block @ (early * level.up)) * level.down)
            _halves(d_b, level.half)[0].add_((block.mT @ (late * level.down)) * level.up)
        return d_a, d_b

    def _levels(self) -> Iterator[Level]:
        half = self.total.shape[-2] // 2
        while half:
            early, late = _halves(self.total, half)
            border = late[..., :1, :]
            yield Level(half, (late - border).exp(), (border - early).exp())
            half //= 2


Decay = HeadDecay | ChannelDecay


def decay_of(g: Tensor, starts: Tensor) -> Decay:
    """The decay inside chunks.

    Args:
        g: [R, H, N, C, 1] log-decay per head, or [R, H, N, C, K] per channel.
        starts: [R, 1, N, C], 1 where a document starts.
    """
    # Nothing is carried into a document's first token, whatever its own decay.
    total, document = running_sum(g.masked_fill(starts[..., None] != 0, 0)), starts.cumsum(-1)
    same = (document[..., :, None] == document[..., None, :]).tril()
    enter = total.masked_fill(document[..., None] != 0, -torch.inf).exp()
    kind = HeadDecay if g.shape[-1] == 1 else ChannelDecay
    return kind.of(total, same, enter)


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Views of the first and the second halves of stretches: [.., C, K] -> [.., S, half, K]."""
    first, second = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return first, second


def _blocks(x: Tensor, half: int) -> Tensor:
    """A view of what second halves read of first halves: [.., C, C] -> [.., S, half, half]."""
    cut = x.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
    return cut.diagonal(dim1=-6, dim2=-3)[..., 1, :, 0, :, :].movedim(-1, -3)

"""What of a token's key and value travels, and what is made of it where it arrives."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.rotary import key_of_value, rotate
from dtcp.softmax.inputs import AttentionInputs
from dtcp.softmax.latent import LatentWidths, fold_back, keys_and_values
from dtcp.softmax.strategy import OpContext


class GradBuffers(NamedTuple):
    """Room to sum the gradients of some keys in, in fp32 (fp64 for fp64)."""

    rows: Tensor  # [B, m, G, W], of what travelled; `finish` completes or replaces it
    dk: Tensor  # [B, m, G, D]
    dv: Tensor  # [B, m, G, V]


class PayloadGradients(NamedTuple):
    """Of the inputs of attention, but for q and sinks."""

    k: Tensor | None
    v: Tensor
    key_scale: Tensor | None = None
    up: Tensor | None = None


class KVPayload(Protocol):
    """Local keys and values as rows [.., W] that travel. `part` says which step's keys are meant.

    Rows travel in the model's dtype, their gradients as one row per rank that used the key.
    """

    def pack(self, slots: Tensor) -> Tensor:
        """Rows of some local tokens, [m] int32: [m, B, G, W]."""

    def local(self, part: int) -> tuple[Tensor, Tensor]:
        """k and v of all local tokens."""

    def received(self, rows: Tensor, part: int) -> tuple[Tensor, Tensor]:
        """k and v of rows [m, B, G, W] that another rank sent."""

    def in_order(self, rows: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of local tokens and of received rows, in token order."""

    def grad_buffers(self, tokens: int) -> GradBuffers:
        """Room for the gradients of so many keys."""

    def finish(self, buffers: GradBuffers, v: Tensor, part: int) -> Tensor:
        """Gradients of the rows [B, m, G, W], once dk and dv have been summed."""

    def input_gradients(self, rows: Tensor) -> "PayloadGradients":
        """Gradients of what the payload is of, from those of the local rows [B, L, G, W]."""


class KeyValuePayload:
    """A key and a value of their own: both travel, in one row.

    Args:
        k: [B, L, G, D].
        v: [B, L, G, V].
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def pack(self, slots: Tensor) -> Tensor:
        pair = (self.k.index_select(1, slots), self.v.index_select(1, slots))
        return torch.cat(pair, dim=-1).transpose(0, 1).contiguous()

    def local(self, part: int) -> tuple[Tensor, Tensor]:
        return self.k, self.v

    def received(self, rows: Tensor, part: int) -> tuple[Tensor, Tensor]:
        return self.split(rows.transpose(0, 1))

    def in_order(self, rows: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        far_k, far_v = self.received(rows, 0)
        k, v = torch.cat((self.k, far_k), dim=1), torch.cat((self.v, far_v), dim=1)
        return k.index_select(1, order), v.index_select(1, order)

    def grad_buffers(self, tokens: int) -> GradBuffers:
        width = self.k.shape[-1] + self.v.shape[-1]
        rows = _zeros(self.v, tokens, width)
        return GradBuffers(rows, *self.split(rows))

    def finish(self, buffers: GradBuffers, v: Tensor, part: int) -> Tensor:
        return buffers.rows

    def input_gradients(self, rows: Tensor) -> PayloadGradients:
        return PayloadGradients(*self.split(rows))

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        width = self.k.shape[-1]
        return rows[..., :width], rows[..., width:]


class ValueOnlyPayload:
    """Only values travel: a key is its value, scaled and rotated, and is recomputed on arrival.

    Args:
        v: [B, L, G, D].
        key_scale: [D].
        frequency: [D / 2].
        position_ids: [parts, B, K] int32, of the keys of each part in their documents.
    """

    def __init__(
        self, v: Tensor, key_scale: Tensor, frequency: Tensor, position_ids: Tensor
    ) -> None:
        self.v, self.key_scale = v, key_scale
        self.frequency, self.position_ids = frequency, position_ids
        self.scale_gradient = torch.zeros_like(key_scale, dtype=accumulation(v.dtype))

    def pack(self, slots: Tensor) -> Tensor:
        return self.v.index_select(1, slots).transpose(0, 1).contiguous()

    def local(self, part: int) -> tuple[Tensor, Tensor]:
        return self._key(self.v, part), self.v

    def received(self, rows: Tensor, part: int) -> tuple[Tensor, Tensor]:
        v = rows.transpose(0, 1)
        return self._key(v, part), v

    def in_order(self, rows: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        v = torch.cat((self.v, rows.transpose(0, 1)), dim=1).index_select(1, order)
        return self._key(v, 0), v

    def grad_buffers(self, tokens: int) -> GradBuffers:
        dk, dv = (_zeros(self.v, tokens, self.v.shape[-1]) for _ in range(2))
        return GradBuffers(dv, dk, dv)

    def finish(self, buffers: GradBuffers, v: Tensor, part: int) -> Tensor:
        back = rotate(buffers.dk, -self._positions(v, part), self.frequency)
        self.scale_gradient += (back * v.to(back.dtype)).sum((0, 1, 2))
        return buffers.rows.add_(back * self.key_scale.to(back.dtype))

    def input_gradients(self, rows: Tensor) -> PayloadGradients:
        return PayloadGradients(None, rows, key_scale=self.scale_gradient)

    def _key(self, v: Tensor, part: int) -> Tensor:
        return key_of_value(v, self.key_scale, self._positions(v, part), self.frequency)

    def _positions(self, v: Tensor, part: int) -> Tensor:
        return self.position_ids[part, :, : v.shape[1]]


class LatentPayload:
    """Only latents travel: keys and values of all heads are made from them on arrival.

    The gradients of those are folded back into a latent's before they go home; that of `up` is
    this rank's share, of what its own queries read.

    Args:
        q: [B, L, H, N + R], of which the widths are read.
        rows: [B, L, 1, C + R], in the dtype that their gradient is to have; they are read, and
            travel, in that of up.
        up: [H, N + V, C].
        wide: as of SoftmaxParams.
    """

    def __init__(self, q: Tensor, rows: Tensor, up: Tensor, *, wide: bool) -> None:
        rows = rows.to(up.dtype)
        self.rows, self.up, self.widths = rows, up, LatentWidths.of(q, rows, up)
        self.wide = wide
        self.up_gradient = torch.zeros_like(up, dtype=accumulation(up.dtype))
        # The rows of the keys made last: a strategy finishes with these before it asks for others.
        self.current = rows

    def pack(self, slots: Tensor) -> Tensor:
        return self.rows.index_select(1, slots).transpose(0, 1).contiguous()

    def local(self, part: int) -> tuple[Tensor, Tensor]:
        return self._made(self.rows)

    def received(self, rows: Tensor, part: int) -> tuple[Tensor, Tensor]:
        return self._made(rows.transpose(0, 1))

    def in_order(self, rows: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        every = torch.cat((self.rows, rows.transpose(0, 1)), dim=1)
        return self._made(every.index_select(1, order))

    def grad_buffers(self, tokens: int) -> GradBuffers:
        heads, widths = self.up.shape[0], self.widths
        dk, dv = (
            _zeros(self.rows, tokens, width, heads)
            for width in (widths.content + widths.rotary, widths.value)
        )
        return GradBuffers(self.rows[:, :0], dk, dv)

    def finish(self, buffers: GradBuffers, v: Tensor, part: int) -> Tensor:
        arguments = (buffers.dk, buffers.dv, self.current, self.up, self.widths)
        d_rows, d_up = fold_back(*arguments, wide=self.wide)
        self.up_gradient += d_up
        return d_rows

    def input_gradients(self, rows: Tensor) -> PayloadGradients:
        return PayloadGradients(None, rows, up=self.up_gradient)

    def _made(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        self.current = rows
        return keys_and_values(rows, self.up, self.widths)


def payload_of(x: AttentionInputs, context: OpContext) -> KVPayload:
    """What travels for these inputs."""
    if x.k is not None:
        return KeyValuePayload(x.k, x.v)
    if x.up is not None:
        return LatentPayload(x.q, x.v, x.up, wide=context.softmax.wide)
    assert x.key_scale is not None and x.frequency is not None
    return ValueOnlyPayload(x.v, x.key_scale, x.frequency, context.metadata.key_position_ids)


def _zeros(like: Tensor, tokens: int, width: int, heads: int | None = None) -> Tensor:
    shape = (like.shape[0], tokens, like.shape[2] if heads is None else heads, width)
    return torch.zeros(shape, dtype=accumulation(like.dtype), device=like.device)

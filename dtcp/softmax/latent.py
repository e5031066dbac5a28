"""Latent attention: one latent per token, from which the keys and the values of all heads are made.

A token hands on C numbers for its content, R more for its rotated key, which all heads share, and
nothing else: `up` makes N content channels of a key and V of a value from the latent, per head.

    key of head h = [ up[h, :N] @ latent | rotary ]        value of head h = up[h, N:] @ latent

From DeepSeek-AI 2024, DeepSeek-V2, section 2.1, https://arxiv.org/abs/2405.04434
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtcp.autocast import without_autocast
from dtcp.kernels.dtypes import accumulation
from dtcp.mixer import Mixer
from dtcp.sequence.arguments import FLOATS, check_tensor


class LatentWidths(NamedTuple):
    """Channels of the parts of a latent attention."""

    content: int  # N, of a key
    rotary: int  # R, of a key
    value: int  # V
    latent: int  # C

    @classmethod
    def of(cls, q: Tensor, rows: Tensor, up: Tensor) -> "LatentWidths":
        """From the shapes of q [B, L, H, N + R], rows [B, L, 1, C + R] and up [H, N + V, C].

        Raises:
            ValueError: shapes that do not fit together.
        """
        fits = q.ndim == rows.ndim == 4 and up.ndim == 3
        fits = fits and (rows.shape[2], up.shape[0]) == (1, q.shape[2])
        if fits and q.shape[:2] == rows.shape[:2]:
            rotary = rows.shape[3] - up.shape[2]
            content = q.shape[3] - rotary
            if rotary >= 0 and 0 <= content < up.shape[1]:
                return cls(content, rotary, up.shape[1] - content, up.shape[2])
        raise ValueError(
            f"Latent attention makes the keys and values of all heads from one latent per token, "
            f"got shapes q={tuple(q.shape)}, latent and rotary key={tuple(rows.shape)}, "
            f"up={tuple(up.shape)}: give q [B, L, H, N + R], a latent [B, L, C], a rotary key "
            f"[B, L, R] and up [H, N + V, C]."
        )


class LatentMixer(Mixer):
    """A mixer whose tokens hand on a latent and a rotary key each."""

    wide: bool = False
    """Whether ranks sum gradients of latents unrounded."""

    def rows(self, q: Tensor, latent: Tensor, key_rotary: Tensor, up: Tensor) -> Tensor:
        """What a token hands on, [B, L, 1, C + R], once all has been looked at."""
        named = {"latent": latent, "key_rotary": key_rotary}
        check_tensor("Latent attention", shape="[B, L, channels]", ndim=3, dtypes=FLOATS, **named)
        check_tensor("Latent attention", shape="[B, L, H, D]", ndim=4, dtypes=FLOATS, q=q)
        check_tensor("Latent attention", shape="[H, N + V, C]", ndim=3, dtypes=FLOATS, up=up)
        if latent.shape[:2] != key_rotary.shape[:2] or latent.shape[2] != up.shape[2]:
            raise ValueError(
                f"Latent attention has a latent and a rotary key for each token, got latent.shape="
                f"{tuple(latent.shape)}, key_rotary.shape={tuple(key_rotary.shape)}, up.shape="
                f"{tuple(up.shape)}: give [B, L, C], [B, L, R] and [H, N + V, C]."
            )
        summed = {accumulation(q.dtype)} if self.wide else set()
        dtypes = {q.dtype, up.dtype} | ({latent.dtype, key_rotary.dtype} - summed)
        if len(dtypes) > 1:
            raise TypeError(
                f"Latent attention computes in one floating dtype, got {dtypes}: convert q, "
                f"latent, key_rotary and up to one."
            )
        return torch.cat((latent, key_rotary), dim=-1)[:, :, None]

    def forward_without_mixing(self, *args: Any, **kwargs: Any) -> Tensor:
        q, latent, key_rotary, up = args[:4]
        rows = self.rows(q, latent, key_rotary, up)
        with without_autocast(rows.device):
            return keys_and_values(rows, up, LatentWidths.of(q, rows, up))[1]

    def as_summed(self, x: Tensor) -> Tensor:
        """A latent or rotary key in the dtype in which ranks sum its gradient."""
        return x.to(accumulation(x.dtype)) if self.wide else x


def keys_and_values(rows: Tensor, up: Tensor, widths: LatentWidths) -> tuple[Tensor, Tensor]:
    """What `up` makes of the rows [B, m, 1, C + R]: k [B, m, H, N + R] and v [B, m, H, V]."""
    latent, rotary = rows.split((widths.latent, widths.rotary), dim=-1)
    expanded = (latent[:, :, 0] @ up.flatten(0, 1).mT).unflatten(-1, up.shape[:2])
    content, v = expanded.split((widths.content, widths.value), dim=-1)
    shared = rotary.expand(*content.shape[:3], widths.rotary)
    return torch.cat((content, shared), dim=-1), v


def fold_back(
    dk: Tensor, dv: Tensor, rows: Tensor, up: Tensor, widths: LatentWidths, *, wide: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows [B, m, 1, C + R] and of up, in the dtype of `accumulation`.

    Args:
        wide: take products in that dtype, too, for ranks sum them unrounded; else in the model's,
            as autograd would.
    """
    content, rotary = dk.split((widths.content, widths.rotary), dim=-1)
    summed = accumulation(rows.dtype)
    dtype = summed if wide else rows.dtype
    gradients = torch.cat((content, dv), dim=-1).flatten(2, 3).to(dtype)  # [B, m, H * (N + V)]
    latent = rows[:, :, 0, : widths.latent].to(dtype)
    d_latent = (gradients @ up.flatten(0, 1).to(dtype)).to(summed)
    d_rows = torch.cat((d_latent[:, :, None], rotary.sum(2, keepdim=True)), dim=-1)
    d_up = gradients.flatten(0, 1).mT @ latent.flatten(0, 1)
    return d_rows, d_up.to(summed).view(up.shape)

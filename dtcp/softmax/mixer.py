"""Softmax attention as a model calls it: several mixers, each for one device as it stands."""

import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dtcp.autocast import without_autocast
from dtcp.kernels.rotary import key_of_value, rotate
from dtcp.kernels.softmax.api import SoftmaxParams
from dtcp.kernels.softmax.backends import check_kernel_name, check_unrounded
from dtcp.kernels.softmax.types import AUTO
from dtcp.metadata import AttentionMetadata, BatchMetadata, NoMetadata
from dtcp.mixer import Mixer
from dtcp.mixer_positions import check_position_ids, position_ids_of
from dtcp.sequence.arguments import FLOATS, WHOLE_NUMBERS, check_factor, check_scale, check_tensor
from dtcp.sequence.coords import Coords
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.masks import Mask, MemoryDocument
from dtcp.softmax.inputs import AttentionInputs
from dtcp.softmax.latent import LatentMixer, LatentWidths, keys_and_values
from dtcp.softmax.local import ATTENTION
from dtcp.softmax.metadata import local_metadata


class MaskedMixer(Mixer):
    """A mixer in which tokens read each other as a mask allows.

    Args:
        mask: which keys a query sees, within its document.
        scale: factor on the scores; None for head_dim ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        kernel: the backend that computes it (`python -m dtcp.kernels` lists them); by default the
            fastest that can.

    There is no attention dropout: on a sharded sequence its pattern would depend on the mesh.
    """

    def __init__(
        self, mask: Mask, *, scale: float | None = None, softcap: float = 0.0, kernel: str = AUTO
    ) -> None:
        super().__init__()
        self.mask = mask
        self.scale = scale
        self.softcap = softcap
        self.kernel = kernel
        self.wide = False
        self.set_metadata_key()

    def check_setting(self, name: str, value: Any) -> None:
        if name == "mask" and not isinstance(value, Mask):
            raise TypeError(
                f"A mixer attends as a mask allows, got mask={value!r}: give a Mask, as Causal()."
            )
        if name == "scale" and value is not None:
            check_scale(value)
        if name == "softcap":
            check_factor("Scores", softcap=value)
        if name == "softcap" and not 0 <= value < math.inf:
            raise ValueError(
                f"A softcap bounds scores on both sides, got softcap={value}: give a bound "
                f"above 0, or 0 for none."
            )
        if name == "kernel":
            check_kernel_name(value)

    def reads(self) -> tuple[object, ...]:
        return (self.mask,)

    def softmax(self, q: Tensor) -> SoftmaxParams:
        """What turns the scores of q [B, L, H, D] into weights."""
        check_tensor("Attention", shape="[B, L, H, D]", q=q)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return SoftmaxParams(scale, self.softcap, self.kernel, self.wide)

    def whole_row_metadata(self, coords: Coords) -> AttentionMetadata:
        return local_metadata(KeyIntervals.of(self.mask, coords))

    def extra_repr(self) -> str:
        return f"mask={self.mask}, scale={self.scale}, softcap={self.softcap}"


def name_kernel(model: nn.Module, kernel: str) -> None:
    """Let one backend compute all attention of a model, claimed by a style or not.

    Raises:
        ValueError: there is none of that name, or it rounds what a style sums in fp32.
    """
    mixers = [module for module in model.modules() if isinstance(module, MaskedMixer)]
    check_kernel_name(kernel)
    if any(mixer.wide for mixer in mixers):
        check_unrounded(kernel)
    for mixer in mixers:
        mixer.kernel = kernel


class SoftmaxAttention(MaskedMixer):
    """Scaled dot-product attention under a mask."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_metadata: BatchMetadata,
        *,
        sink: Tensor | None = None,
        bias: Tensor | None = None,
        slope: Tensor | None = None,
        relative: Tensor | None = None,
        profiles: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: [B, L, H, D].
            k: [B, L, G, D], H a multiple of G; query head h reads kv head h // (H / G).
            v: [B, L, G, V].
            attn_metadata: what the batch brings.
            sink: [H], one score per head that takes its share of the softmax and adds nothing; or
                of each query its own, [B, L, H].
            bias: [H, 2 R + 1], added to a score by how many tokens its key lies right of its
                query, from -R to R; keys farther away get what the last of these get. T5's:
                t5_distance_bias.
            slope: [H], added to a score that number of tokens times. ALiBi's: alibi_slopes.
            relative: [B, L, H, C], with `profiles`, [C, W]: to the score of the key w tokens left
                of a query, itself included, relative @ profiles[:, w] is added, to those W or more
                tokens left, and right, nothing. Inkling's.
        Returns:
            [B, L, H, V].
        """
        self.check_bias(bias, slope, relative, profiles)
        own_bias = {"relative": relative, "profiles": profiles}
        x = AttentionInputs(q, k, v, sink, bias=bias, slope=slope, **own_bias)
        return self.attend(x, self.own(attn_metadata))

    def attend(self, x: AttentionInputs, metadata: Any) -> Tensor:
        """`forward`, once the batch's metadata are known."""
        return ATTENTION(x, metadata, self.softmax(x.q))

    def check_bias(self, *bias: Tensor | None) -> None:
        """Refuse a bias where tokens have no distance."""


class CrossAttention(SoftmaxAttention):
    """Attention to another sequence, the memory: of an encoder, say. Each document to its own.

    Called as SoftmaxAttention, with k and v of the memory's tokens, [B, L, G, ...], and no bias.

    Its batch names the memory: shard_batch(..., memory=the ShardedBatch of the other sequence)
    or, on one device, batch_metadata(..., memory=its Documents). Both sequences have layouts of
    their own; k and v are of this rank's tokens of the memory.
    """

    def __init__(
        self, *, scale: float | None = None, softcap: float = 0.0, kernel: str = AUTO
    ) -> None:
        super().__init__(MemoryDocument(), scale=scale, softcap=softcap, kernel=kernel)

    def check_bias(self, *bias: Tensor | None) -> None:
        if any(each is not None for each in bias):
            raise ValueError(
                "A score bias goes by the distance of two tokens of one sequence, got one for "
                "cross attention: leave bias, slope and relative out."
            )

    def whole_row_metadata(self, coords: Coords) -> AttentionMetadata:
        num_keys = MemoryDocument().memory(coords).documents.seq_len
        return local_metadata(KeyIntervals.of(self.mask, coords), num_keys=num_keys)

    def forward_without_mixing(self, *args: Any, **kwargs: Any) -> Tensor:
        q, _, v = args[:3]
        return q.new_zeros((*q.shape[:-1], v.shape[-1]))


class KeysFromValues(MaskedMixer):
    """Attention in which a key is its value, scaled and rotated.

    Ranks exchange only values and recompute keys on arrival. The position ids of keys come from
    the batch's metadata, and a model that is called with others is stopped.
    """

    def forward(
        self,
        q: Tensor,
        v: Tensor,
        position_ids: Tensor,
        key_scale: Tensor,
        frequency: Tensor,
        attn_metadata: BatchMetadata,
    ) -> Tensor:
        """Attend to k = rotate(v * key_scale) and v.

        Args:
            q: [B, L, H, D], not rotated yet.
            v: [B, L, G, D].
            position_ids: [B, L], the batch's.
            key_scale: [D].
            frequency: [D / 2], radians per token of every pair of channels.
            attn_metadata: what the batch brings.
        Returns:
            [B, L, H, D].
        """
        self.check_operands(q, v, position_ids, key_scale, frequency)
        own = self.own(attn_metadata)
        check_position_ids(position_ids, own.position_ids, own.sees)
        return self.attend(rotate(q, own.position_ids, frequency), v, key_scale, frequency, own)

    def attend(
        self, q: Tensor, v: Tensor, key_scale: Tensor, frequency: Tensor, metadata: Any
    ) -> Tensor:
        """`forward`, of queries that are rotated, once the batch's metadata are known."""
        k = key_of_value(v, key_scale, metadata.position_ids, frequency)
        return ATTENTION(AttentionInputs(q, k, v), metadata, self.softmax(q))

    def check_operands(
        self, q: Tensor, v: Tensor, position_ids: Tensor, key_scale: Tensor, frequency: Tensor
    ) -> None:
        """Refuse what rotating would broadcast: one row's queries for all rows, say."""
        subject = "Attention with keys made from values"
        check_tensor(subject, shape="[B, L, heads, D]", ndim=4, dtypes=FLOATS, q=q, v=v)
        check_tensor(subject, shape="[B, L]", dtypes=WHOLE_NUMBERS, position_ids=position_ids)
        check_tensor(subject, dtypes=FLOATS, key_scale=key_scale, frequency=frequency)
        if q.shape[:2] != v.shape[:2] or position_ids.shape[-1:] != q.shape[1:2]:
            raise ValueError(
                f"{subject} has a query, a value and a position for each token, got q.shape="
                f"{tuple(q.shape)}, v.shape={tuple(v.shape)}, position_ids.shape="
                f"{tuple(position_ids.shape)}: give each [B, L, ...]."
            )
        width = v.shape[3]
        if (key_scale.shape, frequency.shape) != ((width,), (width // 2,)) or width % 2:
            raise ValueError(
                f"{subject} scales and rotates all channels, in pairs, got v.shape="
                f"{tuple(v.shape)}, key_scale.shape={tuple(key_scale.shape)}, "
                f"frequency.shape={tuple(frequency.shape)}: give [D] and [D / 2]."
            )

    def forward_without_mixing(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward_without_mixing(args[0], args[1], args[1])

    def whole_row_metadata(self, coords: Coords) -> AttentionMetadata:
        local = local_metadata(KeyIntervals.of(self.mask, coords))
        return replace(local, position_ids=position_ids_of(coords))


class LatentAttention(LatentMixer, MaskedMixer):
    """Attention in which the keys and values of all heads are made from one latent per token.

    Multi-head latent attention, as DeepSeek and Kimi have it. On a sharded sequence ranks exchange
    latents and rotary keys, C + R numbers per token, and make keys and values where they arrive.
    """

    def forward(
        self,
        q: Tensor,
        latent: Tensor,
        key_rotary: Tensor,
        up: Tensor,
        attn_metadata: BatchMetadata,
    ) -> Tensor:
        """Attend to k = [up[:, :N] @ latent | key_rotary] and v = up[:, N:] @ latent.

        Args:
            q: [B, L, H, N + R], the R rotated channels last.
            latent: [B, L, C], normalized.
            key_rotary: [B, L, R], rotated; R = 0 for none.
            up: [H, N + V, C], the weight of the up-projection (kv_b_proj) by heads.
            attn_metadata: what the batch brings.
        Returns:
            [B, L, H, V].
        """
        rows = self.rows(q, latent, key_rotary, up)
        return self.attend(q, rows, up, self.own(attn_metadata))

    def attend(self, q: Tensor, rows: Tensor, up: Tensor, metadata: Any) -> Tensor:
        """`forward`, once the batch's metadata are known; rows are [B, L, 1, C + R]."""
        with without_autocast(rows.device):
            k, v = keys_and_values(rows, up, LatentWidths.of(q, rows, up))
        return ATTENTION(AttentionInputs(q, k, v), metadata, self.softmax(q))


class GatherSharedKV(MaskedMixer):
    """Where a layer hands its keys to all layers that attend to them, its own attention first.

    On one device it hands them on as they are. On a sharded sequence it gathers, once, what the
    queries of every rank will see, and those layers attend to what was gathered.
    """

    def forward(self, x: Tensor, attn_metadata: BatchMetadata) -> Tensor:
        """Gather the rows of x [B, L, G, W] that this rank's queries see: [B, K, G, W]."""
        return x

    def position_ids(self, position_ids: Tensor, attn_metadata: BatchMetadata) -> Tensor:
        """Position ids of what `forward` gathers: [B, K]."""
        return position_ids

    def forward_without_mixing(self, *args: Any, **kwargs: Any) -> Tensor:
        return args[0]

    def whole_row_metadata(self, coords: Coords) -> AttentionMetadata:
        return NoMetadata()

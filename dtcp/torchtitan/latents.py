"""torchtitan's multi-head latent attention, with latents exchanged instead of keys and values.

Its attention makes keys and values of latents in the midst of its forward, so the forward is
written out here; every module of it, and their names, stay torchtitan's.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.linear import Linear
from torchtitan.models.deepseek_v3.model import Attention

from dtcp.forward import wrap_forward
from dtcp.metadata import BatchMetadata
from dtcp.softmax.mixer import LatentAttention
from dtcp.softmax.style import AttentionStyle


def exchange_latents_of(model: Decoder, style: AttentionStyle) -> None:
    """Let a decoder's layers of latent attention exchange latents, if the style brings these.

    Args:
        model: with its mixers, no style applied yet; its heads are not sharded.
    """
    if not style.op.strategy.takes_latents:
        return
    for attention in _latent_attentions(model):
        mixer = attention.inner_attention.mixer
        attention.inner_attention.mixer = LatentAttention(
            mixer.mask, scale=mixer.scale, softcap=mixer.softcap, kernel=mixer.kernel
        )
        wrap_forward(attention, _attend_to_latents)


def _latent_attentions(model: Decoder) -> Iterator[Any]:
    """The attention modules that are torchtitan's own, over a plain up-projection."""
    for block in model.layers.values():
        attention: Any = block.attention
        if type(attention) is not Attention:
            continue
        up: Any = attention.wkv_b
        if type(up) is Linear and up.bias is None:
            yield attention


def _attend_to_latents(
    attention: Any,
    _: Callable[..., Tensor],
    x: Tensor,
    attention_masks: BatchMetadata,
    positions: Tensor | None = None,
) -> Tensor:
    """As torchtitan's forward, up to where it makes keys and values."""
    lora = attention.q_lora_rank != 0
    q = attention.wq_b(attention.q_norm(attention.wq_a(x))) if lora else attention.wq(x)
    q = q.unflatten(-1, (-1, attention.qk_head_dim))
    widths = (attention.qk_nope_head_dim, attention.qk_rope_head_dim)
    content, rotary = q.split(widths, dim=-1)
    latent, key_rotary = attention.wkv_a(x).split((attention.kv_lora_rank, widths[1]), dim=-1)
    rotary, key_rotary = attention.rope(rotary, key_rotary.unsqueeze(2), positions)
    q = torch.cat((content, rotary), dim=-1)
    up = attention.wkv_b.weight.unflatten(0, (q.shape[2], -1))
    out: Tensor = attention.inner_attention.mixer(
        q, attention.kv_norm(latent), key_rotary[:, :, 0], up, attention_masks
    )
    return attention.wo(out.flatten(2))

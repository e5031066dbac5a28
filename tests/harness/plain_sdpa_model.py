"""A decoder that knows nothing of dtcp, and calls torch's attention on plain tensors."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, DIM, HEADS, KV_HEADS = 32, 16, 4, 2


class Attention(nn.Module):
    """Grouped-query attention, with the arguments of transformers' modules."""

    is_causal = True

    def __init__(self) -> None:
        super().__init__()
        kv = DIM // HEADS * KV_HEADS
        self.q, self.o = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.k, self.v = nn.Linear(DIM, kv), nn.Linear(DIM, kv)

    def forward(self, x: Tensor, attention_mask=None, *, is_causal: bool | None = None) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2)
            for y in (self.q(x), self.k(x), self.v(x))
        )
        causal = self.is_causal if is_causal is None else is_causal
        causal = causal and attention_mask is None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, is_causal=causal, enable_gqa=True
        )
        return self.o(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.self_attn = nn.LayerNorm(DIM), Attention()
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.SiLU())

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.norm(x), attention_mask=attention_mask)
        return x + self.mlp(x)


class Decoder(nn.Module):
    """Two layers; positions are learned, so a wrong one shows.

    Args:
        own_mask: makes its own mask, and finds documents by their positions, as transformers'
            models do.
    """

    def __init__(self, *, own_mask: bool = False) -> None:
        super().__init__()
        self.own_mask = own_mask
        self.embed, self.positions = nn.Embedding(VOCAB, DIM), nn.Embedding(64, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB)
        self.double()

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if self.own_mask:
            attention_mask = mask_by_position(position_ids)
        x = x + self.positions(position_ids)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return self.head(x)


def mask_by_position(position_ids: Tensor) -> Tensor:
    """Causal among tokens whose positions follow each other: [B, 1, L, L]."""
    run = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(1)
    same = run[:, :, None] == run[:, None]
    return (same & torch.ones_like(same).tril())[:, None]

"""Every token mixer on one device in a dtype, against itself in fp64: what a GPU is held to."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.grouped_linear import grouped_linear
from dtcp.mixer_metadata import batch_metadata
from dtcp.recurrent.mixer import CausalConv1d, GatedDeltaRule, GatedLinearAttention
from dtcp.sequence.documents import Documents
from dtcp.sequence.host import on_device
from dtcp.sequence.masks import AttentionChunks, Causal, SlidingWindow
from dtcp.softmax.mixer import CrossAttention, LatentAttention, SoftmaxAttention
from dtcp.sparse_blocks import BlockIndex, ScoredBlockAttention, ScoreIndex, SparseBlockAttention
from dtcp.sparse_latent import LightningIndexer, SparseLatentAttention

DOCUMENTS = Documents(((70, 1, 120), (200,)), 200)
MEMORY = Documents(((30, 2, 60), (90,)), 96)
B, S, M = 2, 200, 96
H, G, D = 4, 2, 64


class MixerCase(NamedTuple):
    """A mixer, the shapes of its inputs by name, and what noise becomes on the way in."""

    mixer: nn.Module
    shapes: dict[str, tuple[int, ...]]
    memory: bool = False
    prepared: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({})


QKV = {"q": (B, S, H, D), "k": (B, S, G, D), "v": (B, S, G, D)}
STATE = {"q": (B, S, G, 32), "k": (B, S, G, 32), "v": (B, S, H, 32)}
BY_HEAD, BY_CHANNEL = (B, S, H), (B, S, H, 32)


def decay(x: Tensor) -> Tensor:
    return -F.softplus(x)


def mixer_cases() -> dict[str, MixerCase]:
    """Each kind once, what came with newer models included."""
    bias = {**QKV, "bias": (H, 2 * 16 + 1), "slope": (H,)}
    of_queries = {**QKV, "relative": (B, S, H, 4), "profiles": (4, 20)}
    latent = {
        "q": (B, S, H, 48),
        "latent": (B, S, 64),
        "key_rotary": (B, S, 16),
        "up": (H, 32 + 32, 64),
    }
    picked = {
        "q": (B, S, H, 32 + 64),
        "latent": (B, S, 512),
        "key_rotary": (B, S, 64),
        "up": (H, 32 + 32, 512),
    }
    cross = {**QKV, "k": (B, M, G, D), "v": (B, M, G, D)}
    forget = {"g": decay, "beta": torch.sigmoid}
    return {
        "causal": MixerCase(SoftmaxAttention(Causal()), QKV),
        "window and sinks": MixerCase(
            SoftmaxAttention(Causal() & SlidingWindow(33)), {**QKV, "sink": (H,)}
        ),
        "softcap": MixerCase(SoftmaxAttention(Causal(), softcap=20.0), QKV),
        "score bias": MixerCase(SoftmaxAttention(Causal()), bias),
        "bias of queries": MixerCase(SoftmaxAttention(Causal()), of_queries),
        "chunks": MixerCase(SoftmaxAttention(Causal() & AttentionChunks(48)), QKV),
        "latents": MixerCase(LatentAttention(Causal()), latent),
        "picked latents": MixerCase(PickedLatents(), picked),
        "picked blocks": MixerCase(PickedBlocks(), QKV),
        "scored blocks": MixerCase(ScoredBlocks(), QKV),
        "cross attention": MixerCase(CrossAttention(), cross, memory=True),
        "delta rule": MixerCase(
            GatedDeltaRule(), {**STATE, "g": BY_HEAD, "beta": BY_HEAD}, prepared=forget
        ),
        "delta rule by channel": MixerCase(
            GatedDeltaRule(), {**STATE, "g": BY_CHANNEL, "beta": BY_HEAD}, prepared=forget
        ),
        "linear attention": MixerCase(
            GatedLinearAttention(), {**STATE, "g": BY_HEAD}, prepared={"g": decay}
        ),
        "convolution": MixerCase(CausalConv1d(4), {"x": (B, S, 48), "weight": (48, 4)}),
        "experts": MixerCase(Experts(), {"x": (B * S, 64), "weight": (4, 32, 64)}),
    }


class PickedLatents(nn.Module):
    """An indexer that scores by the rotary keys, and attention to the 40 tokens that it picks."""

    def __init__(self) -> None:
        super().__init__()
        self.indexer, self.attention = LightningIndexer(40), SparseLatentAttention()

    def forward(
        self, q: Tensor, latent: Tensor, key_rotary: Tensor, up: Tensor, attn_metadata: Any
    ) -> Tensor:
        index_q, weight = q[..., -64:], q[..., 0].sigmoid()
        selected = self.indexer(index_q, weight, key_rotary, attn_metadata)
        return self.attention(q, latent, key_rotary, up, selected, attn_metadata)


class PickedBlocks(nn.Module):
    """Attention to 6 blocks of 8 tokens, picked by a part of queries and keys in a wide dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SparseBlockAttention(6, 8)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_metadata: Any) -> Tensor:
        wide, key = accumulation(q.dtype), k[:, :, 0]
        table = key[..., :1].to(wide)
        index = BlockIndex(q[..., :32].to(wide), key[..., :32].to(wide), table, torch.add)
        return self.attention(q, k, v, index, attn_metadata)


class ScoredBlocks(nn.Module):
    """The same, by the best score of a token, for each head of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = ScoredBlockAttention(6, 8, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_metadata: Any) -> Tensor:
        wide = accumulation(q.dtype)
        index = ScoreIndex(q[:, :, : k.shape[2], :32].to(wide), k[:, :, 0, :32].to(wide))
        return self.attention(q, k, v, index, attn_metadata)


class Experts(nn.Module):
    """Rows of four experts, one of which has none."""

    def forward(self, x: Tensor, weight: Tensor, attn_metadata: object) -> Tensor:
        ends = torch.tensor([100, 100, 250, len(x)], dtype=torch.int32)
        return grouped_linear(x, weight, on_device(ends, x.device))


def mixer_errors(case: MixerCase, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Norms of the errors of out and of every gradient, relative to fp64's, from equal numbers."""
    draw = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(shape, generator=draw) for name, shape in case.shapes.items()}
    rounded = {name: x.to(dtype) for name, x in noise.items()}
    memory = MEMORY if case.memory else None
    metadata = batch_metadata(case.mixer, DOCUMENTS, memory=memory)
    results = []
    for wide, place in ((False, device), (True, "cpu")):
        kind = torch.float64 if wide else dtype
        leaves = {name: x.to(place, kind).requires_grad_() for name, x in rounded.items()}
        inputs = {name: case.prepared.get(name, _same)(x) for name, x in leaves.items()}
        out = case.mixer(**inputs, attn_metadata=metadata.to(place))
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(out.shape, generator=generator).to(dtype)
        grads = torch.autograd.grad(out, list(leaves.values()), cotangent.to(place, kind))
        results.append([x.detach().cpu().double() for x in (out, *grads)])
    names = ("out", *(f"d{name}" for name in case.shapes))
    return {
        name: float((ours - right).norm() / right.norm().clamp(min=1e-9))
        for name, ours, right in zip(names, *results, strict=True)
    }


def _same(x: Tensor) -> Tensor:
    return x

"""torchtitan's own decoders, small: as torchtitan runs them on one device, and with our attention.

In fp64, where torchtitan's experts compute in bfloat16: their products are patched to keep the
dtype of their inputs, on both sides, for they are not what is compared.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

from dtcp.torchtitan.attention import add_mixers

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, create_mask
from torchtitan.distributed import utils as titan_utils
from torchtitan.models.common import attention as titan_attention
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.common.embedding import Embedding
from torchtitan.models.common.moe import MoE
from torchtitan.protocols.model_spec import ModelSpec

from dtcp.mixer_metadata import batch_metadata
from dtcp.sequence.documents import Documents
from tests.harness.parity import gradients

ROWS = ((30, 34), (7, 57))
"""Lengths of documents, longer than any window here, and cut by the borders of shards."""

SEQ_LEN = 64

WINDOW = 9

VOCABULARY = 200


def _spec(family: str, flavor: str = "debugmodel", **options: Any) -> ModelSpec:
    registry: Callable[..., ModelSpec] = importlib.import_module(
        f"torchtitan.models.{family}"
    ).model_registry
    return registry(flavor, **options)


def llama3() -> ModelSpec:
    return _spec("llama3")


def qwen3() -> ModelSpec:
    return _spec("qwen3")


def qwen3_unfused() -> ModelSpec:
    return _spec("qwen3", "debugmodel_non_fused_qkv")


def qwen3_moe() -> ModelSpec:
    return _spec("qwen3", "debugmodel_moe")


def deepseek_v3() -> ModelSpec:
    return _spec("deepseek_v3")


def gpt_oss() -> ModelSpec:
    return _windowed(_spec("gpt_oss", attn_backend="flex"), "sliding_window_size")


def muse_glimmer() -> ModelSpec:
    return _windowed(_spec("muse_glimmer"), "window_size")


def kimi_k2_7() -> ModelSpec:
    spec = _spec("kimi_k2_7")
    return replace(spec, model=replace(spec.model, vision_encoder=None))


EXACT = (
    llama3,
    qwen3,
    qwen3_unfused,
    qwen3_moe,
    deepseek_v3,
    gpt_oss,
    muse_glimmer,
    kimi_k2_7,
)
"""Models whose attention ours replaces, by family of torchtitan's registry."""


def small(make: Callable[[], ModelSpec]) -> ModelSpec:
    """Two layers of the model, of all kinds that it has: dense and of experts, windowed and not."""
    spec = make()
    layers, attention = spec.model.layers, [each.attention for each in spec.model.layers]
    windows = [getattr(a, "sliding_window_size", getattr(a, "window_size", 0)) for a in attention]
    others = [i for i, window in enumerate(windows) if window != windows[0]]
    spec.model.layers = [layers[0], layers[others[0] if others else 1]]
    for _, moe, _, _ in spec.model.traverse(MoE.Config):
        _few_experts(moe)
    for _, embedding, _, _ in spec.model.traverse(Embedding.Config):
        embedding.num_embeddings = VOCABULARY
    spec.model.vocab_size = spec.model.lm_head.out_features = VOCABULARY
    return spec


def _few_experts(moe: Any) -> None:
    """Four experts of 64 channels, of which a token visits two."""
    moe.router.gate.out_features, moe.router.top_k = 4, 2
    moe.routed_experts.inner_experts.hidden_dim = 64
    for part in (
        moe,
        moe.router,
        moe.routed_experts.inner_experts,
        moe.routed_experts.token_dispatcher,
    ):
        part.num_experts = 4
    moe.routed_experts.token_dispatcher.top_k = 2


def _windowed(spec: ModelSpec, field: str) -> ModelSpec:
    """Windows shorter than the rows here."""
    for layer in spec.model.layers:
        if getattr(layer.attention, field) is not None:
            setattr(layer.attention, field, WINDOW)
    return spec


def fill(model: nn.Module) -> nn.Module:
    """Weights that every part of the model feels, from one seed."""
    model.init_states()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter in model.parameters():
            nn.init.normal_(
                parameter, std=0.5 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
            )
    return model


def rows() -> tuple[Tensor, Documents]:
    """Tokens [2, 64] and their documents."""
    documents = Documents(ROWS, SEQ_LEN)
    generator = torch.Generator().manual_seed(7)
    return torch.randint(VOCABULARY, (2, SEQ_LEN), generator=generator), documents


def cotangent(logits: Tensor) -> Tensor:
    """What logits [2, 64, V] are weighed with."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(logits.shape, generator=generator, dtype=logits.dtype)


def build(spec: ModelSpec) -> Any:
    with torch.device("cpu"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return fill(spec.model.build())
        finally:
            torch.set_default_dtype(default)


def titans_own(spec: ModelSpec) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [2, 64, V] and gradients of the model as torchtitan runs it on one device."""
    model = build(spec)
    tokens, documents = rows()
    positions = documents.position_ids()
    with settled(), mock.patch.object(FlexAttention, "_compiled_flex_attn", dense_flex):
        masks = model.get_attention_masks(positions)
        return _run(model, tokens, positions=positions, attention_masks=masks)


def ours(spec: ModelSpec) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of an adopted model on one device."""
    model = build(spec)
    add_mixers(model)
    tokens, documents = rows()
    with settled():
        return _run(
            model,
            tokens,
            positions=documents.position_ids(),
            attention_masks=batch_metadata(model, documents),
        )


def _run(model: Any, tokens: Tensor, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(tokens, **inputs)
    (logits * cotangent(logits)).sum().backward()
    return logits.detach(), gradients(model)


def dense_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score_mod: None,
    block_mask: BlockMask,
    scale: float | None,
    enable_gqa: bool,
    return_aux: AuxRequest,
    kernel_options: dict[str, Any],
) -> tuple[Tensor, Any]:
    """What flex_attention computes, which has no backward on CPUs: q, k, v [B, H, L, D]."""
    assert score_mod is None and not kernel_options
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    length = q.shape[2]
    seen = create_mask(block_mask.mask_mod, len(q), 1, length, length, device="cpu")
    scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v, SimpleNamespace(lse=scores.logsumexp(-1))


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """torchtitan as under our trainer; experts compute in the dtype of their inputs."""
    before = titan_utils.get_spmd_backend()
    titan_utils.set_spmd_backend("partial_dtensor")
    try:
        with (
            mock.patch.object(Tensor, "bfloat16", lambda x: x),
            mock.patch.object(torch, "_grouped_mm", _grouped_mm),
            # Compiled, it takes as long as all the rest.
            mock.patch.object(titan_attention, "_compiled_create_block_mask", create_block_mask),
        ):
            yield
    finally:
        titan_utils.set_spmd_backend(before)


def _grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    groups = zip(starts, ends, b, strict=True)
    out = [a[start:end] @ weight for start, end, weight in groups]
    rest = a.new_zeros(len(a) - ends[-1], b.shape[-1])
    return torch.cat([*out, rest])

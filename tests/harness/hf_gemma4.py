"""transformers' Gemma 4 in fp64, shown each document alone: the truth for ours, on any mesh."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Gemma4Config as HFConfig
from transformers import Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4TextConfig

from dtcp.models.gemma4 import Gemma4Config, config_from_hf, from_hf
from dtcp.sequence.documents import Documents

S, F = "sliding_attention", "full_attention"
SEQ_LEN, WINDOW = 48, 8
ROWS = ((9, 1, 38), (48,), (20, 26), (13, 13, 13))
"""Documents of four rows: some cut by every shard border, two rows with padding."""

SPREAD = 3
"""Where a variant's positions are not a document's 0, 1, 2, ..: 2, 5, 8, .."""

MARKS = (61, 62, 63)
"""Tokens that no text has."""

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 2,
    "sliding_window": WINDOW,
    "layer_types": [S, F, S, F],
    "final_logit_softcapping": 5.0,
    "hidden_size_per_layer_input": 0,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}
SHARING = {
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"attention_k_eq_v": True},
    "moe": {"attention_k_eq_v": True, "num_global_key_value_heads": 1, **EXPERTS},
    "e": SHARING,
    "shared_values": {"attention_k_eq_v": True, **SHARING},
    "vision": {"attention_k_eq_v": True, "use_bidirectional_attention": "vision"},
}
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": [F, F], "num_kv_shared_layers": 1}
SMALL = {"e": {**SHARING, **TWO_LAYERS}}
"""Variants that compile in half the time: a layer of keys of its own, and one that reads them."""

SPREAD_OUT = ("moe", "shared_values")
"""Variants of such positions: keys made from values alone, and shared ones."""


@dataclass(frozen=True)
class Truth:
    """One variant over ROWS: what goes in, and what must come out; names are ours."""

    config: Gemma4Config
    weights: dict[str, Tensor]
    input_ids: Tensor  # [B, S]
    mm_token_type_ids: Tensor | None  # [B, S]
    position_ids: Tensor  # [B, S]
    grad_logits: Tensor  # [B, S, V], zero in padding
    logits: Tensor  # [B, S, V], zero in padding
    gradients: dict[str, Tensor]

    @property
    def documents(self) -> Documents:
        return Documents(ROWS, SEQ_LEN)


class Wide(TorchFunctionMode):
    """Leaves fp64 as it is where transformers casts to fp32: in norms and in the router."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        wide = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if wide and func is Tensor.float:
            return args[0]
        if wide and func is nn.functional.softmax:
            kwargs.pop("dtype", None)
        return func(*args, **kwargs)


def published(settings: dict[str, Any]) -> Any:
    """A random model of transformers in fp64; what starts as ones or zeros is random too."""
    config = Gemma4TextConfig(**{**SHAPE, **settings})
    if config.use_bidirectional_attention == "vision":
        kinds = ("image_token_id", "video_token_id", "audio_token_id")
        # They mark where a tower of its own would put something.
        marks = dict(zip(kinds, MARKS, strict=True))
        whole = HFConfig(text_config=config, vision_config=None, audio_config=None, **marks)
        whole._attn_implementation = "eager"
        model: Any = Gemma4ForConditionalGeneration(whole).double()
    else:
        model = Gemma4ForCausalLM(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.5, 1.5)
    return model


@functools.cache
def truth(variant: str, *, small: bool = False) -> Truth:
    """Forward and backward of the published model, document by document."""
    torch.manual_seed(0)
    theirs = published((SMALL if small else VARIANTS)[variant])
    config = config_from_hf(theirs.config.to_dict())
    documents = Documents(ROWS, SEQ_LEN)
    shape = (documents.batch, documents.seq_len)
    # 0 is the padding token, which is not trained: one of them is in a document.
    input_ids = torch.randint(min(MARKS), shape)
    types = _images(shape) if config.vision_blocks else None
    grad = torch.randn(*shape, config.vocab_size, dtype=torch.float64)
    grad[documents.document() < 0] = 0.0
    position_ids = documents.position_ids()
    if variant in SPREAD_OUT:
        position_ids = SPREAD * position_ids + 2

    rows = []
    with Wide():
        for row, lengths in enumerate(documents.lengths):
            parts, start = [], 0
            for length in lengths:
                tokens = (slice(row, row + 1), slice(start, start + length))
                extra = {"position_ids": position_ids[tokens]}
                # Without a mask theirs would read documents off positions that skip.
                extra["attention_mask"] = torch.ones_like(input_ids[tokens])
                if types is not None:
                    extra["mm_token_type_ids"] = types[tokens]
                parts.append(theirs(input_ids[tokens], use_cache=False, **extra).logits[0])
                start += length
            parts.append(grad.new_zeros(documents.seq_len - start, config.vocab_size))
            rows.append(torch.cat(parts))
        logits = torch.stack(rows)
        logits.backward(grad)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    return Truth(
        config,
        {name: x.detach() for name, x in from_hf(theirs.state_dict(), config).items()},
        input_ids,
        types,
        position_ids,
        grad,
        logits.detach(),
        from_hf(gradients, config),
    )


class Tower(nn.Module):
    """Looks at all images of a batch at once; knows nothing of meshes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Linear(6, dim, dtype=torch.float64),
            nn.Linear(dim, dim).double(),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """[tokens, 6] to features [tokens, dim]; every token sees every other."""
        x = self.first(pixels)
        return self.second(x + torch.tanh(x @ x.T / x.numel()) @ x)


@dataclass(frozen=True)
class Seen:
    """A Truth whose images are looked at by a tower: what goes into it, its weights, gradients."""

    truth: Truth
    pixels: Tensor
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]


@functools.cache
def seen() -> Seen:
    """The vision variant, features in their tokens' places."""
    whole = truth("vision")
    torch.manual_seed(1)
    theirs = published(VARIANTS["vision"])
    types = whole.mm_token_type_ids
    assert types is not None
    images = types > 0
    tower, pixels = Tower(whole.config.dim), torch.randn(int(images.sum()), 6).double()
    text = whole.input_ids.masked_fill(images, 0)
    embeds = theirs.get_input_embeddings()(text)
    embeds = embeds.masked_scatter(images[..., None], tower(pixels))
    rows = []
    with Wide():
        for row, lengths in enumerate(ROWS):
            parts, start = [], 0
            for length in lengths:
                tokens = (slice(row, row + 1), slice(start, start + length))
                inputs = {"inputs_embeds": embeds[tokens], "mm_token_type_ids": types[tokens]}
                parts.append(theirs(**inputs, use_cache=False).logits[0])
                start += length
            parts.append(embeds.new_zeros(SEQ_LEN - start, whole.config.vocab_size))
            rows.append(torch.cat(parts))
        logits = torch.stack(rows)
        logits.backward(whole.grad_logits)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    weights = {name: x.detach() for name, x in from_hf(theirs.state_dict(), whole.config).items()}
    return Seen(
        replace(
            whole,
            weights=weights,
            logits=logits.detach(),
            gradients=from_hf(gradients, whole.config),
        ),
        pixels,
        {name: x.detach() for name, x in tower.state_dict().items()},
        {name: p.grad for name, p in tower.named_parameters()},
    )


def _images(shape: tuple[int, int]) -> Tensor:
    """Longer than the window and shorter, one over three of four shards, one across documents."""
    types = torch.zeros(shape, dtype=torch.int64)
    types[0, 5:17], types[0, 22:26], types[1, 11:14], types[1, 22:39] = 1, 2, 1, 1
    types[2, 0:4], types[2, 34:38], types[3, 10:15] = 2, 1, 1
    return types

"""A Gemma 4 text decoder: windows and global layers, experts, per-layer embeddings.

Every layer is one `Block`; what a layer has (its head shape, keys of its own, experts, a
per-layer input) follows from the config and its index, and is fixed when it is built.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtcp.metadata import BatchMetadata
from dtcp.models.gemma4.config import Gemma4Config, MoEShape, Sight
from dtcp.models.moe import Experts
from dtcp.softmax.mixer import GatherSharedKV, KeysFromValues, SoftmaxAttention

KeysAndValues = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Projections, head norms, rotary positions, and the mixer: where alone tokens meet.

    Three kinds: a layer with keys and values of its own; one whose keys are made from its
    values; one that attends to the keys and values of a layer before it.
    """

    def __init__(self, config: Gemma4Config, layer: int) -> None:
        super().__init__()
        heads, mask = config.heads(layer), config.mask(layer)
        self.head_dim, self.rope = heads.head_dim, heads.rope
        self.shares, self.from_values = config.shares(layer), config.makes_keys_from_values(layer)
        q_dim, kv_dim = (n * heads.head_dim for n in (config.num_heads, heads.num_kv_heads))
        self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        self.q_norm = nn.RMSNorm(heads.head_dim, config.norm_eps)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        if not self.shares:
            self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
            self.v_norm = nn.RMSNorm(heads.head_dim, config.norm_eps, elementwise_affine=False)
            if self.from_values:
                self.k_norm: nn.Module = Scale(heads.head_dim)
            else:
                self.k_norm = nn.RMSNorm(heads.head_dim, config.norm_eps)
                self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.exchange = GatherSharedKV(mask) if config.shared_by_others(layer) else None
        alone = self.from_values and not self.shares and self.exchange is None
        self.mixer = KeysFromValues(mask, scale=1.0) if alone else SoftmaxAttention(mask, scale=1.0)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        attn_metadata: BatchMetadata,
        shared: KeysAndValues | None,
    ) -> tuple[Tensor, KeysAndValues | None]:
        """Attend.

        Args:
            shared: keys and values of the layer this one shares them with; None: its own.
        Returns:
            [B, L, D], and keys and values that other layers will attend to, if there are any.
        """
        # The number of heads is what the projection gives: a plan may split the heads over ranks.
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))  # [B, L, H, D]
        if isinstance(self.mixer, KeysFromValues):
            frequency = self.rope.frequencies(x.device)
            out = self.mixer(
                q, self._values(x), position_ids, self.k_norm(), frequency, attn_metadata
            )
            return self.o_proj(out.flatten(-2)), None
        q = self.rope(q, position_ids)
        k, v = self._own(x, position_ids, attn_metadata) if shared is None else shared
        out = self.o_proj(self.mixer(q, k, v, attn_metadata).flatten(-2))
        return out, None if self.exchange is None else (k, v)

    def _values(self, x: Tensor) -> Tensor:
        """[B, L, G, D], without position."""
        project = self.k_proj if self.from_values else self.v_proj
        return self.v_norm(project(x).unflatten(-1, (-1, self.head_dim)))

    def _own(self, x: Tensor, position_ids: Tensor, attn_metadata: BatchMetadata) -> KeysAndValues:
        v = self._values(x)
        if self.from_values:
            assert self.exchange is not None
            v, at = (
                self.exchange(v, attn_metadata),
                self.exchange.position_ids(position_ids, attn_metadata),
            )
            return self.rope(v * self.k_norm(), at), v
        k = self.rope(self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim))), position_ids)
        if self.exchange is None:
            return k, v
        both = self.exchange(torch.cat((k, v), dim=-1), attn_metadata)
        k, v = both.chunk(2, dim=-1)
        return k, v


class Scale(nn.Module):
    """A weight on its own: what it scales is made elsewhere."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self) -> Tensor:
        return self.weight


def gelu_gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


class FeedForward(nn.Module):
    """down(gelu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu_gated(self.gate(x), self.up(x)))


class Router(nn.Module):
    """Choose each token's experts by a softmax over all, and share out one among the chosen."""

    def __init__(self, dim: int, shape: MoEShape, norm_eps: float) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.norm = nn.RMSNorm(dim, norm_eps, elementwise_affine=False)
        self.scale = Scale(dim)
        self.proj = nn.Linear(dim, shape.num_experts, bias=False)
        self.per_expert_scale = Scale(shape.num_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [N, k] int64 of tokens x [N, D], and their weights [N, k]."""
        scores = self.proj(self.norm(x) * self.scale() * x.shape[-1] ** -0.5)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weight, index = scores.softmax(-1, dtype=wide).topk(self.top_k, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        return index, weight * self.per_expert_scale()[index]


class MoE(nn.Module):
    """Experts beside the dense feed-forward part; the router reads the stream as it is."""

    def __init__(self, config: Gemma4Config, shape: MoEShape) -> None:
        super().__init__()
        self.router = Router(config.dim, shape, config.norm_eps)
        self.experts = Experts(config.dim, shape.hidden_dim, shape.num_experts, gelu_gated)
        self.dense_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.pre_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.post_norm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, dense: Tensor) -> Tensor:
        """Add the experts' output for x [B, L, D] to the dense part's."""
        index, weight = self.router(x.flatten(0, 1))
        mixed = self.experts(self.pre_norm(x).flatten(0, 1), index, weight)
        return self.dense_norm(dense) + self.post_norm(mixed.view_as(x))


class PerLayerInput(nn.Module):
    """What a layer's own embedding of each token adds to the stream."""

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.per_layer_dim, bias=False)
        self.proj = nn.Linear(config.per_layer_dim, config.dim, bias=False)
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.norm(self.proj(gelu_gated(self.gate(x), embedding)))


class Block(nn.Module):
    """Attention, then the feed-forward part, each between two norms; then the layer's scalar."""

    layer_scalar: Tensor

    def __init__(self, config: Gemma4Config, layer: int) -> None:
        super().__init__()
        wide = 2 if config.double_wide and config.shares(layer) else 1
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.attention_post_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.feed_forward_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config.dim, wide * config.hidden_dim)
        self.feed_forward_post_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.moe = MoE(config, config.moe) if config.moe else None
        self.per_layer = PerLayerInput(config) if config.per_layer_dim else None
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        attn_metadata: BatchMetadata,
        embedding: Tensor | None,
        shared: KeysAndValues | None,
    ) -> tuple[Tensor, KeysAndValues | None]:
        """One layer.

        Args:
            embedding: [B, L, P], this layer's own embedding of the tokens, if it has one.
            shared: keys and values of an earlier layer, if it attends to those.
        Returns:
            [B, L, D], and keys and values for later layers, if they attend to these.
        """
        out, kept = self.attention(self.attention_norm(x), position_ids, attn_metadata, shared)
        x = x + self.attention_post_norm(out)
        fed = self.feed_forward(self.feed_forward_norm(x))
        if self.moe is not None:
            fed = self.moe(x, fed)
        x = x + self.feed_forward_post_norm(fed)
        if self.per_layer is not None:
            x = x + self.per_layer(x, embedding)
        # A buffer, which stays in fp32 where parameters are rounded.
        return (x * self.layer_scalar).to(x.dtype), kept


class PerLayerEmbedding(nn.Module):
    """Every layer's own embedding of the tokens: by what they are, and by the stream's start."""

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.num_layers, self.dim = config.num_layers, config.per_layer_dim
        width = config.num_layers * config.per_layer_dim
        self.tokens = nn.Embedding(config.per_layer_vocab_size, width, config.pad_id)
        self.proj = nn.Linear(config.dim, width, bias=False)
        self.norm = nn.RMSNorm(config.per_layer_dim, config.norm_eps)

    def forward(self, token: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """`look_up` of the ids, and [B, L, D] embeddings, to a [B, L, P] for every layer."""
        stream = (self.proj(x) * x.shape[-1] ** -0.5).unflatten(-1, (self.num_layers, self.dim))
        return ((self.norm(stream) + token) * 2**-0.5).unbind(-2)

    def look_up(self, input_ids: Tensor) -> Tensor:
        """[B, L] ids to what tokens are to each layer: [B, L, layers, P]."""
        token = scaled(self.tokens(input_ids), self.dim**0.5)
        return token.unflatten(-1, (self.num_layers, self.dim))


class Gemma4(nn.Module):
    """Tokens to logits.

    Weights are torch's default ones until `init_weights` or a checkpoint fills them; build on
    the meta device, parallelize, `to_empty`, then `init_weights` to start a large model.
    """

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim, config.pad_id)
        self.per_layer = PerLayerEmbedding(config) if config.per_layer_dim else None
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self._tie()

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor,
        attn_metadata: BatchMetadata,
        *,
        inputs_embeds: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
    ) -> Tensor:
        """Score the next token of every token.

        Args:
            input_ids: [B, L]. Beside inputs_embeds they are read by per-layer embeddings alone,
                which take the padding token where there is an image.
            position_ids: [B, L], the position of each token in its document.
            attn_metadata: what the batch brings for the mixers.
            inputs_embeds: [B, L, D], what `embed` gave with images put in their places.
            per_layer_inputs: [B, L, layers, P], of `per_layer.look_up`, where there are no ids.
        Returns:
            [B, L, V].
        """
        x = self._first(input_ids, inputs_embeds)
        embeddings: Sequence[Tensor | None] = [None] * len(self.layers)
        if self.per_layer is not None:
            token = self._tokens(input_ids, per_layer_inputs, self.per_layer)
            embeddings = self.per_layer(token, x)
        shared: dict[Sight, KeysAndValues] = {}
        for layer, block in enumerate(self.layers):
            sight = self.config.layers[layer]
            given = shared[sight] if self.config.shares(layer) else None
            x, kept = block(x, position_ids, attn_metadata, embeddings[layer], given)
            if kept is not None:
                shared[sight] = kept
        logits = self.lm_head(self.norm(x))
        cap = self.config.softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, L] ids to the start of the stream: [B, L, D]."""
        return scaled(self.embedding(input_ids), self.config.dim**0.5)

    def init_weights(self, std: float = 0.02) -> None:
        """Draw all weights."""
        # to_empty gives a shared parameter two new tensors.
        self._tie()
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)
                if module.padding_idx is not None:
                    _zero_row(module.weight, module.padding_idx)
            elif isinstance(module, nn.Linear):
                if module.weight is not self.embedding.weight:
                    nn.init.normal_(module.weight, std=std)
            elif isinstance(module, Experts):
                module.reset_parameters(std)
            elif isinstance(module, Scale):
                nn.init.ones_(module.weight)
            elif isinstance(module, Block):
                nn.init.ones_(module.layer_scalar)

    def _first(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if inputs_embeds is not None:
            return inputs_embeds
        if input_ids is None:
            raise ValueError(
                "Gemma4 reads input_ids or inputs_embeds, got neither: pass one of them."
            )
        return self.embed(input_ids)

    def _tokens(
        self, input_ids: Tensor | None, given: Tensor | None, per_layer: PerLayerEmbedding
    ) -> Tensor:
        if given is not None:
            return given
        if input_ids is None:
            raise ValueError(
                f"Per-layer embeddings are looked up by token, got input_ids=None with "
                f"per_layer_dim={self.config.per_layer_dim}: pass input_ids, the padding token "
                f"where there is an image, or per_layer_inputs."
            )
        return per_layer.look_up(input_ids)

    def _tie(self) -> None:
        if self.config.tied:
            self.lm_head.weight = self.embedding.weight


def scaled(x: Tensor, factor: float) -> Tensor:
    """x times a factor that is rounded to fp32, then to the dtype of x: part of the model."""
    return x * torch.full((), factor, dtype=torch.float32, device=x.device).to(x.dtype)


@torch.no_grad()
def _zero_row(weight: Tensor, row: int) -> None:
    """By arithmetic, not by index: a row of a sharded weight would be a copy."""
    index = torch.ones_like(weight[:, :1]).cumsum(0) - 1
    weight.mul_(index != row)

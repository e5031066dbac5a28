"""A Gemma 4 text decoder: sliding and global layers, experts, per-layer embeddings.

Every layer is one `Block`; what it has (its head shape, its own keys, experts, a per-layer
input) follows from the config and its index, and is fixed when it is built.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dtcp.experts.losses import RouterLoss
from dtcp.metadata import BatchMetadata
from dtcp.models.blocks import FeedForward, ParameterModule, geglu
from dtcp.models.gemma4.config import Gemma4Config, LayerType, MoEConfig
from dtcp.models.inputs import check_ids, check_positions
from dtcp.models.moe import Experts, real_tokens, top_experts
from dtcp.sequence.arguments import check_tensor
from dtcp.softmax.mixer import GatherSharedKV, KeysFromValues, SoftmaxAttention

KeysAndValues = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Projections, head norms, rotary embedding, and the mixer: where tokens read each other.

    Of three kinds: a layer projects its own keys and values; or its key is its value, scaled and
    rotated; or it attends to the keys and values of an earlier layer.
    """

    def __init__(self, config: Gemma4Config, layer: int) -> None:
        super().__init__()
        heads, mask = config.heads(layer), config.mask(layer)
        self.head_dim, self.rope = heads.head_dim, heads.rope
        reads_shared_kv = config.reads_shared_kv(layer)
        self.keys_from_values = config.has_keys_from_values(layer)
        q_dim, kv_dim = (n * heads.head_dim for n in (config.num_heads, heads.num_kv_heads))
        self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        self.q_norm = nn.RMSNorm(heads.head_dim, config.norm_eps)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        if not reads_shared_kv:
            self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
            self.v_norm = nn.RMSNorm(heads.head_dim, config.norm_eps, elementwise_affine=False)
            if self.keys_from_values:
                self.k_norm: nn.Module = ParameterModule(heads.head_dim, fill=1.0)
            else:
                self.k_norm = nn.RMSNorm(heads.head_dim, config.norm_eps)
                self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.exchange = GatherSharedKV(mask) if config.gives_shared_kv(layer) else None
        has_own_kv = not reads_shared_kv and self.exchange is None
        mixer = KeysFromValues if self.keys_from_values and has_own_kv else SoftmaxAttention
        self.mixer = mixer(mask, scale=1.0)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        attn_metadata: BatchMetadata,
        shared_kv: KeysAndValues | None,
    ) -> tuple[Tensor, KeysAndValues | None]:
        """Attend.

        Args:
            shared_kv: of the earlier layer whose keys and values this one reads; None for its own.
        Returns:
            [B, L, D], and the keys and values that later layers will read, or None.
        """
        # The projection's width tells the number of heads: a plan may split heads over ranks.
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))  # [B, L, H, D]
        if isinstance(self.mixer, KeysFromValues):
            frequency = self.rope.frequencies(x.device)
            out = self.mixer(
                q, self._values(x), position_ids, self.k_norm(), frequency, attn_metadata
            )
            return self.o_proj(out.flatten(-2)), None
        q = self.rope(q, position_ids)
        k, v = self._own_kv(x, position_ids, attn_metadata) if shared_kv is None else shared_kv
        out = self.o_proj(self.mixer(q, k, v, attn_metadata).flatten(-2))
        return out, None if self.exchange is None else (k, v)

    def _values(self, x: Tensor) -> Tensor:
        """[B, L, G, D], not rotated."""
        project = self.k_proj if self.keys_from_values else self.v_proj
        return self.v_norm(project(x).unflatten(-1, (-1, self.head_dim)))

    def _own_kv(
        self, x: Tensor, position_ids: Tensor, attn_metadata: BatchMetadata
    ) -> KeysAndValues:
        """Keys and values [B, K, G, D], gathered for all that read them: K is L on one device."""
        v = self._values(x)
        if self.keys_from_values:
            assert self.exchange is not None
            v = self.exchange(v, attn_metadata)
            key_position_ids = self.exchange.position_ids(position_ids, attn_metadata)
            return self.rope(v * self.k_norm(), key_position_ids), v
        k = self.rope(self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim))), position_ids)
        if self.exchange is None:
            return k, v
        kv = self.exchange(torch.cat((k, v), dim=-1), attn_metadata)
        k, v = kv.chunk(2, dim=-1)
        return k, v


class Router(nn.Module):
    """Choose each token's experts by a softmax over all; the weights of the chosen sum to one."""

    def __init__(self, dim: int, config: MoEConfig, norm_eps: float) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.norm = nn.RMSNorm(dim, norm_eps, elementwise_affine=False)
        self.scale = ParameterModule(dim, fill=1.0)
        self.proj = nn.Linear(dim, config.num_experts, bias=False)
        self.per_expert_scale = ParameterModule(config.num_experts, fill=1.0)
        self.router_loss = RouterLoss(balance=config.balance_weight, z=config.z_weight)

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Experts [N, k] int64 of tokens x [N, D], and their weights [N, k].

        Args:
            real: [N] bool, False for padding.
        """
        logits = self.proj(self.norm(x) * self.scale() * x.shape[-1] ** -0.5)
        index, weight = top_experts(logits, self.top_k, self.router_loss, real)
        return index, weight * self.per_expert_scale()[index]


class MoE(nn.Module):
    """Experts beside the dense feed-forward part; the router reads the residual stream."""

    def __init__(self, config: Gemma4Config, moe: MoEConfig) -> None:
        super().__init__()
        self.router = Router(config.dim, moe, config.norm_eps)
        self.experts = Experts(config.dim, moe.hidden_dim, moe.num_experts, geglu)
        self.dense_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.pre_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.post_norm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, dense: Tensor, real: Tensor | None) -> Tensor:
        """Add the experts' output for x [B, L, D] to that of the dense part.

        Args:
            real: [B * L] bool, False for padding.
        """
        index, weight = self.router(x.flatten(0, 1), real)
        out = self.experts(self.pre_norm(x).flatten(0, 1), index, weight, real)
        return self.dense_norm(dense) + self.post_norm(out.view_as(x))


class PerLayerInput(nn.Module):
    """What a layer's own embedding of each token adds to the residual stream."""

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.per_layer_dim, bias=False)
        self.proj = nn.Linear(config.per_layer_dim, config.dim, bias=False)
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.norm(self.proj(geglu(self.gate(x), embedding)))


class Block(nn.Module):
    """Attention, then feed-forward, each between two norms; then the layer's scalar."""

    layer_scalar: Tensor

    def __init__(self, config: Gemma4Config, layer: int) -> None:
        super().__init__()
        width = 2 if config.double_wide and config.reads_shared_kv(layer) else 1
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.attention_post_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.feed_forward_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config.dim, width * config.hidden_dim, geglu)
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
        shared_kv: KeysAndValues | None,
    ) -> tuple[Tensor, KeysAndValues | None]:
        """Residual stream to residual stream, [B, L, D].

        Args:
            embedding: [B, L, P], this layer's own embedding of the tokens, if it has one.
            shared_kv: of an earlier layer, if this one reads its keys and values.
        Returns:
            [B, L, D], and the keys and values that later layers will read, or None.
        """
        out, kv = self.attention(self.attention_norm(x), position_ids, attn_metadata, shared_kv)
        x = x + self.attention_post_norm(out)
        out = self.feed_forward(self.feed_forward_norm(x))
        if self.moe is not None:
            out = self.moe(x, out, real_tokens(attn_metadata))
        x = x + self.feed_forward_post_norm(out)
        if self.per_layer is not None:
            x = x + self.per_layer(x, embedding)
        # A buffer, which stays in fp32 where parameters are rounded.
        return (x * self.layer_scalar).to(x.dtype), kv


class PerLayerEmbedding(nn.Module):
    """Every layer's own embedding of the tokens: from their ids, and from their first embedding."""

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.num_layers, self.dim = config.num_layers, config.per_layer_dim
        width = config.num_layers * config.per_layer_dim
        self.tokens = nn.Embedding(config.per_layer_vocab_size, width, config.pad_id)
        self.proj = nn.Linear(config.dim, width, bias=False)
        self.norm = nn.RMSNorm(config.per_layer_dim, config.norm_eps)

    def forward(self, token: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Embed for every layer.

        Args:
            token: [B, L, layers, P], of `look_up`.
            x: [B, L, D], the start of the residual stream.
        Returns:
            [B, L, P] for every layer.
        """
        projected = (self.proj(x) * x.shape[-1] ** -0.5).unflatten(-1, (self.num_layers, self.dim))
        return ((self.norm(projected) + token) * 2**-0.5).unbind(-2)

    def look_up(self, input_ids: Tensor) -> Tensor:
        """Ids [B, L] to the embedding of each token for each layer: [B, L, layers, P]."""
        token = _scaled(self.tokens(input_ids), self.dim**0.5)
        return token.unflatten(-1, (self.num_layers, self.dim))


class Gemma4(nn.Module):
    """Tokens to logits.

    Weights have torch's defaults until `init_weights` or a checkpoint fills them. To start a
    large model, build it on the meta device, parallelize it, then `to_empty` and `init_weights`.
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
            input_ids: [B, L]. Beside inputs_embeds, only per-layer embeddings read them; give the
                padding token where there is an image.
            position_ids: [B, L], of each token in its document.
            attn_metadata: of the batch, for the mixers: from batch_metadata or shard_batch.
            inputs_embeds: [B, L, D], the output of `embed` with images in their places.
            per_layer_inputs: [B, L, layers, P], of `per_layer.look_up`, if there are no ids.
        Returns:
            [B, L, V].
        Raises:
            ValueError: neither ids nor embeddings.
        """
        x = self._first_embedding(input_ids, inputs_embeds)
        check_positions("Gemma4", position_ids, x.shape[:2])
        embeddings: Sequence[Tensor | None] = [None] * len(self.layers)
        if self.per_layer is not None:
            token = self._per_layer_tokens(input_ids, per_layer_inputs, self.per_layer)
            embeddings = self.per_layer(token, x)
        shared_kv: dict[LayerType, KeysAndValues] = {}
        for layer, block in enumerate(self.layers):
            layer_type = self.config.layer_types[layer]
            read_kv = shared_kv[layer_type] if self.config.reads_shared_kv(layer) else None
            x, kv = block(x, position_ids, attn_metadata, embeddings[layer], read_kv)
            if kv is not None:
                shared_kv[layer_type] = kv
        logits = self.lm_head(self.norm(x))
        cap = self.config.softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def embed(self, input_ids: Tensor) -> Tensor:
        """Ids [B, L] to the start of the residual stream: [B, L, D]."""
        return _scaled(self.embedding(input_ids), self.config.dim**0.5)

    def init_weights(self, std: float = 0.02) -> None:
        """Draw all weights."""
        # to_empty makes two tensors of a shared parameter.
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
            elif isinstance(module, ParameterModule | RouterLoss):
                module.reset_parameters()
            elif isinstance(module, Block):
                nn.init.ones_(module.layer_scalar)

    def _first_embedding(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if inputs_embeds is not None:
            check_tensor("Gemma4", shape="[B, L, D]", ndim=3, inputs_embeds=inputs_embeds)
            return inputs_embeds
        if input_ids is None:
            raise ValueError(
                "Gemma4 reads input_ids or inputs_embeds, got neither: pass one of them."
            )
        check_ids("Gemma4", input_ids, self.config.vocab_size)
        return self.embed(input_ids)

    def _per_layer_tokens(
        self,
        input_ids: Tensor | None,
        per_layer_inputs: Tensor | None,
        per_layer: PerLayerEmbedding,
    ) -> Tensor:
        if per_layer_inputs is not None:
            return per_layer_inputs
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


def _scaled(x: Tensor, factor: float) -> Tensor:
    """x times a factor that is rounded to fp32, then to the dtype of x, as the model has it."""
    return x * torch.full((), factor, dtype=torch.float32, device=x.device).to(x.dtype)


@torch.no_grad()
def _zero_row(weight: Tensor, row: int) -> None:
    """By arithmetic, not by index: an indexed row of a sharded weight would be a copy."""
    index = torch.ones_like(weight[:, :1], dtype=torch.int64).cumsum(0) - 1
    weight.mul_(index != row)

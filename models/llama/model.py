"""A dense decoder of the Llama or Qwen family. Read this model first."""

from torch import Tensor, nn

from dtcp.metadata import BatchMetadata
from dtcp.models.blocks import FeedForward
from dtcp.models.inputs import check_model_inputs
from dtcp.models.llama.config import LlamaConfig
from dtcp.sequence.masks import Causal
from dtcp.softmax.mixer import SoftmaxAttention


class Attention(nn.Module):
    """Projections, rotary embedding, and the mixer: the one place where tokens read each other."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim, self.rope = config.head_dim, config.rope
        q_dim, kv_dim = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.q_proj = nn.Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        self.q_norm = _head_norm(config)
        self.k_norm = _head_norm(config)
        self.mixer = SoftmaxAttention(Causal())

    def forward(self, x: Tensor, position_ids: Tensor, attn_metadata: BatchMetadata) -> Tensor:
        # The projection's width tells the number of heads: a plan may split heads over ranks.
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, heads)  # [B, L, H, D]
        k = self.k_proj(x).unflatten(-1, heads)  # [B, L, G, D]
        v = self.v_proj(x).unflatten(-1, heads)  # [B, L, G, D]
        q, k = self.rope(self.q_norm(q), position_ids), self.rope(self.k_norm(k), position_ids)
        return self.o_proj(self.mixer(q, k, v, attn_metadata).flatten(-2))


class Block(nn.Module):
    """Attention, then feed-forward; each reads a norm of the residual stream and adds to it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim)

    def forward(self, x: Tensor, position_ids: Tensor, attn_metadata: BatchMetadata) -> Tensor:
        x = x + self.attention(self.attention_norm(x), position_ids, attn_metadata)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nn.Module):
    """Tokens to logits.

    Weights have torch's defaults until `init_weights` or a checkpoint fills them. To start a
    large model, build it on the meta device, parallelize it, then `to_empty` and `init_weights`.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self._tie()

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attn_metadata: BatchMetadata
    ) -> Tensor:
        """Score the next token of every token.

        Args:
            input_ids: [B, L].
            position_ids: [B, L], of each token in its document.
            attn_metadata: of the batch, for the mixers: from batch_metadata or shard_batch.
        Returns:
            [B, L, V].
        """
        check_model_inputs("Llama", input_ids, position_ids, self.config.vocab_size)
        x = self.embedding(input_ids)
        for block in self.layers:
            x = block(x, position_ids, attn_metadata)
        return self.lm_head(self.norm(x))

    def init_weights(self, std: float = 0.02) -> None:
        """Draw all weights; what adds to the residual stream starts smaller in deeper models."""
        # to_empty makes two tensors of a shared parameter.
        self._tie()
        for name, module in self.named_modules():
            if isinstance(module, nn.RMSNorm):
                module.reset_parameters()
            if isinstance(module, nn.Linear | nn.Embedding):
                adds_to_stream = name.endswith((".o_proj", ".down"))
                shrink = (2 * self.config.num_layers) ** -0.5 if adds_to_stream else 1.0
                nn.init.normal_(module.weight, std=std * shrink)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _tie(self) -> None:
        if self.config.tied:
            self.lm_head.weight = self.embedding.weight


def _head_norm(config: LlamaConfig) -> nn.Module:
    return nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

"""Qwen3.5: three layers in four are recurrent (gated delta rule), the fourth attends."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtcp.experts.losses import RouterLoss
from dtcp.metadata import BatchMetadata
from dtcp.models.blocks import FeedForward, ParameterModule, swiglu
from dtcp.models.inputs import check_model_inputs
from dtcp.models.moe import Experts, real_tokens, top_experts
from dtcp.models.qwen3_5.config import MoEConfig, Qwen35Config
from dtcp.recurrent.mixer import CausalConv1d, GatedDeltaRule
from dtcp.sequence.arguments import check_tensor
from dtcp.sequence.masks import Causal
from dtcp.softmax.mixer import SoftmaxAttention

Angles = tuple[Tensor, Tensor]
"""cos and sin of every token and frequency."""


class ZeroCentredNorm(nn.Module):
    """RMSNorm whose weight is added to one, so that weight decay pulls the scale to one."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (scaled * (1.0 + self.weight.to(wide.dtype))).to(x.dtype)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class GatedDeltaNet(nn.Module):
    """Projections, a short convolution, the gated delta rule, a gated norm.

    Queries, keys and values have projections of their own here, where checkpoints have one for
    all three: so a plan can split each by its heads.
    """

    def __init__(self, config: Qwen35Config) -> None:
        super().__init__()
        shape, dim = config.delta, config.dim
        self.key_dim, self.value_dim = shape.key_dim, shape.value_dim
        keys, values = shape.key_heads * shape.key_dim, shape.value_heads * shape.value_dim
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.z_proj = nn.Linear(dim, values, bias=False)
        self.a_proj = nn.Linear(dim, shape.value_heads, bias=False)
        self.b_proj = nn.Linear(dim, shape.value_heads, bias=False)
        self.q_taps = ParameterModule(keys, shape.conv_width)
        self.k_taps = ParameterModule(keys, shape.conv_width)
        self.v_taps = ParameterModule(values, shape.conv_width)
        self.log_rate = ParameterModule(shape.value_heads)
        self.step_bias = ParameterModule(shape.value_heads)
        self.norm = nn.RMSNorm(shape.value_dim, config.norm_eps)
        self.o_proj = nn.Linear(values, dim, bias=False)
        self.conv = CausalConv1d(shape.conv_width)
        self.mixer = GatedDeltaRule()

    def forward(self, x: Tensor, attn_metadata: BatchMetadata) -> Tensor:
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        taps = torch.cat((self.q_taps(), self.k_taps(), self.v_taps()))
        qkv = F.silu(self.conv(torch.cat(projected, dim=-1), taps, attn_metadata))
        q, k, v = qkv.split([y.shape[-1] for y in projected], dim=-1)

        # The projection's width tells the number of heads: a plan may split heads over ranks.
        q, k = (y.unflatten(-1, (-1, self.key_dim)) for y in (q, k))  # [B, L, G, K]
        v, z = (y.unflatten(-1, (-1, self.value_dim)) for y in (v, self.z_proj(x)))
        out = self.mixer(
            q, k, v, self._log_decay(self.a_proj(x)), self.b_proj(x).sigmoid(), attn_metadata
        )
        return self.o_proj((self.norm(out) * F.silu(z)).flatten(-2))

    def _log_decay(self, step: Tensor) -> Tensor:
        """Log of the fraction of the state that each token keeps: [B, L, H], fp32 at least."""
        wide = torch.promote_types(step.dtype, torch.float32)
        rate = self.log_rate().to(wide).exp()
        return -rate * F.softplus(step.to(wide) + self.step_bias().to(wide))

    def reset_parameters(self, std: float) -> None:
        for taps in (self.q_taps, self.k_taps, self.v_taps):
            nn.init.normal_(taps.weight, std=std)
        nn.init.ones_(self.step_bias.weight)
        nn.init.uniform_(self.log_rate.weight, 0.01, 16)
        with torch.no_grad():
            self.log_rate.weight.log_()


class Attention(nn.Module):
    """Softmax attention with a gate: each query scales its output by a sigmoid of its own."""

    def __init__(self, config: Qwen35Config) -> None:
        super().__init__()
        self.head_dim, self.rope = config.head_dim, config.rope
        q_dim, kv_dim = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        # For each head its query, then its gate.
        self.q_proj = nn.Linear(config.dim, 2 * q_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        self.q_norm = ZeroCentredNorm(config.head_dim, config.norm_eps)
        self.k_norm = ZeroCentredNorm(config.head_dim, config.norm_eps)
        self.mixer = SoftmaxAttention(Causal())

    def forward(self, x: Tensor, angles: Angles, attn_metadata: BatchMetadata) -> Tensor:
        q, gate = self.q_proj(x).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, L, G, D]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, L, G, D]
        q, k = (self.rope.rotate(y, *angles) for y in (self.q_norm(q.contiguous()), self.k_norm(k)))
        out = self.mixer(q, k, v, attn_metadata) * gate.sigmoid()
        return self.o_proj(out.flatten(-2))


class MoE(nn.Module):
    """Experts that a router chooses, and a shared one with a gate."""

    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.router = nn.Linear(dim, config.num_experts, bias=False)
        self.experts = Experts(dim, config.hidden_dim, config.num_experts, swiglu)
        self.router_loss = RouterLoss(balance=config.balance_weight, z=config.z_weight)
        self.shared = FeedForward(dim, config.shared_hidden_dim)
        self.shared_gate = nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        """Args: x [B, L, D]; real [B * L] bool, False for padding."""
        tokens = x.flatten(0, 1)
        index, weight = top_experts(self.router(tokens), self.top_k, self.router_loss, real)
        shared = partial(self._share, tokens)
        return self.experts(tokens, index, weight.to(x.dtype), real, shared).view(x.shape)

    def _share(self, tokens: Tensor) -> Tensor:
        return self.shared_gate(tokens).sigmoid() * self.shared(tokens)


class Block(nn.Module):
    """A mixer, then feed-forward; each reads a norm of the residual stream and adds to it."""

    def __init__(self, config: Qwen35Config, *, attends: bool) -> None:
        super().__init__()
        self.attends = attends
        self.mixer_norm = ZeroCentredNorm(config.dim, config.norm_eps)
        if attends:
            self.attention = Attention(config)
        else:
            self.delta = GatedDeltaNet(config)
        self.feed_forward_norm = ZeroCentredNorm(config.dim, config.norm_eps)
        self.feed_forward = _feed_forward(config.dim, config.feed_forward)

    def forward(self, x: Tensor, angles: Angles, attn_metadata: BatchMetadata) -> Tensor:
        normed = self.mixer_norm(x)
        if self.attends:
            x = x + self.attention(normed, angles, attn_metadata)
        else:
            x = x + self.delta(normed, attn_metadata)
        normed = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, MoE):
            return x + self.feed_forward(normed, real_tokens(attn_metadata))
        return x + self.feed_forward(normed)


class MultiTokenPrediction(nn.Module):
    """From a hidden state and the next token, the hidden state that predicts the one after."""

    def __init__(self, config: Qwen35Config) -> None:
        super().__init__()
        self.embedding_norm = ZeroCentredNorm(config.dim, config.norm_eps)
        self.hidden_norm = ZeroCentredNorm(config.dim, config.norm_eps)
        self.join = nn.Linear(2 * config.dim, config.dim, bias=False)
        self.layers = nn.ModuleList([Block(config, attends=True)])
        self.norm = ZeroCentredNorm(config.dim, config.norm_eps)

    def forward(
        self, hidden: Tensor, next_token: Tensor, angles: Angles, attn_metadata: BatchMetadata
    ) -> Tensor:
        """Predict one token further.

        Args:
            hidden: [B, L, D], after the model's last norm.
            next_token: [B, L, D], the embedding of each next token.
        Returns:
            [B, L, D], for the model's head.
        """
        pair = torch.cat((self.embedding_norm(next_token), self.hidden_norm(hidden)), dim=-1)
        return self.norm(self.layers[0](self.join(pair), angles, attn_metadata))


class Qwen35(nn.Module):
    """Tokens to logits.

    Weights have torch's defaults until `init_weights` or a checkpoint fills them. To start a
    large model, build it on the meta device, parallelize it, then `to_empty` and `init_weights`.
    """

    def __init__(self, config: Qwen35Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            Block(config, attends=config.attends(i)) for i in range(config.num_layers)
        )
        self.norm = ZeroCentredNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.ahead = MultiTokenPrediction(config) if config.num_mtp_layers else None
        self._tie()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attn_metadata: BatchMetadata,
        mtp_input_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Score the next token of every token.

        Args:
            input_ids: [B, L].
            position_ids: [B, L], of each token in its document; or [3, B, L], its time, height
                and width.
            attn_metadata: of the batch, for the mixers: from batch_metadata or shard_batch.
            mtp_input_ids: [B, 1, L], the token after each one (dtcp.labels.look_ahead); None to
                leave multi-token prediction out.
        Returns:
            [B, L, V]; with mtp_input_ids a tuple of it and of that for the token after the next.
        Raises:
            ValueError: mtp_input_ids for a model without an MTP layer.
        """
        check_tensor("Qwen35", shape="[B, L] or [3, B, L]", position_ids=position_ids)
        angles = self.config.rope.angles(position_ids)
        check_model_inputs("Qwen35", input_ids, position_ids, self.config.vocab_size, axes=3)
        x = self.embedding(input_ids)
        for block in self.layers:
            x = block(x, angles, attn_metadata)
        hidden = self.norm(x)
        if mtp_input_ids is None:
            return self.lm_head(hidden)
        if self.ahead is None:
            raise ValueError(
                "A model predicts further ahead with a layer for it, got mtp_input_ids with "
                "num_mtp_layers=0: leave them out, or set num_mtp_layers=1."
            )
        further = self.ahead(hidden, self.embedding(mtp_input_ids[:, 0]), angles, attn_metadata)
        return self.lm_head(hidden), self.lm_head(further)

    def init_weights(self, std: float = 0.02) -> None:
        """Draw all weights; what adds to the residual stream starts smaller in deeper models."""
        # to_empty makes two tensors of a shared parameter.
        self._tie()
        for name, module in self.named_modules():
            if isinstance(module, nn.RMSNorm | ZeroCentredNorm | RouterLoss):
                module.reset_parameters()
            if isinstance(module, GatedDeltaNet | Experts):
                module.reset_parameters(std)
            if isinstance(module, nn.Linear | nn.Embedding):
                adds_to_stream = name.endswith((".o_proj", ".down"))
                shrink = (2 * self.config.num_layers) ** -0.5 if adds_to_stream else 1.0
                nn.init.normal_(module.weight, std=std * shrink)

    def _tie(self) -> None:
        if self.config.tied:
            self.lm_head.weight = self.embedding.weight


def _feed_forward(dim: int, shape: int | MoEConfig) -> nn.Module:
    return FeedForward(dim, shape) if isinstance(shape, int) else MoE(dim, shape)
